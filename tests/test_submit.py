"""tools/submit.py: refusals, contents of the folder, nothing half-written; slow: real runs."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import submit as tool
from compare import read_run
from harness import TINY, Child, launch, plain_environment, run_ranks
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
# train_jepa.py must say its source when it runs inside the self-extracting script.


def edit(path, **values):
    """Change keys of a JSON file; a value of None takes the key out."""
    old = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in old.items() if value is not None}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three finished run folders as training leaves them, untrained; the seed is in the scores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"data/fineweb_{split}_000000.bin").touch()
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
def checked(monkeypatch):
    """Stands for the commands of README: notes its calls; the last one prints `.scores`.

    Calls: (command, folder, files there). `.codes`: exit codes of the three commands."""
    class Checked:
        def __init__(self):
            self.calls, self.codes, self.error, self.trains = [], [0, 0, 0], "", True
            self.scores = dict(roundtrip_val_bpb=1.44, tempered_val_bpb=1.43,
                               sliding_val_bpb=1.42 + 4e-7, temperature=0.9)

        def run(self, command, folder, label):
            number = len(self.calls) % 3
            self.calls.append((command, folder, file_names(folder)))
            if "SEED=" in command and self.trains:
                run = folder / "runs" / re.search(r"RUN_ID=(\S+)", command)[1]
                run.mkdir(parents=True)
                (run / "result.json").write_text('{"roundtrip_val_bpb": 3.0}')
            text = self.scores if isinstance(self.scores, str) else json.dumps(self.scores)
            return self.codes[number], f"roundtrip val_loss:1\n{self.error}\n{text}\n"

        commands = property(lambda self: [call[0] for call in self.calls])

    process = Checked()
    monkeypatch.setattr(tool, "run_command", process.run)
    monkeypatch.setattr(tool, "check_vocabulary", lambda run: None)
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
    assert not Path("submissions").exists() and not list(Path().glob(".*"))
    return str(caught.value)


# -- the self-extracting script ------------------------------------------------------------------

PROBE = '''"""A docstring with "quotes", \\\\backslashes and ümläuts."""
from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path


class Probe:
    def method(self):
        return SOURCE


def fail():
    raise KeyError("failed")


if __name__ == "__main__":
    print(json.dumps(dict(doc=__doc__, file=__file__, arguments=sys.argv, source=SOURCE,
                          function=inspect.getsource(fail), cls=inspect.getsource(Probe),
                          files=[path.name for path in Path(__file__).parent.iterdir()])))
    fail()
'''


def test_shipped_script_runs_as_its_source_would(tmp_path):
    """Same name, file, arguments, docstring; inspect shows the source, tracebacks its lines."""
    path = tmp_path / "train_gpt.py"
    path.write_bytes(tool.shipped_script(PROBE))
    done = subprocess.run([sys.executable, str(path), "A=1", "B=2"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["doc"] == 'A docstring with "quotes", \\backslashes and ümläuts.'
    assert found["file"] == str(path) and found["arguments"] == [str(path), "A=1", "B=2"]
    assert found["source"] == PROBE and found["files"] == ["train_gpt.py"]
    assert found["function"] == 'def fail():\n    raise KeyError("failed")\n'
    assert found["cls"].startswith("class Probe:\n    def method")
    assert done.returncode == 1 and f'File "{path}", line 16, in fail' in done.stderr


def test_shipped_script_of_the_trainer():
    """Plain ASCII, a third of the source, the same bytes each time; --source gives it back."""
    source = tj.source_text()
    shipped = tool.shipped_script(source)
    assert shipped.isascii() and len(shipped) < 0.36 * len(source.encode())
    assert shipped == tj.shipped_script.__wrapped__(source) and b"\r" not in shipped
    done = subprocess.run([sys.executable, "-", "--source"], input=shipped, capture_output=True)
    assert done.stdout.decode() == source and not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer_trains_the_same_when_it_is_shipped(tmp_path, ranks):
    """python and torchrun: the artifact of the plain file bit for bit, log and hash of the source,
    and no file but the run's."""
    source, folder, knobs = tj.source_text(), tmp_path / "shipped", TINY | dict(ITERATIONS=2)
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(tool.shipped_script(source))
    places = dict(RUNS_DIR="runs", RUN_ID="r")
    arguments = [f"{name}={value}" for name, value in (knobs | places).items()]
    if ranks == 1:
        children = [run_child(tmp_path, base=knobs, timeout=400),
                    script(folder, folder / "train_gpt.py", *arguments)]
    else:
        children = run_ranks(tmp_path, ranks, base=knobs, timeout=400)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={ranks}", "train_gpt.py", *arguments]
        done = subprocess.run(command, cwd=folder, env=plain_environment(), capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert [child.code for child in children] == [0, 0], children[-1].text()
    log, result = (folder / "runs/r/log.txt").read_bytes(), read_run(folder / "runs/r").result
    stated, text = tool.logged_script(log)
    assert text.decode() == source and log.startswith(text)
    assert stated == result["script_sha256"] == hashlib.sha256(text).hexdigest()
    assert result["artifact_sha256"] == read_run(tmp_path / "r").result["artifact_sha256"]
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py", "runs"}


# -- refusals ------------------------------------------------------------------------------------

def test_refuses_without_author(runs):
    assert refused("AUTHOR: missing", author="").count("\n") == 0
    refused("GITHUB_ID: missing", github_id=" ")


def test_refuses_runs_that_are_not_there(runs):
    refused("RUN=runs/z*: no such folder", run="runs/r42 runs/z*")
    refused("RUN=: no such folder", run="")


def test_refuses_too_many_bytes(runs):
    big, code_bytes = runs / "r43/model.jepa", len(tool.shipped_script(tj.source_text()))
    big.write_bytes(b"")
    os.truncate(big, 16_000_001 - code_bytes)
    edit(runs / "r43/result.json", artifact_sha256=tj.file_hash(big))
    line = refused("16,000,001 bytes")
    assert line.count("\n") == 0 and "16,000,000 allowed" in line
    os.truncate(big, 16_000_000 - code_bytes)
    edit(runs / "r43/result.json", artifact_sha256=tj.file_hash(big))
    assert not list(tool.run_faults(read_run(runs / "r43"), "10min"))


@pytest.mark.parametrize("name,what", [
    ("train_seconds", "training"), ("eval_seconds", "evaluation")])
def test_refuses_more_than_ten_minutes_on_that_track(runs, checked, name, what):
    edit(runs / "r44/result.json", **{name: 600.5})
    assert refused(f"{what} took 600.50 s").count("\n") == 0
    assert submit(track="unlimited")["track"] == "non_record_16mb"
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


def test_log_of_a_run_begun_twice(runs, checked):
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


def test_the_folder(runs, checked):
    report = submit(submission_name="My entry, 1st", blurb="A sentence.")
    out = Path(f"submissions/records/track_10min_16mb/{report['date']}_My-entry-1st")
    assert report["out"] == str(out) and file_names(out) == report["files"] == sorted([
        "README.md", "submission.json", "train_seed42.log", "train_seed43.log", "train_seed44.log",
        "train_gpt.py", "model.jepa", "run_jepa_byte.sh", *tool.SHIPPED_BESIDE])
    assert {path.name for path in Path().iterdir()} == {"runs", "data", "submissions"}
    facts = json.loads((out / "submission.json").read_text())
    code_bytes = len(tool.shipped_script(tj.source_text()))
    assert facts | dict(
        author="A. Author", github_id="aauthor", name="My entry, 1st", blurb="A sentence.",
        track="10min_16mb", seeds=[42, 43, 44], steps=3, wallclock=550.0, bytes_code=code_bytes,
        bytes_total=7 * 44 + code_bytes, hardware="1 x a processor") == facts
    assert facts["val_bpb"] == facts["val_loss"] == pytest.approx(1.43)
    assert facts["val_bpb_std"] == pytest.approx(0.01)
    assert facts["seed_results"]["43"]["roundtrip_val_bpb"] == pytest.approx(1.45)
    assert (out / "model.jepa").read_bytes() == b"weights" * 42  # the best seed's
    assert (out / "train_gpt.py").read_bytes() == tool.shipped_script(tj.source_text())
    assert (out / "train_seed43.log").read_bytes() == (runs / "r43/log.txt").read_bytes()
    json.dumps(report, allow_nan=False)


def test_the_check_runs_the_commands_of_readme(runs, checked):
    report = submit()
    readme = (Path(report["out"]) / "README.md").read_text()
    set_up, training, evaluation = tool.readme_commands(readme)
    assert checked.commands == [set_up, training, evaluation]  # three steps: none to cut
    assert set_up == "bash setup_jepa.sh env"
    for _, folder, files in checked.calls:
        assert not folder.exists() and Path(report["out"]).resolve() not in folder.parents
        assert {*report["files"], "data/datasets/data/fineweb_val_000000.bin"} <= {*files}
    assert "MODE=eval ARTIFACT=model.jepa" in evaluation and "SLIDING_EVAL=1" in evaluation
    for command in (training, evaluation):
        assert command.startswith("bash run_jepa_byte.sh \\\n")
        assert "DATA_PATH=data/datasets/data" in command


def test_the_training_of_the_check_is_cut_by_iterations_only():
    assert tool.shortened("bash a.sh \\\n    B=1") == "bash a.sh \\\n    B=1 ITERATIONS=10"
    assert tool.shortened("ITERATIONS=500 B=1") == "ITERATIONS=10 B=1"
    assert tool.shortened("WARMDOWN_ITERS=9 ITERATIONS=7") == "WARMDOWN_ITERS=9 ITERATIONS=7"


def test_readme_of_the_folder(runs, checked):
    readme = (Path(submit()["out"]) / "README.md").read_text()
    for words in ("| 43 | 1.450000 | 1.440000 | 1.430000 | 3 | 98.0 | 550.0 | 300.0 |",
                  "| mean | 1.450000 |", "| std | 0.010000 |", "SEED=42 RUN_ID=seed42",
                  "`SEED=43 RUN_ID=seed43`, `SEED=44 RUN_ID=seed44`",
                  "the first 2,000 tokens (not the whole)", "MODEL_DIM=64",
                  "No validation data in training", "chosen on training tokens", "One pass",
                  "`python train_gpt.py --source` prints the source", "records/track_10min_16mb/",
                  "the track allows 600 s for each, on 8 x H100, which these runs did not use"):
        assert words in readme, words
    assert "Traceback" not in readme and "None" not in readme and "$" not in readme
    assert all(f"`{name}`" in readme for name in file_names(submit(out="again")["out"])
               if not name.startswith(("README", "train_seed")))


@pytest.mark.parametrize("data, tokenizer, command, files", [
    ("demo_sp8192", "bpe", "bash setup_jepa.sh demo", "data/demo/alice_valid.txt"),
    ("fineweb10B_sp8192", "bpe",
     "FINEWEB_KINDS=sp8192 TRAIN_SHARDS=2 bash setup_jepa.sh fineweb", ""),
    ("fineweb10B_sp1024_bytes", "byte", "bash setup_jepa.sh env", ""),
    ("own_sp8192", "bpe", "bash setup_jepa.sh env", "data/tokenizers/own.model")])
def test_data_in_the_folder(runs, checked, data, tokenizer, command, files):
    """Set-up makes demo and FineWeb data; without a network the run's data stands in for it."""
    for seed in SEEDS:
        edit(runs / f"r{seed}/config.json", DATA_PATH=f"data/{data}", TOKENIZER=tokenizer,
             TOKENIZER_PATH="own.model", VOCAB_SIZE=8192 if tokenizer == "bpe" else 256)
    Path("own.model").write_bytes(b"model")
    shutil.rmtree("data") if data in tool.DEMO_DATA else shutil.copytree("data", f"data/{data}")
    if "TRAIN_SHARDS" in command:
        Path(f"data/{data}/fineweb_train_000001.bin").touch()
        checked.codes = [3, 0, 0]
    report = submit()
    assert checked.commands[0] == command and not files or files in report["files"]
    linked = {name for name in checked.calls[0][2] if name.startswith("data/") and name != files}
    if data in tool.DEMO_DATA:
        assert all(name.startswith("data/demo/") for name in linked)
    else:
        assert f"data/datasets/{data}/fineweb_val_000000.bin" in linked
        assert ("data/tokenizers/own.model" in linked) == (data == "fineweb10B_sp8192")
        assert not any("datasets" in name for name in report["files"])
    model = "TOKENIZER_PATH=data/tokenizers/own.model"
    assert all((model in line) == (tokenizer == "bpe") for line in checked.commands[1:])
    checked.codes = [1, 0, 0]
    with pytest.raises(tj.UserError, match="README's command for the set-up.*ended with 1"):
        submit(out="second")


@pytest.mark.parametrize("name", ["run_jepa_bpe.sh", "run_jepa_byte.sh", "run_bytejepa.sh"])
@pytest.mark.parametrize("preset", ["published", "best"])
def test_arguments_give_the_values_of_the_run(name, preset):
    """What differs from the run script's defaults, and no more; defaults that depend on arguments
    are followed."""
    given = dict(PROFILE="cpu", DATA_PATH="x", PRESET=preset)
    settings = tool.script_settings(ROOT / name, tuple(map("=".join, given.items())))
    values = {knob: tj.parse_knob(knob, tj.Config.knobs()[knob], text)
              for knob, text in settings.items() if knob not in ("DATA_PATH", "TOKENIZER_PATH")}
    assert tool.script_arguments(name, given, values) == given
    other = values | dict(MODEL_DIM=96, JEPA_ANNEAL=0.5, CE_PURE_FRAC=0.7, SWA_START=0.8)
    assert tool.script_arguments(name, given, other) == given | dict(
        MODEL_DIM="96", JEPA_ANNEAL="0.5", CE_PURE_FRAC="0.7", SWA_START="0.8")


def test_files_beside_the_script(runs, checked, tmp_path, monkeypatch):
    """Modes of files are kept, launch.sh starts train_gpt.py, a missing file is named."""
    repository = tmp_path / "repository"
    for name in ("run_jepa_byte.sh", *tool.SHIPPED_BESIDE):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    (repository / "setup_jepa.sh").chmod(0o755)
    monkeypatch.setattr(tool, "ROOT", repository)
    out = Path(submit()["out"])
    assert os.access(out / "setup_jepa.sh", os.X_OK)
    assert ': "${TRAIN_SCRIPT:=train_gpt.py}"' in (out / "tools/launch.sh").read_text()
    (repository / "tools/launch.sh").write_text("something else\n")
    with pytest.raises(tj.UserError, match="^(run_jepa_byte.sh|tools/launch.sh): "):
        submit(out="second")
    (repository / "setup_jepa.sh").unlink()
    with pytest.raises(tj.UserError, match="^setup_jepa.sh: not found in"):
        submit(out="second")
    assert not Path("second").exists()


def test_no_excuse_for_the_hardware_of_the_track(runs, checked):
    edit(runs / "r42/result.json", world_size=8, device="NVIDIA H100 80GB HBM3")
    assert "did not use" not in (Path(submit("runs/r42")["out"]) / "README.md").read_text()


def test_run_script_of_each_kind():
    assert tool.run_script(dict(MIXER="attention", TOKENIZER="byte")) == "run_bytejepa.sh"
    assert tool.run_script(dict(MIXER="mamba2", TOKENIZER="bpe")) == "run_jepa_bpe.sh"
    assert tool.run_script(dict(MIXER="mamba2", TOKENIZER="byte")) == "run_jepa_byte.sh"


def test_one_seed_without_sliding_or_temperature(runs, checked):
    edit(runs / "r42/result.json", sliding_val_bpb=None, tempered_val_bpb=None, temperature=None,
         sliding_stride=None)
    report = submit("runs/r42")
    assert report["val_bpb"] == pytest.approx(1.44) and report["val_bpb_std"] is None
    assert report["scoring"] == "round trip"
    assert {"TEMP_SCALING=0", "SLIDING_EVAL=0"} <= set(checked.commands[2].split())
    readme = (Path(report["out"]) / "README.md").read_text()
    assert "No temperature is applied" in readme and "| std |" not in readme


@pytest.mark.parametrize("name", CHECKED)
def test_a_mismatch_leaves_no_folder(runs, checked, name):
    checked.scores[name] += 2e-6
    assert name in refused("not submitted: the artifact of runs/r42, evaluated alone, gives")
    checked.scores[name] = None
    refused("None instead of")
    assert not checked.calls[0][1].exists()


@pytest.mark.parametrize("number, name", [(0, "set-up"), (1, "training"), (2, "evaluation")])
def test_a_failing_command_leaves_no_folder(runs, checked, number, name):
    checked.codes[number] = 2
    checked.error = "a warning\ntrain_jepa.py: model.jepa: damaged\nat exit: something"
    refused(f"command for the {name}, run in a copy of the folder, ended with 2: train_jepa.py: "
            "model.jepa: damaged")


def test_training_without_result_and_evaluation_without_scores(runs, checked):
    checked.scores = "no JSON here"
    refused("did not end with scores as JSON")
    checked.trains = False
    refused("left no score in runs/seed42")


def test_commands_of_the_check_know_nothing_of_this_environment(tmp_path, monkeypatch, capsys):
    """Interpreter and PATH only; a line at least every PROGRESS_SECONDS; both outputs returned."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("MODEL_DIM", "1024")
    monkeypatch.setattr(tool, "PROGRESS_SECONDS", 0.1)
    folder = tmp_path / "copy"
    folder.mkdir()
    command = "env; pwd; echo step:4 >&2; sleep 0.3; exit 5"
    code, output = tool.run_command(command, folder, "check 2 of 3, training")
    assert code == 5 and f"PYTHON={sys.executable}\n" in output and "SKIP_VENV=1\n" in output
    assert f"\n{folder}\n" in output and "MODEL_DIM" not in output and "PYTHONPATH" not in output
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch("submit.py: check 2 of 3, training: 0 s: step:4", lines[0])
    assert lines[-1].endswith("ended with 5") and len(lines) >= 3
    assert file_names(folder) == []


def test_an_earlier_folder_is_kept_unless_overwritten(runs, checked):
    submit(out="sub")
    with pytest.raises(tj.UserError, match="OUT=sub: exists already"):
        submit(out="sub")
    (Path("sub") / "mine.txt").write_text("x")
    checked.scores["roundtrip_val_bpb"] = 9.0
    with pytest.raises(tj.UserError, match="not submitted"):
        submit(out="sub", overwrite=True)
    assert (Path("sub") / "mine.txt").exists()
    checked.scores["roundtrip_val_bpb"] = 1.44
    submit(out="sub", overwrite=True)
    assert not (Path("sub") / "mine.txt").exists()
    Path("home").mkdir()
    with pytest.raises(tj.UserError, match="OUT=home: exists already"):
        submit(out="home", overwrite=True)


def test_data_must_be_there_and_can_be_named(runs, checked):
    Path("data").rename("elsewhere")
    refused("data: no such folder")
    submit(data_path="elsewhere")
    assert "data/datasets/data/fineweb_val_000000.bin" in checked.calls[-1][2]


def test_ranks_of_the_run_train_and_evaluate_together(runs, checked):
    edit(runs / "r42/result.json", world_size=2)
    submit("runs/r42")
    assert all("NPROC_PER_NODE=2" in command for command in checked.commands[1:])


def test_command_line(runs, checked, monkeypatch, capsys):
    """Arguments win over the environment; JSON is the last line; faults are a line each, code 2."""
    monkeypatch.setenv("AUTHOR", "Someone Else")
    monkeypatch.setenv("GITHUB_ID", "aauthor")
    monkeypatch.setenv("DATA_PATH", "elsewhere")
    arguments = ["RUN=runs/r42 runs/r43", "AUTHOR=A. Author", "DATA_PATH=data", "TRACK=UNLIMITED"]
    assert tool.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["author"], report["github_id"], report["track"], report["seeds"]) == (
        "A. Author", "aauthor", "non_record_16mb", [42, 43])
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
        assert child.wait(400) == 0, child.text()
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
    return run_child(folder.parent, patch, base={}, timeout=400)


@pytest.mark.slow
def test_real_runs_make_a_submission_that_reproduces_itself(copied, tmp_path):
    """README's commands in an empty folder: set-up, training, the scores of the artifact; then
    with a result that states another BPB."""
    people = ["RUN=runs/s*", "AUTHOR=A. Author", "GITHUB_ID=aauthor", "OUT=sub"]
    command = [sys.executable, str(ROOT / "tools/submit.py"), *people]
    done = subprocess.run(command, text=True, env=plain_environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    best = min(results(copied).values(), key=lambda result: result["sliding_val_bpb"])
    assert all(abs(report["verified"][name] - best[name]) < 1e-6 for name in CHECKED)
    largest = max(result["artifact_bytes"] for result in results(copied).values())
    assert report["bytes_total"] == largest + (tmp_path / "sub/train_gpt.py").stat().st_size
    assert [re.sub(" [0-9]+ s,", "", line) for line in done.stderr.splitlines()
            if "ended with" in line] == [f"submit.py: check {number} of 3, {name}: ended with 0"
                                         for number, name in enumerate(
                                             ("set-up", "training", "evaluation"), 1)]
    # Same artifact, another stated BPB: only scoring the artifact can tell.
    edit(copied / f"s{best['seed']}/result.json", sliding_val_bpb=best["sliding_val_bpb"] - 1e-4)
    best_run = read_run(copied / f"s{best['seed']}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "run_readme", lambda *_: report["verified"])
        with pytest.raises(tj.UserError, match="evaluated alone, gives sliding_val_bpb"):
            tool.verify_copy(tmp_path / "sub", best_run, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"runs", "sub"}


@pytest.mark.slow
def test_a_forged_vocabulary_is_refused(copied):
    """An artifact that claims more bytes for its tokens would score any BPB."""
    path = copied / "s42/model.jepa"
    tool.check_vocabulary(read_run(copied / "s42"))
    header, tensors, grids = tj.read_artifact(path)
    vocabulary = tj.Vocabulary.unpack(header["vocabulary"], 256)
    header["vocabulary"] = tj.Vocabulary(
        vocabulary.base_bytes * 9, *list(vars(vocabulary).values())[1:]).pack()
    tj.write_artifact(path, header, {name: (tensors[name], grids[name]) for name in tensors})
    edit(copied / "s42/result.json", artifact_sha256=tj.file_hash(path))
    with pytest.raises(tj.UserError, match="runs/s42: model.jepa counts the bytes of tokens"):
        submit("runs/s42")


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
