"""run_*.sh: profiles, published values, what the user sets wins, ranks, set-up when it is needed, exit code."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["run_jepa_bpe.sh", "run_jepa_byte.sh", "run_bytejepa.sh"]
DEMO = {"run_jepa_bpe.sh": "demo_sp8192", "run_jepa_byte.sh": "demo_bytes", "run_bytejepa.sh": "demo_bytes"}
FINEWEB = {"run_jepa_bpe.sh": "fineweb10B_sp8192", "run_jepa_byte.sh": "fineweb10B_bytes",
           "run_bytejepa.sh": "fineweb10B_bytes"}

# Stands for Python: answers the count of GPUs, writes down how the trainer is started, runs anything else.
STUB = r'''#!/usr/bin/env bash
if [[ "$1" == -c && "$2" == *device_count* ]]; then
    [[ -n "$FAKE_BROKEN" ]] && exit 1
    echo "${FAKE_GPUS:-0}"
elif [[ "$*" == *train_jepa.py* ]]; then
    printf '%s\0' "$PWD" "$@" >"$TRACE.args"
    env -0 >"$TRACE"
    exit "${FAKE_EXIT:-0}"
else
    exec "$REAL" "$@"
fi
'''


SETUP_STUB = '''
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    echo "$* kinds=${FINEWEB_KINDS-} shards=${TRAIN_SHARDS-} ${FAIL_SETUP-}" >>setup.log
    [[ -n "${FAIL_SETUP-}" ]] && exit 1
    if [[ "$1" != env ]]; then
        mkdir -p data/datasets/demo_sp8192 data/datasets/demo_bytes
        touch data/datasets/demo_{sp8192,bytes}/fineweb_{train,val}_000000.bin
    fi
    if [[ -n "${STUB_PYTHON-}" ]]; then
        mkdir -p .venv/bin
        cp "$STUB_PYTHON" .venv/bin/python
        requirements_hash >.venv/.jepa-requirements
    fi
    exit 0
fi
'''


class Scripts:
    """The run scripts in a folder with a space, over a stub of Python and one of set-up, which logs its calls."""

    def __init__(self, folder):
        self.root, self.trace, self.python = folder / "my repo", folder / "trace", folder / "python stub"
        (self.root / "tools").mkdir(parents=True)
        for name in [*SCRIPTS, "setup_jepa.sh", "tools/launch.sh", "requirements.txt", "KNOBS.md"]:
            shutil.copy(ROOT / name, self.root / name)
        path, mark = self.root / "setup_jepa.sh", 'if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then'
        text = path.read_text()
        assert text.count(mark) == 1
        path.write_text(text.replace(mark, SETUP_STUB + mark))
        self.python.write_text(STUB)
        self.python.chmod(0o755)
        for name in {*DEMO.values()}:
            self.data(name)

    def data(self, name):
        folder = self.root / "data/datasets" / name
        folder.mkdir(parents=True)
        for split in ("train", "val"):
            (folder / f"fineweb_{split}_000000.bin").touch()
        return folder

    def run(self, script, *arguments, code=0, **env):
        """Environment, arguments and folder that the trainer would get; and the text printed."""
        base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
        base |= {"SKIP_VENV": "1", "PYTHON": str(self.python), "REAL": sys.executable, "TRACE": str(self.trace)}
        base |= {"RUN_NICE": "0"} | env
        self.trace.unlink(missing_ok=True)
        done = subprocess.run(["bash", str(self.root / script), *arguments], capture_output=True, text=True,
                              env=base, cwd="/")
        assert done.returncode == code, done.stdout + done.stderr
        got = {"env": {}, "args": None, "cwd": None, "text": done.stdout, "err": done.stderr}
        if self.trace.exists():
            got["cwd"], *got["args"] = Path(f"{self.trace}.args").read_text().split("\0")[:-1]
            got["env"] = dict(line.split("=", 1) for line in self.trace.read_text().split("\0")[:-1])
        plain = {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE", "GOMP_SPINCOUNT", "RUN_SCRIPT_PUBLISHED", *base}
        got["set"] = {k: v for k, v in got["env"].items() if k not in plain}
        return got


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)


SYSTEM_A = dict(
    NUM_LAYERS=10, EXPAND=1, MLP_EVERY=2, TIE_EMBEDDINGS=1, TRAIN_BATCH_TOKENS=524288, PREDICTOR_HIDDEN_MULT=4,
    JEPA_STEPS=3, SOFTCAP_TYPE="poly", LOGIT_SOFTCAP=15, JEPA_WEIGHT=1, CE_WEIGHT=1, SIGREG_LAMBDA=1, QUANT_BITS=4,
    FP_STORAGE="FP8", WARMDOWN_FRACTION=0.15, SLIDING_EVAL=1, TEMP_SCALING=1, VAL_MAX_TOKENS=0, QAT_FRACTION=1,
    MUON_WD=0.04, ADAM_WD=0.05, GRAD_CLIP_NORM=1, SEED=42, MAX_WALLCLOCK_SECONDS=600, ITERATIONS=10000, MATRIX_LR=0.02,
    MUON_BACKEND_STEPS=3, MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM_WARMUP_STEPS=500,
    MICRO_BATCHES=8)
PUBLISHED = {
    "run_jepa_bpe.sh": SYSTEM_A | dict(
        TOKENIZER="bpe", MODEL_DIM=640, MLP_MULT=4, EMBED_DIM=336, VOCAB_SIZE=8192, TRAIN_SEQ_LEN=1024,
        VAL_LOSS_EVERY=500, TRAIN_LOG_EVERY=100, SLIDING_EVAL_STRIDE=16, SLIDING_BATCH_SIZE=512),
    "run_jepa_byte.sh": SYSTEM_A | dict(
        TOKENIZER="byte", MODEL_DIM=768, MLP_MULT=3, EMBED_DIM=256, VOCAB_SIZE=256, TRAIN_SEQ_LEN=8192,
        VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=1000, SLIDING_EVAL_STRIDE=128, SLIDING_BATCH_SIZE=128),
    "run_bytejepa.sh": dict(
        TOKENIZER="byte", MIXER="attention", MODEL_DIM=512, NUM_LAYERS=9, MLP_MULT=2, MLP_EVERY=1, EMBED_DIM=0,
        VOCAB_SIZE=256, TIE_EMBEDDINGS=1, TRAIN_SEQ_LEN=4096, TRAIN_BATCH_TOKENS=524288, PREDICTOR_HIDDEN_MULT=1,
        JEPA_STEPS=1, SOFTCAP_TYPE="tanh", LOGIT_SOFTCAP=30, LOSS_SCHEDULE="staged", ANTICOLLAPSE="covariance",
        SIGREG_WEIGHT=0.05, QUANT_BITS=8, STORAGE="int8", WARMDOWN="iters", WARMDOWN_ITERS=2000, SLIDING_EVAL=0,
        TEMP_SCALING=0, VAL_MAX_TOKENS=0, QAT_FRACTION=0, VAL_LOSS_EVERY=500, TRAIN_LOG_EVERY=100, MUON_WD=0,
        ADAM_WD=0, GRAD_CLIP_NORM=0, SEED=1337, MAX_WALLCLOCK_SECONDS=3600, ITERATIONS=50000, MATRIX_LR=0.04,
        MUON_BACKEND_STEPS=5, MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM_WARMUP_STEPS=500,
        TIED_EMBED_LR=0.05, EMBED_LR=0.6, SCALAR_LR=0.04, WARMUP_STEPS=20, WARMUP_ROLLBACK="all",
        SWA_DECAY=0.995, SWA_START=0.8,
        JEPA_PURE_FRAC=0.1, CE_PURE_FRAC=0.8, DETACH_TARGETS=1, ROW_NORM=0, VOCAB_BIAS=0, Z_LOSS=0, NUM_HEADS=8,
        NUM_KV_HEADS=4, ROPE_BASE=10000, QK_GAIN_INIT=1.5, TIED_EMBED_INIT_STD=0.005, MICRO_BATCHES=8)}


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_values(scripts, script):
    got = scripts.run(script, PROFILE="gpu", FAKE_GPUS="1")["env"]
    for name, value in PUBLISHED[script].items():
        assert number(got[name]) == value, name


def test_the_100k_run(scripts):
    long = dict(MAX_WALLCLOCK_SECONDS="0", ITERATIONS="100000", PROFILE="gpu")
    got = scripts.run("run_jepa_bpe.sh", **long)["env"]
    assert (got["VAL_LOSS_EVERY"], got["TRAIN_LOG_EVERY"], got["CHECKPOINT_EVERY"]) == ("5000", "1000", "5000")
    got = scripts.run("run_jepa_bpe.sh", **long, CHECKPOINT_EVERY="7", VAL_LOSS_EVERY="")["env"]
    assert (got["VAL_LOSS_EVERY"], got["CHECKPOINT_EVERY"]) == ("", "7")
    assert "CHECKPOINT_EVERY" not in scripts.run("run_jepa_bpe.sh", PROFILE="gpu")["env"]


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_is_a_knob(scripts, script, profile):
    train_jepa = pytest.importorskip("train_jepa")
    got = scripts.run(script, PROFILE=profile)["set"]
    names = set(got) - {"PROFILE", "PRESET", "RUN_SCRIPT_DEFAULTS"}
    assert names and names <= set(train_jepa.Config.knobs())
    train_jepa.Config.from_env({k: got[k] for k in names}).validate()


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_user_sets_wins(scripts, script, profile):
    names = set(scripts.run(script, PROFILE=profile)["set"]) - {"PROFILE", "PRESET", "RUN_SCRIPT_DEFAULTS"}
    assert {"DATA_PATH", "TOKENIZER_PATH", "MODEL_DIM"} <= names
    for value in ("", "17"):
        got = scripts.run(script, PROFILE=profile, **dict.fromkeys(names, value))
        assert {k: got["env"][k] for k in names} == dict.fromkeys(names, value)


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
@pytest.mark.parametrize("script", ["run_jepa_bpe.sh", "run_jepa_byte.sh"])
def test_best_is_published_but_for_what_the_experiments_tested(scripts, script, profile):
    """In the CPU profile BEST_A, which tools/experiments.sh compares with the published form, and no others; at full
    size what RESULTS.md gives evidence for."""
    plain, best = (scripts.run(script, PROFILE=profile, PRESET=preset)["env"] for preset in ("published", "best"))
    forms = subprocess.check_output(["bash", str(ROOT / "tools/experiments.sh"), "list"], text=True)
    tested = dict(word.split("=") for word in re.search(r"^best_64  best (.*) MODEL_DIM=64 ", forms, re.M)[1].split())
    changed = {k: v for k, v in best.items() if plain.get(k) != v and k not in ("PRESET", "RUN_SCRIPT_DEFAULTS")}
    if profile == "cpu":
        assert changed == tested
        return
    assert changed["MIXER"].count("a") == 1 and best["NUM_LAYERS"] == "10" and "CARRY_STATE" not in best
    assert {"WARMDOWN_FRACTION": "0.72", "ROUNDING": "compensated", "QAT_FRACTION": "0", "EVAL_STATE": "carry",
            "JEPA_WEIGHT": "0", "SIGREG_LAMBDA": "0", "QUANT_STEP": "sigma", "EMBED_GRID": "int7",
            "DT_GRID": "int8a"}.items() <= changed.items()
    assert int(best["ITERATIONS"]) * 0.035 > 600  # s, at a faster step than any model gives: the clock ends the run
    section = (ROOT / "RESULTS.md").read_text().split("## `PRESET=best` at full size")[1].split("\n## ")[0]
    assert [k for k in changed if f"`{k}" not in section and f" {k}=" not in section] == []
    knobs = pytest.importorskip("train_jepa").Config
    knobs.from_env({k: best[k] for k in set(best) & set(knobs.knobs())}).validate()


def test_system_b_follows_the_knobs_that_others_depend_on(scripts):
    """No projections around the embedding at any width; the average starts with the stage of pure cross-entropy."""
    run = lambda *arguments, **env: scripts.run("run_bytejepa.sh", *arguments, PROFILE="gpu", **env)["env"]
    assert run(MODEL_DIM="384")["EMBED_DIM"] == "0" and run(EMBED_DIM="64")["EMBED_DIM"] == "64"
    for env, start in (({}, "0.80"), (dict(CE_PURE_FRAC="0.6"), "0.6"), (dict(CE_PURE_FRAC=""), "0.80"),
                       (dict(CE_PURE_FRAC="0.6", SWA_START="0.9"), "0.9")):
        assert run(**env)["SWA_START"] == start
    assert run("CE_PURE_FRAC=0.7")["SWA_START"] == "0.7"


@pytest.mark.parametrize("script", [*SCRIPTS, "tools/launch.sh"])
def test_a_table_has_one_row_per_knob(script):
    for table in re.findall(r"<<'?TABLE'?\n(.*?)\nTABLE", (ROOT / script).read_text(), re.S):
        rows = [line.split() for line in table.splitlines() if line and line[0] != "#"]
        assert all(len(row) in (2, 3) for row in rows) and len({row[0] for row in rows}) == len(rows) > 10


def test_origin_of_values_is_passed_on(scripts):
    env = scripts.run("run_jepa_bpe.sh", "SEED=7", PROFILE="cpu", MODEL_DIM="64")["env"]
    script, *names = env["RUN_SCRIPT_DEFAULTS"].split()
    assert script == "run_jepa_bpe.sh" and "NUM_LAYERS" in names
    assert not {"MODEL_DIM", "SEED", "PATH"} & set(names)
    published = env["RUN_SCRIPT_PUBLISHED"].split()
    assert {"MODEL_DIM=640", "NUM_LAYERS=10", "WARMUP_STEPS=-"} <= set(published) and "EXPAND=1" not in published
    assert scripts.run("run_jepa_bpe.sh", PROFILE="gpu")["env"]["RUN_SCRIPT_PUBLISHED"] == ""


def test_arguments_pass_on(scripts):
    got = scripts.run("run_jepa_bpe.sh", "MODEL_DIM=256", "BLURB=two words", "PROFILE=cpu", "ITERATIONS=3")
    assert got["args"] == ["train_jepa.py", "MODEL_DIM=256", "BLURB=two words", "ITERATIONS=3"]
    assert Path(got["cwd"]) == scripts.root


@pytest.mark.parametrize("env, words", [
    (dict(FAKE_GPUS="0"), "PROFILE=cpu (auto: no CUDA device found; small model, demo corpus"),
    (dict(FAKE_GPUS="2"), "PROFILE=gpu (auto: 2 CUDA device(s))"),
    (dict(FAKE_GPUS="2", PROFILE="cpu"), "PROFILE=cpu (by request; small model"),
    (dict(FAKE_GPUS="0", PROFILE="gpu"), "PROFILE=gpu (by request; no CUDA device found)"),
    (dict(PROFILE="", PRESET=""), "PROFILE=cpu (auto"),
])
def test_profile_says_which_and_why(scripts, env, words):
    got = scripts.run("run_jepa_bpe.sh", **env)
    assert words in got["text"]
    assert got["env"]["PROFILE"] in ("gpu", "cpu") and got["env"]["PRESET"] == "published"
    assert (got["env"]["MODEL_DIM"] == "640") == (got["env"]["PROFILE"] == "gpu")


@pytest.mark.parametrize("env", [dict(PROFILE="tpu"), dict(PRESET="bset"), dict(NPROC_PER_NODE="0"),
                                 dict(NPROC_PER_NODE="two")])
def test_bad_choices_are_one_line_and_code_2(scripts, env):
    (name, value), = env.items()
    for got in (scripts.run("run_jepa_byte.sh", code=2, **env),
                scripts.run("run_jepa_byte.sh", f"{name}={value}", code=2)):
        assert got["args"] is None and len(got["err"].splitlines()) == 1 and f"{name}={value}" in got["err"]


@pytest.mark.parametrize("env, ranks", [
    (dict(FAKE_GPUS="0"), 1), (dict(FAKE_GPUS="1"), 1), (dict(FAKE_GPUS="8"), 8), (dict(FAKE_GPUS="3"), 2),
    (dict(FAKE_GPUS="6"), 4), (dict(FAKE_GPUS="3", NPROC_PER_NODE="4"), 4), (dict(FAKE_GPUS="0", PROFILE="gpu"), 1),
    (dict(FAKE_GPUS="0", NPROC_PER_NODE="2"), 2), (dict(FAKE_GPUS="8", NPROC_PER_NODE="1"), 1),
    (dict(FAKE_GPUS="6", MICRO_BATCHES="6"), 6), (dict(FAKE_GPUS="8", PROFILE="cpu"), 1),
    (dict(FAKE_GPUS="8", MODE="describe"), 1), (dict(FAKE_GPUS="8", MODE="sample"), 1),
    (dict(FAKE_GPUS="8", MODE="Sample", NPROC_PER_NODE="2"), 1), (dict(FAKE_GPUS="8", MODE="eval"), 8),
])
def test_ranks(scripts, env, ranks):
    args = scripts.run("run_jepa_bpe.sh", "SEED=1", **env)["args"]
    tail = ["train_jepa.py", "SEED=1"]
    if ranks == 1:
        assert args == tail
    else:
        assert args == ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *tail]


@pytest.mark.parametrize("env, words", [
    (dict(NPROC_PER_NODE="3"), "MICRO_BATCHES=2; 2 would do"),
    (dict(NPROC_PER_NODE="6", FAKE_GPUS="8"), "MICRO_BATCHES=8; 4 would do"),
    (dict(NPROC_PER_NODE="16", FAKE_GPUS="16", TORCHRUN_ARGS="--nnodes=2"), "MICRO_BATCHES=8; 8 would do")])
def test_ranks_that_cannot_share_the_micro_batches_are_refused_before_a_start(scripts, env, words):
    got = scripts.run("run_jepa_bpe.sh", code=2, **env)
    assert got["args"] is None and got["err"].count("\n") == 1
    assert f"NPROC_PER_NODE={env['NPROC_PER_NODE']}: it must divide {words}" in got["err"]


def test_waiting_threads_spin_briefly_unless_the_user_sets_how_they_wait(scripts):
    spins = lambda **env: scripts.run("run_jepa_bpe.sh", **env)["env"].get("GOMP_SPINCOUNT")
    assert (spins(), spins(GOMP_SPINCOUNT="7"), spins(OMP_WAIT_POLICY="ACTIVE")) == ("5000", "7", None)


@pytest.mark.parametrize("arguments, words, absent", [
    ([], "small model, demo corpus, about two minutes of training)", "-"),
    (["DATA_PATH=/elsewhere"], "small model, about two minutes of training)", "demo"),
    (["ITERATIONS=9"], "small model, demo corpus)", "minutes"),
    (["MAX_WALLCLOCK_SECONDS=9"], "small model, demo corpus)", "minutes"),
    (["MODE=eval"], "small model, demo corpus)", "minutes"), (["MODE=sample"], "small model)", "demo")])
def test_corpus_and_duration_are_named_where_they_are_true(scripts, arguments, words, absent):
    text = scripts.run("run_jepa_bpe.sh", *arguments)["text"]
    assert words in text and absent not in text.replace("run_jepa_bpe.sh", "")


def test_a_run_takes_the_niceness_that_is_asked_for_and_says_so(scripts):
    text = scripts.run("run_jepa_bpe.sh", RUN_NICE="5")["text"]
    assert re.search(r"a load of [\d.]+ on \d+ cores: niceness 5 \(RUN_NICE=0 avoids it\)", text)
    for quiet in (dict(RUN_NICE="0"), dict(RUN_NICE="5", MODE="describe"), dict(RUN_NICE="5", PROFILE="gpu")):
        assert "niceness" not in scripts.run("run_jepa_bpe.sh", **quiet)["text"]
    error = scripts.run("run_jepa_bpe.sh", "RUN_NICE=high", code=2)["err"]
    assert "RUN_NICE=high: it is a niceness, -20 to 19" in error


def test_torchrun_takes_other_arguments_on_request(scripts):
    several = "--nnodes=2 --rdzv_endpoint=host0:29400"
    for env, ranks in ((dict(FAKE_GPUS="8"), 8), (dict(FAKE_GPUS="1"), 1)):
        args = scripts.run("run_jepa_bpe.sh", "RUN_ID=two", TORCHRUN_ARGS=several, **env)["args"]
        assert args == ["-m", "torch.distributed.run", *several.split(), f"--nproc_per_node={ranks}", "train_jepa.py",
                        "RUN_ID=two"]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_exit_code_passes_through(scripts, code):
    scripts.run("run_bytejepa.sh", code=code, FAKE_EXIT=str(code))


def test_python_without_torch(scripts):
    got = scripts.run("run_bytejepa.sh", code=1, FAKE_BROKEN="1")
    assert "cannot import torch" in got["err"] and got["args"] is None


# ---- data

@pytest.mark.parametrize("script", SCRIPTS)
def test_data_follows_the_profile(scripts, script):
    demo, fineweb = (f"./data/datasets/{names[script]}" for names in (DEMO, FINEWEB))
    got = scripts.run(script, FAKE_GPUS="1")
    assert got["env"]["DATA_PATH"] == demo and "training on the demo corpus" in got["text"]
    folder = scripts.data(FINEWEB[script])
    got = scripts.run(script, FAKE_GPUS="1")
    assert got["env"]["DATA_PATH"] == fineweb and "demo" not in got["text"]
    assert scripts.run(script, FAKE_GPUS="0")["env"]["DATA_PATH"] == demo
    (folder / ".partial").touch()                          # a download that is not finished is not taken
    assert scripts.run(script, FAKE_GPUS="1")["env"]["DATA_PATH"] == demo


def test_tokenizer_follows_the_data(scripts):
    downloaded = scripts.root / "data/tokenizers/fineweb_8192_bpe.model"
    embedded = "./data/demo/fineweb_8192_bpe.model"
    assert scripts.run("run_jepa_bpe.sh", FAKE_GPUS="1")["env"]["TOKENIZER_PATH"] == embedded
    downloaded.parent.mkdir()
    downloaded.touch()
    assert scripts.run("run_jepa_bpe.sh", FAKE_GPUS="1")["env"]["TOKENIZER_PATH"] == embedded
    scripts.data("fineweb10B_sp8192")
    got = scripts.run("run_jepa_bpe.sh", FAKE_GPUS="1")["env"]["TOKENIZER_PATH"]
    assert got == "./data/tokenizers/fineweb_8192_bpe.model"


@pytest.fixture
def fresh(scripts):
    """A fresh clone: neither environment nor data."""
    shutil.rmtree(scripts.root / "data")
    env = {"SKIP_VENV": "", "PYTHON": "", "STUB_PYTHON": str(scripts.python)}

    def run(script, *arguments, **more):
        log = scripts.root / "setup.log"
        log.unlink(missing_ok=True)
        got = scripts.run(script, *arguments, **env | more)
        got["calls"] = log.read_text().splitlines() if log.exists() else []
        return got
    return run


def test_fresh_clone_sets_up_then_rests(fresh, scripts):
    assert [call.split()[0] for call in fresh("run_jepa_bpe.sh")["calls"]] == ["env", "demo"]
    assert fresh("run_jepa_bpe.sh")["calls"] == []
    assert fresh("run_jepa_byte.sh")["calls"] == []
    with open(scripts.root / "requirements.txt", "a") as file:
        file.write("# newer\n")
    assert [call.split()[0] for call in fresh("run_jepa_byte.sh")["calls"]] == ["env"]


def test_fresh_clone_on_gpus_asks_for_what_it_needs(fresh):
    assert fresh("run_jepa_byte.sh", FAKE_GPUS="1")["calls"][1].strip() == "kinds=bytes shards="
    for mode in ("bench", "sample"):   # they read no shards
        assert fresh("run_jepa_bpe.sh", FAKE_GPUS="1", MODE=mode)["calls"] == []
    # demo shards that are there, from the tests or a CPU run, do not stand in for FineWeb
    assert fresh("run_jepa_bpe.sh", FAKE_GPUS="1")["calls"][0].strip() == "kinds=sp8192 shards="


def test_describe_needs_no_data(fresh, scripts):
    for more in (dict(MODE="describe"), dict(MODE="Describe")):
        got = fresh("run_jepa_bpe.sh", PROFILE="gpu", **more)
        assert got["args"] == ["train_jepa.py"] and all(call.startswith("env ") for call in got["calls"])
    assert fresh("run_jepa_bpe.sh", "MODE=describe")["args"] == ["train_jepa.py", "MODE=describe"]
    assert not (scripts.root / "data").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_installs_nothing_and_shows_the_scripts_values(fresh, scripts, script):
    for profile in ("cpu", "gpu"):
        got = fresh(script, "--help", PROFILE=profile, STUB_PYTHON="")
        assert got["calls"] == [] and got["args"] is None and not (scripts.root / ".venv").exists()
        text, values = got["text"], scripts.run(script, PROFILE=profile)["env"]
        assert f"bash {script} [KEY=VALUE ...]" in text and f"PROFILE={profile} PRESET=published" in text
        for name in set(PUBLISHED[script]) - {"CHECKPOINT_EVERY"}:
            assert re.search(rf"^  {name}={re.escape(values[name])} ", text, re.M), name
        assert "  SAMPLE_TOKENS=200 " in text
    assert re.search("^  SEED=7 ", fresh(script, "-h", "SEED=7", PROFILE="cpu")["text"], re.M)


def test_settings_of_set_up_may_be_arguments(fresh):
    got = fresh("run_jepa_bpe.sh", "TRAIN_SHARDS=all", "TORCH_BUILD=cpu", "SEED=1", FAKE_GPUS="1")
    assert got["args"] == ["train_jepa.py", "SEED=1"]
    assert (got["env"]["TRAIN_SHARDS"], got["env"]["TORCH_BUILD"]) == ("all", "cpu")


def test_best_downloads_what_its_ten_minutes_read(fresh):
    call = lambda **env: fresh("run_jepa_bpe.sh", FAKE_GPUS="1", **env)["calls"][-1].strip()
    shards = int(call(PRESET="best").removeprefix("kinds=sp8192 shards="))
    assert 13_700 * 524_288 / 1e8 < shards < 80
    assert call(PRESET="best", TRAIN_SHARDS="2") == "kinds=sp8192 shards=2"


def test_own_data_path_needs_no_set_up(fresh):
    got = fresh("run_jepa_bpe.sh", DATA_PATH="/elsewhere")
    assert got["env"]["DATA_PATH"] == "/elsewhere" and [c.split()[0] for c in got["calls"]] == ["env"]


def test_failing_set_up_stops_the_run(fresh):
    assert fresh("run_jepa_bpe.sh", code=1, FAIL_SETUP="1")["args"] is None


# ---- the real thing

COUNTS = {"run_jepa_bpe.sh": (32_816_684, 4_099_200), "run_jepa_byte.sh": (37_007_208, 5_902_080),
          "run_bytejepa.sh": (17_190_984 - 524_288, 524_288)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_parameters(scripts, script):
    tj = pytest.importorskip("train_jepa")
    got = scripts.run(script, PROFILE="gpu", MODE="describe")
    config = tj.Config.from_env({k: got["env"][k] for k in got["set"] if k in tj.Config.knobs()}).validate()
    with tj.torch.device("meta"):
        counts = tuple(map(tj.count_parameters, tj.build_models(config)))
    assert counts == COUNTS[script]


def test_describe_counts_the_published_parameters():
    """The whole way, once: script, trainer, last line of its output."""
    knobs = re.compile(r"[A-Z][A-Z0-9_]*_(WEIGHT|LR|DIM)|MODE|SEED")
    env = {k: v for k, v in os.environ.items() if not knobs.fullmatch(k)}
    env |= {"PROFILE": "gpu", "MODE": "describe", "SKIP_VENV": "1", "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(ROOT / "run_bytejepa.sh")], capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["eval_params"], report["train_only_params"]) == COUNTS["run_bytejepa.sh"]


def test_stamp_is_the_hash_of_the_requirements(scripts):
    done = subprocess.run(["bash", "-c", "source ./setup_jepa.sh; requirements_hash"], capture_output=True, text=True,
                          cwd=scripts.root)
    assert done.stdout.strip() == hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
