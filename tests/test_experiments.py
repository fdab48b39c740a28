"""tools/experiments.sh: every form is a valid configuration; runs are made once, go on, and are compared."""
import functools
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import harness
import pytest

import train_jepa as tj

ROOT = Path(__file__).resolve().parents[1]

# Stands for Python: a program becomes a fork of the harness's warm process, which has imported torch.
FORKING_PYTHON = """#!%(python)s
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(%(address)r)
    connection.sendall(json.dumps([os.getcwd(), *sys.argv[1:]]).encode() + b"\\n")
    code, text = json.loads(connection.makefile().readline())
print(text, end="")
sys.exit(code)
"""


class Programs(socketserver.StreamRequestHandler):
    """Answers a request [folder, program, NAME=value...] with [exit code, output] of the program."""

    def handle(self):
        folder, program, *arguments = json.loads(self.rfile.readline())
        patch, knobs = f"os.chdir({folder!r})\n", {}
        if program == "train_jepa.py":
            knobs = dict(argument.split("=", 1) for argument in arguments)
        else:
            patch += f"import runpy; sys.argv = {[program, *arguments]}; runpy.run_path({program!r}, None, '__main__')"
        child = harness.run(self.server.outputs, patch, {}, **knobs)
        self.wfile.write(json.dumps([child.code, child.text()]).encode() + b"\n")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Path of the forking Python."""
    folder = tmp_path_factory.mktemp("python")
    path, address = folder / "python", str(folder / "socket")
    path.write_text(FORKING_PYTHON % dict(python=sys.executable, address=address))
    path.chmod(0o755)
    with socketserver.ThreadingUnixStreamServer(address, Programs) as server:
        server.outputs = folder
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def script(*arguments, folder=ROOT, code=0, **env):
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    base |= {"SKIP_VENV": "1", "PYTHON": sys.executable, "MPLBACKEND": "Agg"}
    done = subprocess.run(["bash", str(folder / "tools/experiments.sh"), *arguments], capture_output=True, text=True,
                          env=base | env, cwd="/", timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_scripts(folder):
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup_jepa.sh", "requirements.txt", "train_jepa.py"):
        shutil.copy(ROOT / name, folder)


@functools.cache
def listed() -> list[tuple[str, str, dict]]:
    rows = [line.split() for line in script("list").splitlines()]
    return [(group, form, dict(knob.split("=", 1) for knob in knobs)) for group, form, *knobs in rows]


def test_every_form_changes_known_knobs_to_a_configuration_that_makes_sense():
    text = (ROOT / "tools/experiments.sh").read_text()
    small = dict(word.split("=", 1) for word in text.split('SMALL="')[1].split('"')[0].split())
    seen = set()
    for group, form, knobs in listed():
        knobs = dict(knobs)
        source = knobs.pop("FROM", None)
        assert source is None or any(other == source for same, other, _ in listed() if same == group)
        config = tj.Config.from_env({**small, **knobs, "ITERATIONS": "300"}).validate()
        named = tuple(sorted(config.named().items()))
        assert (group, named) not in seen, f"{group} {form} repeats another form"
        seen.add((group, named))
    groups = {group: [form for other, form, _ in listed() if other == group] for group, _, _ in listed()}
    assert groups.keys() == {"screen", "confirm", "collapse", "storage",
                             "recipe_64", "recipe_128", "best_64", "best_128", "best_bpe", "horizon"}
    assert {"off", "sigreg_alone", "published"} <= set(groups["screen"]) & set(groups["confirm"])
    assert groups["recipe_64"][0] == groups["recipe_128"][0] == "plain" and groups["storage"][0] == "absmax"
    assert groups["best_64"] == groups["best_128"] == groups["best_bpe"] == ["published", "published_lanes", "best"]


@pytest.mark.parametrize("arguments, why", [
    ((), "usage"), (("nonsense",), "groups are"), (("screen", "nonsense"), "no form of screen"),
    (("report", "recipe_64"), "holds no runs yet"), (("data",), "usage")])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, arguments, why):
    copy_scripts(tmp_path)
    text = script(*arguments, folder=tmp_path, code=2, BASE="DATA_PATH=x")
    assert why in text and len(text.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_group_runs_once_per_form_and_seed_and_is_compared(tmp_path, demo_data, python):
    copy_scripts(tmp_path)
    tiny = (f"DATA_PATH={demo_data.bytes} MODEL_DIM=64 NUM_LAYERS=2 D_STATE=16 TRAIN_SEQ_LEN=32 VAL_MAX_TOKENS=2000 "
            "TRAIN_BATCH_TOKENS=256 DIAGNOSTICS=0 JEPA_STEPS=1 PREDICTOR_HIDDEN_MULT=1")
    env = dict(SEEDS="1 2", STEPS="4", BASE=tiny, PYTHON=str(python))
    script("confirm", "off", "sigreg_alone", folder=tmp_path, **env)
    results = sorted(tmp_path.glob("runs/experiments/confirm/*/result.json"))
    assert [path.parent.name for path in results] == ["off-s1", "off-s2", "sigreg_alone-s1", "sigreg_alone-s2"]
    times = [path.stat().st_mtime_ns for path in results]
    results[0].unlink()  # as if killed at the very end: it goes on from its checkpoint
    script("confirm", "off", "sigreg_alone", folder=tmp_path, **env)
    assert results[0].exists() and [path.stat().st_mtime_ns for path in results[1:]] == times[1:]
    report = script("report", "confirm", folder=tmp_path, PYTHON=str(python))
    assert "Paired by seed, against SIGREG_LAMBDA=0" in report
    assert (tmp_path / "runs/experiments/confirm/compare.png").exists()


@pytest.mark.slow
def test_a_stored_form_takes_the_weights_of_another_and_trains_nothing(tmp_path, demo_data, python):
    copy_scripts(tmp_path)
    tiny = (f"DATA_PATH={demo_data.bytes} MODEL_DIM=64 NUM_LAYERS=2 D_STATE=16 TRAIN_SEQ_LEN=32 VAL_MAX_TOKENS=2000 "
            "TRAIN_BATCH_TOKENS=256 DIAGNOSTICS=0")
    script("storage", "compensated", "absmax", folder=tmp_path, SEEDS="1", STEPS="4", BASE=tiny, PYTHON=str(python))
    result = {form: json.loads((tmp_path / f"runs/experiments/storage/{form}-s1/result.json").read_text())
              for form in ("absmax", "compensated")}
    same = ("val_bpb", "steps", "eval_params")
    assert [result["absmax"][key] for key in same] == [result["compensated"][key] for key in same]
    assert result["absmax"]["roundtrip_val_bpb"] != result["compensated"]["roundtrip_val_bpb"]
    logs = [(tmp_path / f"runs/experiments/storage/{form}-s1/log.txt").read_text() for form in result]
    assert [bool(re.search(r"^rounding: \d+ matrices compensated", log, re.M)) for log in logs] == [False, True]
    assert "compensated" in script("report", "storage", folder=tmp_path, PYTHON=str(python))


def test_validations_of_long_runs_become_a_table_and_running_differences(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import horizon
    for run, gap in (("base-s2", 0.0), ("hybrid1-s2", -0.5), ("best-s1", 1.0)):  # the last one has no partner
        (tmp_path / run).mkdir()
        lines = [dict(kind="train", step=7)] + [
            dict(kind="validation", step=step, val_bpb=3 - step / 1000 + gap * step / 1000)
            for step in range(0, 1600 if run == "base-s2" else 1400, 200)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = horizon.read_validations(tmp_path)
    steps, gaps = horizon.difference(runs["hybrid1-s2"], runs["base-s2"])
    assert steps == [600, 800] and gaps == pytest.approx([-0.3, -0.4])  # common steps 200 to 1,200, means of five
    pytest.importorskip("matplotlib")
    horizon.draw_curves(tmp_path)
    table = (tmp_path / "validation.csv").read_text().splitlines()
    assert table[0] == "run,step,val_bpb" and len(table) == 1 + 8 + 7 + 7 and "base-s2,200,2.8000" in table
    assert (tmp_path / "curves.png").stat().st_size > 10_000
