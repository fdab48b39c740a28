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
    trained, = (row["roundtrip_val_bpb"] for row in rows if row["stage"] == "train" and "steps" in row)
    evaluated, = (row["roundtrip_val_bpb"] for row in rows if row["stage"] == "eval" and "roundtrip_val_bpb" in row)
    assert evaluated == trained
