"""Submission: every refusal, what the folder holds, nothing half-written; slow: three real runs end to end."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_jepa as tj

ROOT = Path(__file__).resolve().parents[1]
KNOBS = dict(tokenizer="byte", model_dim=64, num_layers=2, expand=1, d_state=16, train_seq_len=64,
             train_batch_tokens=512, micro_batches=2, iterations=3, compile_mode="off", warmup_steps=1,
             val_max_tokens=2000, val_batch_size=1024, sliding_eval=True, sliding_eval_stride=32, diagnostics=False,
             device="cpu")
AUTHOR = dict(author="A. Author", github_id="aauthor")


def edit(path, **values):
    """Change keys of a JSON file; a value of None takes the key out."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three finished run folders as training leaves them, without having trained; the seed is in the scores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    source = tj.source_text()
    digest = hashlib.sha256(source.encode()).hexdigest()
    for seed in (42, 43, 44):
        folder = tmp_path / f"runs/r{seed}"
        folder.mkdir(parents=True)
        c = tj.Config(seed=seed, run_id=folder.name, data_path="data", **KNOBS)
        (folder / "config.json").write_text(json.dumps(c.named()))
        (folder / "log.txt").write_text(f"{source}\nscript: {len(source.encode())} bytes, sha256 {digest}\ndone\n")
        (folder / "model.jepa").write_bytes(b"weights" * seed)
        scores = {f"{kind}_val_{name}": 1.0 + seed / 100 + shift for shift, kind in
                  ((0.02, "roundtrip"), (0.01, "tempered"), (0.0, "sliding")) for name in ("bpb", "loss")}
        (folder / "result.json").write_text(json.dumps(scores | dict(
            run_id=folder.name, steps=3, train_seconds=550.0, ms_per_step=98.0, eval_seconds=300.0, temperature=0.9,
            sliding_stride=32, artifact_bytes=7 * seed, seed=seed, world_size=1, device="a processor",
            eval_params=96_262, train_only_params=24_768, machine=dict(device_type="cpu"), script_sha256=digest,
            artifact_sha256=hashlib.sha256(b"weights" * seed).hexdigest())))
    return tmp_path / "runs"


@pytest.fixture
def evaluated(monkeypatch):
    """Stands for the process that evaluates the copy: notes how it was called, answers with the scores in `.says`."""
    class Evaluated:
        calls, says, code, error = [], None, 0, ""

        def run(self, command, cwd, env, **_):
            self.calls.append((command, Path(cwd), env, sorted(path.name for path in Path(cwd).iterdir())))
            said = self.says if isinstance(self.says, str) else json.dumps(self.says)
            return subprocess.CompletedProcess(command, self.code, f"roundtrip val_loss:1\n{said}\n", self.error)

    stub = Evaluated()
    stub.calls = []
    stub.says = {f"{kind}_val_bpb": 1.42 + shift for kind, shift in
                 (("roundtrip", 0.02), ("tempered", 0.01), ("sliding", 4e-7))} | dict(temperature=0.9)
    monkeypatch.setattr(tj.subprocess, "run", stub.run)
    return stub


def submit(run="runs/r*", **knobs):
    return tj.submit(tj.Config(run=run, **AUTHOR | knobs))


def refused(text, run="runs/r*", **knobs):
    """Submitting must fail with `text` in one of its lines, and leave nothing behind."""
    with pytest.raises(tj.UserError) as caught:
        submit(run, **knobs)
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
    big = runs / "r43/model.jepa"
    big.write_bytes(b"")
    os.truncate(big, 16_000_001 - len(tj.source_text().encode()))
    edit(runs / "r43/result.json", artifact_sha256=tj.file_hash(big))
    line = refused("16,000,001 bytes")
    assert line.count("\n") == 0 and "16,000,000 allowed" in line
    os.truncate(big, 16_000_000 - len(tj.source_text().encode()))
    edit(runs / "r43/result.json", artifact_sha256=tj.file_hash(big))
    assert not list(tj.run_faults(tj.read_run(runs / "r43"), "10min"))


@pytest.mark.parametrize("name,what", [("train_seconds", "training"), ("eval_seconds", "evaluation")])
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
    monkeypatch.setattr(tj, "source_text", lambda: changed)
    assert refused("runs/r44: the script changed").count("the script changed") == 3


def test_log_of_a_run_begun_twice(runs, evaluated):
    log = (runs / "r42/log.txt").read_text()
    (runs / "r42/log.txt").write_text("an older script\nscript: 15 bytes, sha256 " + "0" * 64 + "\nstep:1\n" + log)
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
    assert not tj.submission_faults(tj.Config(**AUTHOR), tj.find_runs("runs/r*", "RUN"))


def test_refuses_the_same_seed_twice(runs):
    edit(runs / "r43/config.json", SEED=42)
    assert "runs/r42, runs/r43" in refused("seed 42 stands there 2 times")


def test_refuses_scores_of_different_kinds(runs):
    edit(runs / "r43/result.json", sliding_val_bpb=None)
    refused("scored in different ways")


def test_says_all_faults_at_once(runs):
    edit(runs / "r42/result.json", train_seconds=601.0, eval_seconds=900.0)
    (runs / "r44/result.json").unlink()
    assert refused("AUTHOR: missing", author="", github_id="").count("\n") == 4


def test_the_folder(runs, evaluated, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("MODEL_DIM", "1024")
    report = submit(submission_name="My entry, 1st", blurb="A sentence.")
    out = Path("submissions/My-entry-1st")
    assert report["out"] == str(out) and sorted(path.name for path in out.iterdir()) == report["files"] == sorted([
        "README.md", "submission.json", "train_seed42.log", "train_seed43.log", "train_seed44.log", "train_jepa.py",
        "requirements.txt", "run_jepa_byte.sh", "setup_jepa.sh", "model.jepa"])
    assert not [path for path in out.parent.iterdir() if path != out]
    facts = json.loads((out / "submission.json").read_text())
    code = len(tj.source_text().encode())
    assert facts | dict(author="A. Author", github_id="aauthor", name="My entry, 1st", blurb="A sentence.",
                        track="10min", seeds=[42, 43, 44], steps=3, wallclock=550.0, bytes_code=code,
                        bytes_total=7 * 44 + code, hardware="1 x a processor") == facts
    assert facts["val_bpb"] == pytest.approx(1.43) and facts["val_bpb_std"] == pytest.approx(0.01)
    assert facts["seed_results"]["43"]["roundtrip_val_bpb"] == pytest.approx(1.45)
    assert (out / "model.jepa").read_bytes() == b"weights" * 42  # the best seed's
    assert (out / "train_jepa.py").read_text() == tj.source_text()
    assert (out / "train_seed43.log").read_bytes() == (runs / "r43/log.txt").read_bytes()
    readme = (out / "README.md").read_text()
    for words in ("| 43 | 1.450000 | 1.440000 | 1.430000 | 3 | 98.0 | 550.0 | 300.0 |", "| mean | 1.450000 |",
                  "| std | 0.010000 |", "the first 2,000 tokens (not the whole)", "for seed in 42 43 44; do python",
                  "MODEL_DIM=64", "No validation data in training", "chosen on training tokens", "One pass",
                  "the track allows 600 s for each, on 8 x H100, which these runs did not use"):
        assert words in readme, words
    (command, cwd, env, files), = evaluated.calls
    assert "MODE=eval" in command and f"DATA_PATH={Path('data').resolve()}" in command and "SLIDING_EVAL=1" in command
    assert not cwd.exists() and out.resolve() not in cwd.parents and files == report["files"]
    assert "PYTHONPATH" not in env and "MODEL_DIM" not in env and env["PATH"]
    json.dumps(report, allow_nan=False)


def test_no_excuse_for_the_hardware_of_the_track(runs, evaluated):
    edit(runs / "r42/result.json", world_size=8, device="NVIDIA H100 80GB HBM3")
    assert "did not use" not in (Path(submit("runs/r42")["out"]) / "README.md").read_text()


def test_run_script_of_each_kind():
    assert tj.run_script(dict(MIXER="attention", TOKENIZER="byte")) == "run_bytejepa.sh"
    assert tj.run_script(dict(MIXER="mamba2", TOKENIZER="bpe")) == "run_jepa_bpe.sh"
    assert tj.run_script(dict(MIXER="mamba2", TOKENIZER="byte")) == "run_jepa_byte.sh"


def test_one_seed_without_sliding_or_temperature(runs, evaluated):
    edit(runs / "r42/result.json", sliding_val_bpb=None, tempered_val_bpb=None, temperature=None, sliding_stride=None)
    report = submit("runs/r42")
    assert report["val_bpb"] == pytest.approx(1.44) and report["val_bpb_std"] is None
    assert report["scoring"] == "round trip"
    assert {"TEMP_SCALING=0", "SLIDING_EVAL=0"} <= set(evaluated.calls[0][0])
    readme = (Path(report["out"]) / "README.md").read_text()
    assert "No temperature is applied" in readme and "| std |" not in readme


@pytest.mark.parametrize("name", ["roundtrip_val_bpb", "tempered_val_bpb", "sliding_val_bpb", "temperature"])
def test_a_mismatch_leaves_no_folder(runs, evaluated, name):
    evaluated.says[name] += 2e-6
    assert name in refused("not submitted: the artifact of runs/r42, evaluated alone, gives")
    evaluated.says[name] = None
    refused("None instead of")
    assert not evaluated.calls[0][1].exists()


def test_a_failing_evaluation_leaves_no_folder(runs, evaluated):
    evaluated.code, evaluated.error = 2, "some warning\ntrain_jepa.py: model.jepa: damaged\nat exit: something\n"
    refused("ended with 2: train_jepa.py: model.jepa: damaged")
    evaluated.code, evaluated.says = 0, "no JSON here"
    refused("did not end with scores as JSON")


def test_an_earlier_folder_is_kept_unless_overwritten(runs, evaluated):
    submit(out="sub")
    with pytest.raises(tj.UserError, match="OUT=sub: exists already"):
        submit(out="sub")
    (Path("sub") / "mine.txt").write_text("x")
    evaluated.says["roundtrip_val_bpb"] = 9.0
    with pytest.raises(tj.UserError, match="not submitted"):
        submit(out="sub", overwrite=True)
    assert (Path("sub") / "mine.txt").exists()
    evaluated.says["roundtrip_val_bpb"] = 1.44
    submit(out="sub", overwrite=True)
    assert not (Path("sub") / "mine.txt").exists()
    Path("home").mkdir()
    with pytest.raises(tj.UserError, match="OUT=home: exists already"):
        submit(out="home", overwrite=True)


def test_data_must_be_there_and_can_be_named(runs, evaluated):
    Path("data").rename("elsewhere")
    refused("data: no such folder")
    tj.submit(tj.Config.from_env({}, ["MODE=submit", "RUN=runs/r*", "AUTHOR=A", "GITHUB_ID=a", "DATA_PATH=elsewhere"]))
    assert f"DATA_PATH={Path('elsewhere').resolve()}" in evaluated.calls[-1][0]


def test_ranks_of_the_run_evaluate_together(runs, evaluated):
    edit(runs / "r42/result.json", world_size=2)
    assert "nproc_per_node=2" in (Path(submit("runs/r42")["out"]) / "README.md").read_text()
    assert "--nproc_per_node=2" in evaluated.calls[0][0]


def test_other_ranks_do_nothing(runs, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert tj.run_mode(tj.Config(mode="submit")) is None and not Path("submissions").exists()


@pytest.mark.slow
def test_three_real_runs_make_a_verified_submission(tmp_path, demo_data):
    """Train, submit, evaluate what was submitted once more by hand; then a result states a BPB that is not its own."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"OMP_NUM_THREADS": "1"}

    def call(*arguments, cwd=tmp_path, script=ROOT / "train_jepa.py"):
        return subprocess.run([sys.executable, str(script), *arguments], cwd=cwd, env=environment, text=True,
                              capture_output=True)

    knobs = [f"{name.upper()}={tj.format_knob(value)}" for name, value in KNOBS.items()]
    for seed in (42, 43, 44):
        done = call(*knobs, f"DATA_PATH={demo_data.bytes}", f"SEED={seed}", f"RUN_ID=s{seed}")
        assert done.returncode == 0, done.stderr
    people = ["MODE=submit", "RUN=runs/s*", "AUTHOR=A. Author", "GITHUB_ID=aauthor"]
    done = call(*people, "OUT=sub")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    best = min((json.loads((tmp_path / f"runs/s{seed}/result.json").read_text()) for seed in (42, 43, 44)),
               key=lambda result: result["sliding_val_bpb"])
    alone = call("MODE=eval", "ARTIFACT=model.jepa", f"DATA_PATH={demo_data.bytes}", "VAL_MAX_TOKENS=2000",
                 "DEVICE=cpu", "SLIDING_EVAL=1", "SLIDING_EVAL_STRIDE=32", "VAL_BATCH_SIZE=128", "SEED=7",
                 cwd=tmp_path / "sub", script="train_jepa.py")
    assert alone.returncode == 0, alone.stderr
    scores = json.loads(alone.stdout.splitlines()[-1])
    for name in ("roundtrip_val_bpb", "tempered_val_bpb", "sliding_val_bpb", "temperature"):
        assert abs(scores[name] - best[name]) < 1e-6 and abs(report["verified"][name] - best[name]) < 1e-6
    # Same artifact, another stated BPB: only evaluating it alone can tell.
    edit(tmp_path / f"runs/s{best['seed']}/result.json", sliding_val_bpb=best["sliding_val_bpb"] - 1e-4)
    done = call(*people, "OUT=second")
    assert done.returncode == 2 and "evaluated alone, gives sliding_val_bpb" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "sub"]
