"""tools/submit.py: refusals, contents of the folder, nothing half-written; slow: real runs."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import submit as tool
from harness import TINY, Child, launch, plain_environment
from harness import run as run_child

import train_jepa as tj

ROOT = Path(__file__).resolve().parents[1]
SEEDS, TRAINED_SEEDS = (42, 43, 44), (42, 43)
KNOBS = dict(
    tokenizer="byte", model_dim=64, num_layers=2, expand=1, d_state=16, train_seq_len=64,
    train_batch_tokens=512, micro_batches=2, iterations=3, val_max_tokens=2000, val_batch_size=1024,
    sliding_eval=True, sliding_eval_stride=32, device="cpu")
PEOPLE = dict(author="A. Author", github_id="aauthor")
CHECKED = ("roundtrip_val_bpb", "tempered_val_bpb", "sliding_val_bpb", "temperature")


def edit(path, **values):
    """Change keys of a JSON file; a value of None takes the key out."""
    old = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in old.items() if value is not None}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three finished run folders as training leaves them, untrained; the seed is in the scores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    source = tj.source_text()
    digest = hashlib.sha256(source.encode()).hexdigest()
    for seed in SEEDS:
        folder = tmp_path / f"runs/r{seed}"
        folder.mkdir(parents=True)
        c = tj.Config(seed=seed, run_id=folder.name, data_path="data", **KNOBS)
        (folder / "config.json").write_text(json.dumps(c.named()))
        stated = f"script: {len(source.encode())} bytes, sha256 {digest}"
        (folder / "log.txt").write_text(f"{source}\n{stated}\ndone\n")
        (folder / "model.jepa").write_bytes(b"weights" * seed)
        scores = {f"{kind}_val_{unit}": 1.0 + seed / 100 + shift for shift, kind in
                  ((0.02, "roundtrip"), (0.01, "tempered"), (0.0, "sliding"))
                  for unit in ("bpb", "loss")}
        (folder / "result.json").write_text(json.dumps(scores | dict(
            run_id=folder.name, steps=3, train_seconds=550.0, ms_per_step=98.0, eval_seconds=300.0,
            temperature=0.9, sliding_stride=32, artifact_bytes=7 * seed, seed=seed, world_size=1,
            device="a processor", eval_params=96_262, train_only_params=24_768,
            machine=dict(device_type="cpu"), script_sha256=digest,
            artifact_sha256=hashlib.sha256(b"weights" * seed).hexdigest())))
    return tmp_path / "runs"


@pytest.fixture
def evaluated(monkeypatch):
    """Stands for the process that evaluates the copy: notes its calls, answers with `.scores`."""
    class Evaluated:
        def __init__(self):
            self.calls, self.code, self.error = [], 0, ""
            self.scores = dict(roundtrip_val_bpb=1.44, tempered_val_bpb=1.43,
                               sliding_val_bpb=1.42 + 4e-7, temperature=0.9)

        def run(self, command, cwd, env, **_):
            self.calls.append((command, Path(cwd), env, file_names(cwd)))
            text = self.scores if isinstance(self.scores, str) else json.dumps(self.scores)
            return subprocess.CompletedProcess(
                command, self.code, f"roundtrip val_loss:1\n{text}\n", self.error)

    process = Evaluated()
    monkeypatch.setattr(tool.subprocess, "run", process.run)
    return process


def file_names(folder) -> list[str]:
    """Files at any depth, relative to the folder."""
    folder = Path(folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def submit(run="runs/r*", **settings):
    return tool.submit(tool.Settings(run=run, **PEOPLE | settings))


def refused(text, run="runs/r*", **settings):
    """Submitting must fail with `text` in one of its lines, and leave nothing behind."""
    with pytest.raises(tj.UserError) as caught:
        submit(run, **settings)
    lines = [line for line in str(caught.value).splitlines() if text in line]
    assert len(lines) == 1, str(caught.value)
    assert not list(Path().glob("submissions/*")) and not list(Path().glob("submissions/.*"))
    return str(caught.value)


def test_refuses_without_author(runs):
    assert refused("AUTHOR: missing", author="").count("\n") == 0
    refused("GITHUB_ID: missing", github_id=" ")


def test_refuses_runs_that_are_not_there(runs):
    refused("RUN=runs/z*: no such folder", run="runs/r42 runs/z*")
    refused("RUN=: no such folder", run="")


def test_refuses_too_many_bytes(runs):
    big, code_bytes = runs / "r43/model.jepa", len(tj.source_text().encode())
    big.write_bytes(b"")
    os.truncate(big, 16_000_001 - code_bytes)
    edit(runs / "r43/result.json", artifact_sha256=tj.file_hash(big))
    line = refused("16,000,001 bytes")
    assert line.count("\n") == 0 and "16,000,000 allowed" in line
    os.truncate(big, 16_000_000 - code_bytes)
    edit(runs / "r43/result.json", artifact_sha256=tj.file_hash(big))
    assert not list(tool.run_faults(compare.read_run(runs / "r43"), "10min"))


@pytest.mark.parametrize("name,what", [
    ("train_seconds", "training"), ("eval_seconds", "evaluation")])
def test_refuses_more_than_ten_minutes_on_that_track(runs, evaluated, name, what):
    edit(runs / "r44/result.json", **{name: 600.5})
    assert refused(f"{what} took 600.50 s").count("\n") == 0
    assert submit(track="unlimited")["track"] == "unlimited"
    edit(runs / "r44/result.json", **{name: 600.0})
    submit(out="second")


def test_refuses_another_script(runs):
    edit(runs / "r42/result.json", script_sha256="0" * 64)
    refused("runs/r42: the script changed")
    log = (runs / "r43/log.txt").read_text()
    (runs / "r43/log.txt").write_text(log.replace("import json\n", "import json  # \n", 1))
    text = refused("runs/r43: the script changed")
    assert text.count("\n") == 1
    (runs / "r43/log.txt").write_text("\n".join(log.splitlines()[-1:]))
    refused("runs/r43: log.txt does not say")
    (runs / "r43/log.txt").unlink()
    refused("runs/r43: log.txt does not say")


def test_refuses_when_the_file_was_edited_after_the_run(runs, monkeypatch):
    changed = tj.source_text() + "# one more line\n"
    monkeypatch.setattr(tool, "source_text", lambda: changed)
    text = refused("runs/r44: the script changed")
    assert text.count("the script changed") == 3


def test_log_of_a_run_begun_twice(runs, evaluated):
    log, older = (runs / "r42/log.txt").read_text(), "script: 15 bytes, sha256 " + "0" * 64
    (runs / "r42/log.txt").write_text(f"an older script\n{older}\nstep:1\n{log}")
    assert submit()["seeds"] == [42, 43, 44]


def test_refuses_a_missing_round_trip(runs):
    edit(runs / "r42/result.json", roundtrip_val_bpb=None)
    refused("runs/r42: no round trip")
    edit(runs / "r42/result.json", roundtrip_val_bpb=float("nan"))
    refused("runs/r42: no round trip")


def test_refuses_scores_of_another_artifact(runs):
    (runs / "r43/model.jepa").write_bytes(b"another")
    assert refused("not the artifact whose BPB").count("\n") == 0
    (runs / "r43/model.jepa").unlink()
    refused("model.jepa is missing")


def test_refuses_an_unfinished_run(runs):
    (runs / "r43/result.json").unlink()
    assert refused("runs/r43: unfinished").count("\n") == 0
    (runs / "r43/config.json").unlink()
    refused("runs/r43: unfinished")


def test_refuses_other_configurations(runs):
    edit(runs / "r43/config.json", JEPA_WEIGHT=0.0)
    assert "JEPA_WEIGHT: 1.0 -> 0.0" in refused("another configuration than runs/r42")
    edit(runs / "r43/config.json", JEPA_WEIGHT=1.0, ITERATIONS=100_000)
    refused("ITERATIONS: 3 -> 100000")
    edit(runs / "r43/config.json", ITERATIONS=3, TRAIN_LOG_EVERY=7)
    assert not tool.submission_faults(tool.Settings(**PEOPLE), compare.find_runs("runs/r*", "RUN"))


def test_refuses_the_same_seed_twice(runs):
    edit(runs / "r43/config.json", SEED=42)
    assert "runs/r42, runs/r43" in refused("2 runs have seed 42")


def test_refuses_scores_of_different_kinds(runs):
    edit(runs / "r43/result.json", sliding_val_bpb=None)
    refused("scored in different ways")


def test_says_all_faults_at_once(runs):
    edit(runs / "r42/result.json", train_seconds=601.0, eval_seconds=900.0)
    (runs / "r44/result.json").unlink()
    assert refused("AUTHOR: missing", author="", github_id="").count("\n") == 4


def test_the_folder(runs, evaluated, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("MODEL_DIM", "1024")
    report = submit(submission_name="My entry, 1st", blurb="A sentence.")
    out = Path("submissions/My-entry-1st")
    assert report["out"] == str(out) and file_names(out) == report["files"] == sorted([
        "README.md", "submission.json", "train_seed42.log", "train_seed43.log", "train_seed44.log",
        "train_jepa.py", "model.jepa", "run_jepa_byte.sh",
        *(name for name in tool.SHIPPED_BESIDE if (ROOT / name).is_file())])
    assert {"requirements.txt", "setup_jepa.sh"} <= set(report["files"])
    assert not [path for path in out.parent.iterdir() if path != out]
    facts = json.loads((out / "submission.json").read_text())
    code_bytes = len(tj.source_text().encode())
    assert facts | dict(
        author="A. Author", github_id="aauthor", name="My entry, 1st", blurb="A sentence.",
        track="10min", seeds=[42, 43, 44], steps=3, wallclock=550.0, bytes_code=code_bytes,
        bytes_total=7 * 44 + code_bytes, hardware="1 x a processor") == facts
    assert facts["val_bpb"] == pytest.approx(1.43)
    assert facts["val_bpb_std"] == pytest.approx(0.01)
    assert facts["seed_results"]["43"]["roundtrip_val_bpb"] == pytest.approx(1.45)
    assert (out / "model.jepa").read_bytes() == b"weights" * 42  # the best seed's
    assert (out / "train_jepa.py").read_text() == tj.source_text()
    assert (out / "train_seed43.log").read_bytes() == (runs / "r43/log.txt").read_bytes()
    (command, cwd, env, files), = evaluated.calls
    assert "MODE=eval" in command and "SLIDING_EVAL=1" in command
    assert f"DATA_PATH={Path('data').resolve()}" in command
    assert not cwd.exists() and out.resolve() not in cwd.parents and files == report["files"]
    assert "PYTHONPATH" not in env and "MODEL_DIM" not in env and env["PATH"]
    json.dumps(report, allow_nan=False)


def test_readme_of_the_folder(runs, evaluated):
    readme = (Path(submit()["out"]) / "README.md").read_text()
    for words in ("| 43 | 1.450000 | 1.440000 | 1.430000 | 3 | 98.0 | 550.0 | 300.0 |",
                  "| mean | 1.450000 |", "| std | 0.010000 |", "for seed in 42 43 44; do python",
                  "the first 2,000 tokens (not the whole)", "SEED=$seed RUN_ID=seed$seed \\\n",
                  "MODEL_DIM=64", "python train_jepa.py \\\n    MODE=eval ARTIFACT=model.jepa",
                  "No validation data in training", "chosen on training tokens", "One pass",
                  "the track allows 600 s for each, on 8 x H100, which these runs did not use"):
        assert words in readme, words
    assert "Traceback" not in readme and "None" not in readme
    assert all(f"`{name}`" in readme for name in file_names(submit(out="again")["out"])
               if not name.startswith(("README", "train_seed")))


def test_files_beside_the_script(runs, evaluated, tmp_path, monkeypatch):
    """Files of tools/ go along where they exist; a missing file beside the script is named."""
    repository = tmp_path / "repository"
    for name in ("run_jepa_byte.sh", *tool.SHIPPED_BESIDE):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(name)
    (repository / "setup_jepa.sh").chmod(0o755)
    monkeypatch.setattr(tool, "ROOT", repository)
    report = submit()
    assert {"tools/launch.sh", "tools/prepare_data.py"} <= set(report["files"])
    assert evaluated.calls[-1][3] == report["files"]
    assert os.access(Path(report["out"]) / "setup_jepa.sh", os.X_OK)
    assert "`tools/launch.sh`" in (Path(report["out"]) / "README.md").read_text()
    (repository / "setup_jepa.sh").unlink()
    with pytest.raises(tj.UserError, match="^setup_jepa.sh: not found beside train_jepa.py"):
        submit(out="second")
    assert not Path("second").exists()


def test_no_excuse_for_the_hardware_of_the_track(runs, evaluated):
    edit(runs / "r42/result.json", world_size=8, device="NVIDIA H100 80GB HBM3")
    assert "did not use" not in (Path(submit("runs/r42")["out"]) / "README.md").read_text()


def test_run_script_of_each_kind():
    assert tool.run_script(dict(MIXER="attention", TOKENIZER="byte")) == "run_bytejepa.sh"
    assert tool.run_script(dict(MIXER="mamba2", TOKENIZER="bpe")) == "run_jepa_bpe.sh"
    assert tool.run_script(dict(MIXER="mamba2", TOKENIZER="byte")) == "run_jepa_byte.sh"


def test_one_seed_without_sliding_or_temperature(runs, evaluated):
    edit(runs / "r42/result.json", sliding_val_bpb=None, tempered_val_bpb=None, temperature=None,
         sliding_stride=None)
    report = submit("runs/r42")
    assert report["val_bpb"] == pytest.approx(1.44) and report["val_bpb_std"] is None
    assert report["scoring"] == "round trip"
    assert {"TEMP_SCALING=0", "SLIDING_EVAL=0"} <= set(evaluated.calls[0][0])
    readme = (Path(report["out"]) / "README.md").read_text()
    assert "No temperature is applied" in readme and "| std |" not in readme


@pytest.mark.parametrize("name", CHECKED)
def test_a_mismatch_leaves_no_folder(runs, evaluated, name):
    evaluated.scores[name] += 2e-6
    assert name in refused("not submitted: the artifact of runs/r42, evaluated alone, gives")
    evaluated.scores[name] = None
    refused("None instead of")
    assert not evaluated.calls[0][1].exists()


def test_a_failing_evaluation_leaves_no_folder(runs, evaluated):
    evaluated.code = 2
    evaluated.error = "some warning\ntrain_jepa.py: model.jepa: damaged\nat exit: something\n"
    refused("ended with 2: train_jepa.py: model.jepa: damaged")
    evaluated.code, evaluated.scores = 0, "no JSON here"
    refused("did not end with scores as JSON")


def test_an_earlier_folder_is_kept_unless_overwritten(runs, evaluated):
    submit(out="sub")
    with pytest.raises(tj.UserError, match="OUT=sub: exists already"):
        submit(out="sub")
    (Path("sub") / "mine.txt").write_text("x")
    evaluated.scores["roundtrip_val_bpb"] = 9.0
    with pytest.raises(tj.UserError, match="not submitted"):
        submit(out="sub", overwrite=True)
    assert (Path("sub") / "mine.txt").exists()
    evaluated.scores["roundtrip_val_bpb"] = 1.44
    submit(out="sub", overwrite=True)
    assert not (Path("sub") / "mine.txt").exists()
    Path("home").mkdir()
    with pytest.raises(tj.UserError, match="OUT=home: exists already"):
        submit(out="home", overwrite=True)


def test_data_must_be_there_and_can_be_named(runs, evaluated):
    Path("data").rename("elsewhere")
    refused("data: no such folder")
    submit(data_path="elsewhere")
    assert f"DATA_PATH={Path('elsewhere').resolve()}" in evaluated.calls[-1][0]


def test_ranks_of_the_run_evaluate_together(runs, evaluated):
    edit(runs / "r42/result.json", world_size=2)
    assert "nproc_per_node=2" in (Path(submit("runs/r42")["out"]) / "README.md").read_text()
    assert "--nproc_per_node=2" in evaluated.calls[0][0]


def test_command_line(runs, evaluated, monkeypatch, capsys):
    """Arguments win over the environment; JSON is the last line; faults are a line each, code 2."""
    monkeypatch.setenv("AUTHOR", "Someone Else")
    monkeypatch.setenv("GITHUB_ID", "aauthor")
    monkeypatch.setenv("DATA_PATH", "elsewhere")
    arguments = ["RUN=runs/r42 runs/r43", "AUTHOR=A. Author", "DATA_PATH=data", "TRACK=UNLIMITED"]
    assert tool.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["author"], report["github_id"], report["track"], report["seeds"]) == (
        "A. Author", "aauthor", "unlimited", [42, 43])
    assert tool.main([*arguments, "OUT=b", "RUNS=x", "OVERWRITE=yes", "TRACK=5min"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("submit.py: ") for line in errors)
    assert "RUNS=x: no such argument" in errors[0] and not Path("b").exists()
    assert tool.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}=" in text for name in compare.tool_knobs(tool.Settings))
    assert "TRACK=10min" in text and "(10min, unlimited)" in text


# -- real runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_data) -> Path:
    """Folder with runs/s42 and runs/s43, trained for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    knobs = dict(RUNS_DIR=folder / "runs", DATA_PATH=demo_data.bytes, ITERATIONS=3, TEMP_SCALING=1,
                 SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=16)
    children = [launch(folder, "no_curves()", TINY, SEED=seed, RUN_ID=f"s{seed}", **knobs)
                for seed in TRAINED_SEEDS]
    for child in children:
        assert child.wait() == 0, child.text()
    return folder


@pytest.fixture
def copied(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the trained runs, in the current folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def results(folder) -> dict[int, dict]:
    return {seed: json.loads((folder / f"s{seed}/result.json").read_text())
            for seed in TRAINED_SEEDS}


def script(folder: Path, path: Path, *arguments: str) -> Child:
    """Run a Python file as `python path arguments...` in `folder`, in a child that has torch."""
    patch = (f"import runpy; os.chdir({str(folder)!r}); sys.argv = {[str(path), *arguments]!r}; "
             f"runpy.run_path({str(path)!r}, run_name='__main__')")
    return run_child(folder.parent, patch, base={})


@pytest.mark.slow
def test_real_runs_make_a_verified_submission(copied, demo_data, tmp_path, monkeypatch):
    """Submit, then score what was submitted by its own script; then a result states another BPB."""
    people = ["RUN=runs/s*", "AUTHOR=A. Author", "GITHUB_ID=aauthor", "OUT=sub"]
    done = subprocess.run([sys.executable, str(ROOT / "tools/submit.py"), *people], text=True,
                          env=plain_environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    best = min(results(copied).values(), key=lambda result: result["sliding_val_bpb"])
    alone = script(tmp_path / "sub", Path("train_jepa.py"), "MODE=eval", "ARTIFACT=model.jepa",
                   f"DATA_PATH={demo_data.bytes}", "VAL_MAX_TOKENS=2000", "DEVICE=cpu",
                   "SLIDING_EVAL=1", "SLIDING_EVAL_STRIDE=16", "VAL_BATCH_SIZE=128", "SEED=7")
    assert alone.code == 0, alone.text()
    scores = json.loads(alone.text().splitlines()[-1])
    for name in CHECKED:
        assert abs(scores[name] - best[name]) < 1e-6
        assert abs(report["verified"][name] - best[name]) < 1e-6
    # Same artifact, another stated BPB: only scoring the artifact can tell.
    edit(copied / f"s{best['seed']}/result.json", sliding_val_bpb=best["sliding_val_bpb"] - 1e-4)
    monkeypatch.setattr(tool, "evaluate_copy", lambda *_: report["verified"])
    with pytest.raises(tj.UserError, match="evaluated alone, gives sliding_val_bpb"):
        submit("runs/s*", out="second")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"runs", "sub"}


@pytest.mark.slow
def test_real_runs_are_compared(copied, tmp_path):
    done = script(tmp_path, ROOT / "tools/compare.py", "RUNS=runs/s*")
    assert done.code == 0, done.text()
    report = json.loads(done.text().splitlines()[-1])
    group, = report["groups"]
    scores = [result["sliding_val_bpb"] for result in results(copied).values()]
    assert group["seeds"] == list(TRAINED_SEEDS) and not report["unfinished"]
    assert group["sliding_val_bpb"]["mean"] == pytest.approx(sum(scores) / 2, rel=1e-12)
    assert (tmp_path / "compare/compare.md").exists()
