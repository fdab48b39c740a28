"""tools/gpu_check.sh runs to its end in Triton's interpreter, so that no typo waits for the first GPU."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="Triton's interpreter")


@pytest.mark.slow
def test_all_stages_run_to_their_end_on_tiny_sizes(tmp_path, demo_data):
    env = os.environ | dict(OUT=str(tmp_path), PYTHON=sys.executable)
    done = subprocess.run(["bash", "tools/gpu_check.sh", "--tiny"], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0 and "0 stages failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row.get("error") or row.get("failed", "no") != "no"]
    kernels = {row["kernel"]: row["fault"] for row in rows if row["stage"] == "kernels" and "kernel" in row}
    assert kernels == dict(head="none", mixer="none", mlp="none")
    gaps = [row["largest_loss_gap"] for row in rows if row["stage"] == "parity" and "run" in row]
    assert len(gaps) == 3 and max(gaps) < 1e-3  # two steps in fp32, on kernels and without
    for part in ("", "_best"):
        trained, = (row for row in rows if row["stage"] == f"train{part}" and "steps" in row)
        evaluated, = (row for row in rows if row["stage"] == f"eval{part}" and "roundtrip_val_bpb" in row)
        assert evaluated["roundtrip_val_bpb"] == trained["roundtrip_val_bpb"]
    assert 0 < evaluated["adapted_val_bpb"] < 20 and evaluated["carried_val_bpb"] != evaluated["roundtrip_val_bpb"]
    speed, = (row for row in rows if row["stage"] == "eval_speed" and "ms_per_piece" in row)
    assert speed["ms_per_piece"] > 0 and speed["piece_tokens"] == 24  # rows of 32, of which 8 are read again
