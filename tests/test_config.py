"""Knobs: the table of the specification, where values come from, what is refused, and the exact parameter counts."""
import re
import subprocess
import sys

import pytest
import update_knobs

import train_jepa as tj
from train_jepa import Config, UserError

# Section 2 of the specification, copied; `...` at the end of a value means "begins with".
SPEC = """
TOKENIZER=byte TOKENIZER_PATH= VOCAB_SIZE=256 DATA_PATH=./data/datasets/... RUN_ID= SEED=42 VAL_MAX_TOKENS=500000
VAL_BATCH_SIZE=524288
MODEL_DIM=512 NUM_LAYERS=12 D_STATE=64 D_CONV=4 EXPAND=2 EMBED_DIM=0 MLP_MULT=3 MLP_EVERY=1 ACTIVATION=relu2
TIE_EMBEDDINGS=0 LOGIT_SOFTCAP=15 SOFTCAP_TYPE=poly PROJECTOR_TYPE=linear PREDICTOR_HIDDEN_MULT=2
JEPA_WEIGHT=1 JEPA_STEPS=1 CE_WEIGHT=1 SIGREG_LAMBDA=1 SIGREG_KNOTS=17 SIGREG_NUM_PROJ=0 SIGREG_SCHEDULE=0
DETACH_TARGETS=0
TRAIN_SEQ_LEN=4096 TRAIN_BATCH_TOKENS=524288 ITERATIONS=10000 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=10
WARMDOWN_FRACTION=0.15 VAL_LOSS_EVERY=500 TRAIN_LOG_EVERY=100 COMPILE_MODE=default
MATRIX_LR=0.02 SCALAR_LR=0.01 EMBED_LR=0.01 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85
MUON_MOMENTUM_WARMUP_STEPS=500 MUON_BACKEND_STEPS=3 MUON_WD=0.04 ADAM_WD=0.05 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8
GRAD_CLIP_NORM=1.0
QUANT_BITS=5 QAT_FRACTION=1.0 FP_STORAGE=BF16
SLIDING_EVAL=0 SLIDING_EVAL_STRIDE=16 SLIDING_BATCH_SIZE=64 TEMP_SCALING=1 TEMP_CALIB=0
CHECKPOINT_EVERY=0 CHECKPOINT_DIR=
NUM_HEADS=8 NUM_KV_HEADS=4 ROPE_BASE=10000 QK_GAIN_INIT=1.5 TIED_EMBED_LR=0.05 TIED_EMBED_INIT_STD=0.005 HEAD_LR=0.008
SIGREG_WEIGHT=0.05 JEPA_PURE_FRAC=0.10 CE_PURE_FRAC=0.80 SWA_DECAY=0.995 WARMDOWN_ITERS=2000
MODE=train MIXER=mamba2 LOSS_SCHEDULE=joint ANTICOLLAPSE=sigreg STORAGE=intn MICRO_BATCHES=8 SWA_START=1
WARMUP_ROLLBACK=weights Z_LOSS=1e-4 VOCAB_BIAS=1 ROW_NORM=1 SSD_KERNEL=auto CHECKPOINT_KEEP=2 SIGREG_AXIS=batch
CARRY_STATE=0 EVAL_STATE=reset MIN_LR=0 QUANT_STEP=absmax OVERWRITE=0 PROFILE=auto
"""
NAMED_WITHOUT_DEFAULT = "SSD_CHUNK JEPA_DIM JEPA_ANNEAL".split()
CHOICES = dict(TOKENIZER="byte bpe", ACTIVATION="relu2 swiglu", SOFTCAP_TYPE="poly tanh", PROJECTOR_TYPE="linear mlp",
               FP_STORAGE="BF16 FP8", MODE="train describe bench eval sample",
               LOSS_SCHEDULE="joint staged", ANTICOLLAPSE="sigreg covariance", STORAGE="intn int8",
               WARMUP_ROLLBACK="weights all", SSD_KERNEL="auto mamba_ssm fused torch", SIGREG_AXIS="batch time both",
               EVAL_STATE="reset carry", QUANT_STEP="absmax sigma", PROFILE="auto gpu cpu",
               TIE_EMBEDDINGS="0 1 2 3", MIXER="mamba2 attention mmmmmmammmmm")

BPE = dict(TOKENIZER="bpe", VOCAB_SIZE=8192, MODEL_DIM=640, NUM_LAYERS=10, EXPAND=1, MLP_MULT=4, MLP_EVERY=2,
           EMBED_DIM=336, TIE_EMBEDDINGS=1, TRAIN_SEQ_LEN=1024, PREDICTOR_HIDDEN_MULT=4, JEPA_STEPS=3, QUANT_BITS=4,
           FP_STORAGE="FP8")
BYTE = dict(MODEL_DIM=768, NUM_LAYERS=10, EXPAND=1, MLP_MULT=3, MLP_EVERY=2, EMBED_DIM=256, TIE_EMBEDDINGS=1,
            TRAIN_SEQ_LEN=8192, PREDICTOR_HIDDEN_MULT=4, JEPA_STEPS=3, QUANT_BITS=4, FP_STORAGE="FP8")
BYTEJEPA = dict(MIXER="attention", MODEL_DIM=512, NUM_LAYERS=9, MLP_MULT=2, MLP_EVERY=1, MLP_NORM=0, EMBED_DIM=512,
                TIE_EMBEDDINGS=1, EMBED_STYLE="tied", VOCAB_BIAS=0, SOFTCAP_TYPE="tanh", LOGIT_SOFTCAP=30,
                PREDICTOR_HIDDEN_MULT=1, JEPA_STEPS=1, PROJECTOR_TYPE="none", PREDICTOR_NORM=1, STORAGE="int8",
                QUANT_BITS=8, LOSS_SCHEDULE="staged", ANTICOLLAPSE="covariance", DETACH_TARGETS=1)


def read(**knobs) -> Config:
    return Config.from_env({name: str(value) for name, value in knobs.items()})


def refusal(call, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("entry", SPEC.split())
def test_every_knob_of_the_specification_has_its_default(entry):
    name, _, text = entry.partition("=")
    value = getattr(Config(), name.lower())
    if text.endswith("..."):
        assert str(value).startswith(text[:-3])
    elif isinstance(value, (bool, int, float)):
        assert float(value) == float(text)
    else:
        assert value == text


def test_knobs_named_without_a_default_and_those_of_the_run_scripts_exist():
    assert set(NAMED_WITHOUT_DEFAULT) <= set(Config.knobs())
    assert "PRESET" in tj.SCRIPT_KNOBS
    Config.from_env({"PRESET": "best", "NPROC_PER_NODE": "2"})


@pytest.mark.parametrize("name", CHOICES)
def test_every_listed_alternative_is_accepted(name):
    for value in CHOICES[name].split():
        assert str(getattr(read(**{name: value}), name.lower())) == value


def test_defaults_are_a_valid_configuration():
    Config().validate()


def test_an_empty_value_means_the_default():
    config = Config.from_env({name: "" for name in Config.knobs()})
    assert config == Config() and config.sources["SEED"].startswith("environment")


def test_argument_beats_environment_beats_default():
    config = Config.from_env({"MODEL_DIM": "128", "SEED": "7"}, ["MODEL_DIM=256"])
    assert (config.model_dim, config.seed, config.num_layers) == (256, 7, 12)
    assert (config.sources["MODEL_DIM"], config.sources["SEED"]) == ("argument", "environment")
    assert "NUM_LAYERS" not in config.sources


def test_a_value_may_contain_an_equals_sign():
    assert Config.from_env({}, ["PROMPT=a=b"]).prompt == "a=b"


@pytest.mark.parametrize("name, value, right", [
    ("MODEL_DIM", "wide", "whole number"), ("MODEL_DIM", "1.5", "whole number"), ("MODEL_DIM", "0", "at least 1"),
    ("JEPA_WEIGHT", "much", "number"), ("JEPA_WEIGHT", "nan", "finite"), ("JEPA_WEIGHT", "inf", "finite"),
    ("JEPA_WEIGHT", "-1", "at least 0"), ("QAT_FRACTION", "1.5", "between 0 and 1"), ("SWA_START", "2", "between"),
    ("SLIDING_EVAL", "yes", "0 or 1"), ("TIE_EMBEDDINGS", "4", "between 0 and 3"),
    ("SOFTCAP_TYPE", "cubic", "poly, tanh"),
    ("FP_STORAGE", "fp4", "BF16, FP8"), ("MODE", "trian", "describe"), ("TOKENIZER", "bytes", "byte, bpe"),
    ("SEED", "-1", "at least 0"), ("SEED", str(2**63), "below 2^63"), ("MICRO_BATCHES", "0", "at least 1")])
def test_a_bad_value_gives_one_line_with_knob_value_and_what_is_right(name, value, right):
    lines = refusal(Config.from_env, {name: value})
    assert len(lines) == 1 and f"{name}={value}" in lines[0] and right in lines[0]
    assert refusal(Config.from_env, {}, [f"{name}={value}"]) == lines


def test_a_text_of_several_lines_is_refused_in_one_but_as_a_prompt():
    for name in ("RUN_ID", "DATA_PATH", "MIXER"):
        assert refusal(Config.from_env, {name: "a\nb"}) == [f"{name}=a\\nb: must be one line"]
    assert Config.from_env({"PROMPT": "a\nb"}).prompt == "a\nb"


def test_all_errors_come_at_once_each_on_its_line():
    lines = refusal(Config.from_env, {"MODEL_DIM": "x", "SEED": "y", "JEPA_WIEGHT": "1"},
                    ["ACTIVATION=gelu", "EXPAD=2"])
    assert len(lines) == 5
    for name in ("MODEL_DIM=x", "SEED=y", "JEPA_WEIGHT", "ACTIVATION=gelu", "EXPAND"):
        assert sum(name in line for line in lines) == 1, name


@pytest.mark.parametrize("wrong, meant", [
    ("JEPA_WIEGHT", "JEPA_WEIGHT"), ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"), ("QUANT_BIT", "QUANT_BITS"),
    ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"), ("SIGREG_LAMDBA", "SIGREG_LAMBDA"), ("MODELDIM", "MODEL_DIM"),
    ("LOGIT_SOFT_CAP", "LOGIT_SOFTCAP"), ("NUM_LAYER", "NUM_LAYERS"), ("VOCAB_SIZ", "VOCAB_SIZE"),
    ("TIE_EMBEDDING", "TIE_EMBEDDINGS"), ("MUON_WEIGHT_WD", None)])
def test_a_misspelled_argument_is_refused_with_the_nearest_knob(wrong, meant):
    lines = refusal(Config.from_env, {}, [f"{wrong}=1"])
    assert len(lines) == 1 and lines[0].startswith(wrong) and (meant is None or meant in lines[0])


@pytest.mark.parametrize("wrong, meant", [  # swap, deletion, substitution, insertion
    ("JEPA_WIEGHT", "JEPA_WEIGHT"), ("SIGREG_LAMDBA", "SIGREG_LAMBDA"), ("QUANT_BIT", "QUANT_BITS"),
    ("NUM_LAYER", "NUM_LAYERS"), ("VOCAB_SIZ", "VOCAB_SIZE"), ("MUON_VD", "MUON_WD"), ("TOP_KK", "TOP_K"),
    ("TRAIN_SEQ_LENS", "TRAIN_SEQ_LEN"), ("JEPA_WIEGHTS", "JEPA_WEIGHT"),
    ("WARMDOWN_ITER", "WARMDOWN_ITERS"), ("TRAIN_SHARD", "TRAIN_SHARDS")])
def test_a_misspelled_knob_of_a_family_in_the_environment_is_an_error(wrong, meant, capsys):
    assert refusal(Config.from_env, {wrong: "1"}) == [f"{wrong}: no such knob; did you mean {meant}?"]
    assert capsys.readouterr().err == ""


def test_names_in_the_environment_that_may_be_foreign_are_warned_of_in_one_line(capsys):
    names = dict(DEVICES="DEVICE", AUTHORS=None, SEEDS="SEED", LOGIT_SOFT_CAP="LOGIT_SOFTCAP", MODELDIM="MODEL_DIM",
                 TIE_EMBEDDING="TIE_EMBEDDINGS", MAX_WALLCLOCK_SECOND="MAX_WALLCLOCK_SECONDS", RUNSDIR="RUNS_DIR")
    assert Config.from_env(dict.fromkeys(names, "1")) == Config()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ")
    for name, meant in names.items():
        assert (f"{name} (did you mean {meant}?)" in lines[0]) == (meant is not None), name
    Config.from_env({"DEVICES": "0,1", "RANK": "1"})  # one rank says it
    assert capsys.readouterr().err == ""


def test_names_that_are_only_somewhat_like_a_knob_are_foreign(capsys):
    for name in ("LINES", "MUON_VDD", "NUM_WORKERS", "TRAIN_FILE", "MODEL_NAME", "DATA_DIR", "NODE", "BIT"):
        Config.from_env({name: "1"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argument", ["--seed=1", "seed=1", "SEED", "-x", ""])
def test_an_argument_that_is_no_known_assignment_is_refused(argument):
    assert "NAME=value" in refusal(Config.from_env, {}, [argument])[0]


def test_normal_environments_pass(capsys):
    names = """PATH HOME LANG LC_ALL USER LOGNAME SHELL TERM PWD OLDPWD SHLVL HOSTNAME EDITOR PAGER DISPLAY TMPDIR TZ
    PS1 LINES COLUMNS
    NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES LD_LIBRARY_PATH PYTHONPATH PYTHONUNBUFFERED VIRTUAL_ENV
    CONDA_PREFIX CONDA_DEFAULT_ENV OMP_NUM_THREADS MKL_NUM_THREADS MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK
    LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS
    TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCHINDUCTOR_CACHE_DIR
    TRITON_INTERPRET TRITON_CACHE_DIR TRITON_CACHE_AUTOTUNING MAMBA_DETERMINISTIC PYTORCH_CUDA_ALLOC_CONF
    SLURM_JOB_ID SLURM_PROCID SLURM_NTASKS SLURM_NODEID SLURM_NNODES SLURM_STEP_ID SLURM_GPUS_ON_NODE JOB_ID BUILD_ID
    CI RUNNER_TEMP RUNNER_OS RUNNER_NAME RUNNER_ARCH RUNNER_WORKSPACE GITHUB_RUN_ID GITHUB_SHA GITHUB_REF GITHUB_JOB
    GITHUB_ACTIONS GITHUB_ACTOR GITHUB_TOKEN GITHUB_WORKSPACE GITHUB_ENV GITHUB_RUN_NUMBER GITHUB_ACTOR_ID
    GITHUB_REPOSITORY_ID GITLAB_USER_ID CI_JOB_ID CI_RUNNER_ID BUILDKITE_AGENT_NAME
    HF_HOME HF_TOKEN HF_HUB_ENABLE_HF_TRANSFER WANDB_MODE WANDB_RUN_ID WANDB_API_KEY JUPYTER_TOKEN SSH_CLIENT SSH_TTY
    XDG_DATA_DIRS XDG_RUNTIME_DIR XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS LESSOPEN LS_COLORS COLORTERM TERM_PROGRAM
    KUBERNETES_SERVICE_HOST RUNPOD_POD_ID RUNPOD_GPU_COUNT AWS_REGION AWS_DEFAULT_REGION MPLBACKEND PYTEST_CURRENT_TEST
    http_proxy https_proxy no_proxy HTTP_PROXY NO_PROXY PIP_INDEX_URL UV_CACHE_DIR _ __CF_USER_TEXT_ENCODING""".split()
    caught = {}
    for name in names:
        try:
            Config.from_env({name: "anything"})
        except UserError as error:
            caught[name] = str(error)
    assert not caught and capsys.readouterr().err == ""


def test_choices_ignore_case_and_take_the_written_form():
    config = read(FP_STORAGE="fp8", SOFTCAP_TYPE="TANH", TOKENIZER="Byte", MODE="Train", SLIDING_EVAL="True")
    assert (config.fp_storage, config.softcap_type, config.tokenizer, config.mode, config.sliding_eval) == \
        ("FP8", "tanh", "byte", "train", True)


@pytest.mark.parametrize("knobs, named", [
    (dict(MODEL_DIM=200, EXPAND=1), "MODEL_DIM"),
    (dict(MODEL_DIM=96, EXPAND=1), "MODEL_DIM"),
    (dict(MIXER="mmx"), "MIXER"),
    (dict(MIXER="ma", NUM_LAYERS=3), "MIXER"),
    (dict(MIXER="attention", NUM_HEADS=7, NUM_KV_HEADS=1), "NUM_HEADS"),
    (dict(MIXER="attention", NUM_HEADS=512), "NUM_HEADS"),  # width 1 has no rotary halves
    (dict(MIXER="attention", NUM_KV_HEADS=3), "NUM_KV_HEADS"),
    (dict(VOCAB_SIZE=512), "VOCAB_SIZE"),
    (dict(TRAIN_BATCH_TOKENS=524289), "TRAIN_BATCH_TOKENS"),
    (dict(MICRO_BATCHES=7), "TRAIN_BATCH_TOKENS"),
    (dict(QUANT_BITS=3), "QUANT_BITS"),
    (dict(QUANT_BITS=8), "QUANT_BITS"),
    (dict(STORAGE="int8"), "QUANT_BITS"),
    (dict(STORAGE="int8", QUANT_BITS=8, FP_STORAGE="FP8"), "FP_STORAGE"),
    (dict(CE_WEIGHT=0, JEPA_WEIGHT=0), "CE_WEIGHT"),
    (dict(CE_WEIGHT=0, JEPA_STEPS=0), "CE_WEIGHT"),
    (dict(CE_WEIGHT=0, JEPA_ANNEAL=0.5), "CE_WEIGHT"),
    (BYTEJEPA | dict(CE_WEIGHT=0), "CE_WEIGHT"),
    (dict(MAX_WALLCLOCK_SECONDS=60, RESERVE_SECONDS=60), "RESERVE_SECONDS"),
    (dict(EVAL_ADAPT=1, ADAPT_PARAMS="scalars,bias"), "ADAPT_PARAMS"),
    (dict(CARRY_STATE=1, MIXER="mma", NUM_LAYERS=3), "CARRY_STATE"),
    (dict(CE_WEIGHT=0, LOSS_SCHEDULE="staged", JEPA_WEIGHT=0), "CE_WEIGHT"),
    (dict(LOSS_SCHEDULE="staged", JEPA_PURE_FRAC=0.9), "JEPA_PURE_FRAC"),
    (dict(LOSS_SCHEDULE="staged", JEPA_PURE_FRAC=0.8), "JEPA_PURE_FRAC"),
    (dict(JEPA_STEPS=4096), "JEPA_STEPS"),
    (dict(SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=5000), "SLIDING_EVAL_STRIDE"),
    (dict(CARRY_STATE=1, MIXER="attention"), "CARRY_STATE"),
    (dict(JEPA_DIM=16, PROJECTOR_TYPE="none"), "JEPA_DIM"),
    (dict(ANTICOLLAPSE="covariance", SIGREG_AXIS="time"), "SIGREG_AXIS"),
    (dict(STORAGE="int8", QUANT_BITS=8, QUANT_STEP="sigma"), "QUANT_STEP"),
    (dict(INT8_FLOOR=1), "INT8_FLOOR"),
    (dict(QUANT_FIT=1, QUANT_STEP="sigma"), "QUANT_FIT"),  # training has seen its steps
    (dict(QUANT_FIT=1, QAT_FRACTION=0), "QUANT_FIT"),
    (dict(MLP_GRID="int3"), "MLP_GRID"),
    (dict(DT_GRID="int8"), "DT_GRID"),  # system B's rows have no training kernel
    (dict(EMBED_GRID="int4", STORAGE="int8", QUANT_BITS=8), "EMBED_GRID"),
    (dict(RUN_ID="../other"), "RUN_ID"),
    (dict(RUN_ID="a/b"), "RUN_ID"),
    (dict(RUN_ID=".."), "RUN_ID"),
    (dict(RUN_ID="ä" * 128), "RUN_ID"),
], ids=str)
def test_combinations_that_make_no_sense_are_refused_by_name(knobs, named):
    lines = refusal(read(**knobs).validate)
    assert len(lines) == 1 and named in lines[0].split(":")[0]


def test_validate_reports_all_faults_at_once():
    lines = refusal(read(MODEL_DIM=200, EXPAND=1, QUANT_BITS=3, VOCAB_SIZE=300).validate)
    assert len(lines) == 3


@pytest.mark.parametrize("knobs", [
    dict(MIXER="attention", MODEL_DIM=200, NUM_HEADS=4, NUM_KV_HEADS=2),       # no Mamba-2 head to fill
    dict(NUM_HEADS=7),                                                         # no attention
    dict(MIXER="mmmmmmammmmm"), dict(MLP_MULT=0), dict(JEPA_STEPS=0), dict(JEPA_WEIGHT=0, SIGREG_LAMBDA=0),
    dict(PROJ_GRID="int4s0.35", DT_GRID="int8a", EMBED_GRID="int6"), dict(CARRY_STATE=1), dict(EVAL_STATE="carry"),
    dict(EVAL_STATE="carry", MIXER="attention"), dict(EVAL_ADAPT=1, ADAPT_PARAMS="scalars, embedding"),
    dict(RUN_ID="ä" * 127), dict(LOSS_SCHEDULE="staged", JEPA_WEIGHT=0, JEPA_PURE_FRAC=0.9),
    dict(CE_WEIGHT=0), dict(STORAGE="int8", QUANT_BITS=8), dict(SLIDING_EVAL_STRIDE=5000), BPE, BYTE, BYTEJEPA
], ids=str)
def test_combinations_that_make_sense_pass(knobs):
    read(**knobs).validate()


@pytest.mark.parametrize("argument", ["--help", "MODE=describe"])
def test_a_reader_that_goes_away_is_no_traceback(argument):
    child = subprocess.Popen([sys.executable, tj.__file__, argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 141)


def test_what_is_rendered_reads_back_to_the_same_configuration():
    config = read(MATRIX_LR=0.1 + 0.2, SEED=7, SLIDING_EVAL=1, FP_STORAGE="FP8", ADAM_EPS=1e-30, MUON_WD=1 / 3)
    rows = {match[1]: match for line in config.render().splitlines()[1:]
            if (match := re.fullmatch(r"  (\S+) +(.{32}) .{12,} (default|environment|argument).*", line))}
    assert list(rows) == list(Config.knobs()) and all(rows.values())
    assert read(**{name: row[2].strip() for name, row in rows.items()}) == config
    assert rows["SEED"][3] == "environment" and rows["MODEL_DIM"][3] == "default"


def test_every_default_survives_format_and_parse():
    for name, knob in Config.knobs().items():
        if text := tj.format_knob(knob.default):
            value = tj.parse_knob(name, knob, text)
            assert value == knob.default and type(value) is type(knob.default), name


def test_help_lists_every_knob_with_its_default():
    text = tj.help_text()
    for _, name, default, _ in tj.knob_table():
        assert re.search(rf"^  {name}={re.escape(default)}\s", text, re.M), name
    assert {name for _, name, _, _ in tj.knob_table()} == {*Config.knobs(), *tj.SCRIPT_KNOBS}


def test_every_knob_has_a_group_and_help():
    for group, name, _, text in tj.knob_table():
        assert group and len(text) > 3, name
    groups = dict.fromkeys(group for group, *_ in tj.knob_table())
    assert list(groups) == ["run", "data", "model", "losses", "training", "optimizers", "storage", "evaluation",
                            "checkpoints", "people", "run scripts"]


# -- tags --------------------------------------------------------------------------------------------------------------

def test_tags_are_the_known_words_and_go_together():
    tags = {name: set(f.metadata["tags"]) for name, f in Config.knobs().items()}
    assert set().union(*tags.values()) == {"free", "result", "model", "grid", "eval", "rate", "size"}
    for name, words in tags.items():
        assert not words & {"model", "grid"} or "free" not in words, name  # a resumed run keeps model and storage
        assert "result" not in words or "free" in words, name


def test_the_tagged_knobs_are_those_that_artifacts_and_resumed_runs_rely_on():
    assert Config.tagged("model") == (
        "TOKENIZER VOCAB_SIZE MODEL_DIM NUM_LAYERS MIXER D_STATE D_CONV EXPAND NUM_HEADS NUM_KV_HEADS ROPE_BASE "
        "EMBED_DIM MLP_MULT MLP_EVERY ACTIVATION MLP_NORM NORM_EPS TIE_EMBEDDINGS VOCAB_BIAS LOGIT_SOFTCAP "
        "SOFTCAP_TYPE TRAIN_SEQ_LEN").split()
    assert Config.tagged("grid") == ("STORAGE QUANT_BITS QUANT_STEP QUANT_K INT8_FLOOR FP_STORAGE MLP_GRID PROJ_GRID "
                                     "DT_GRID EMBED_GRID").split()
    assert set(Config.tagged("result")) == set(
        "ITERATIONS MAX_WALLCLOCK_SECONDS RESERVE_SECONDS DATA_PATH TOKENIZER_PATH VAL_MAX_TOKENS SSD_KERNEL SSD_CHUNK "
        "MLP_KERNEL COMPILE_MODE SLIDING_EVAL_STRIDE TEMP_SCALING TEMP_CALIB ROUNDING ROUNDING_TOKENS QUANT_FIT "
        "ATTENTION_OVERLAP ADAPT_STEPS ADAPT_LR ADAPT_CHUNK_TOKENS ADAPT_PARAMS ADAPT_CLIP".split())
    assert set(Config.tagged("eval")) == set(
        "VAL_MAX_TOKENS VAL_BATCH_SIZE MICRO_BATCHES SLIDING_BATCH_SIZE EVAL_STATE TEMP_CALIB DTYPE SSD_KERNEL "
        "SSD_CHUNK MLP_KERNEL COMPILE_MODE ATTENTION_OVERLAP EVAL_ADAPT ADAPT_STEPS ADAPT_LR ADAPT_CHUNK_TOKENS "
        "ADAPT_PARAMS ADAPT_CLIP".split())
    config = read(SEED=7, MODEL_DIM=128)
    assert config.fixed() == {name: value for name, value in config.named().items()
                              if name not in Config.tagged("free")}
    assert config.fixed()["SEED"] == 7 and "MODE" not in config.fixed() and "PROFILE" not in config.fixed()
    assert config.model_config()["MODEL_DIM"] == 128 and list(config.model_config()) == Config.tagged("model")


def test_checks_of_later_sections_are_reported_with_those_of_the_configuration(monkeypatch):
    monkeypatch.setattr(tj, "CHECKS", [*tj.CHECKS, lambda c: [f"SEED={c.seed}: unlucky"] if c.seed == 13 else []])
    assert len(refusal(read(VOCAB_SIZE=300, MIXER="mmx", QUANT_BITS=3, SEED=13).validate)) == 4
    read(SEED=12).validate()


def test_knobs_md_is_the_knob_table():
    text = tj.Path(tj.__file__).with_name("KNOBS.md").read_text(encoding="utf-8")
    assert text == update_knobs.document(), "run: python tests/update_knobs.py"


@pytest.mark.parametrize("knobs, stored, training_only", [
    (BPE, 32_816_684, 4_099_200), (BYTE, 37_007_208, 5_902_080), (BYTEJEPA, 17_190_984 - 524_288, 524_288)],
    ids=["bpe", "byte", "bytejepa"])
def test_parameter_counts_are_the_published_ones(knobs, stored, training_only):
    with tj.torch.device("meta"):  # shapes only: nothing is drawn
        model, head = tj.build_models(read(**knobs).validate())
    assert (tj.count_parameters(model), tj.count_parameters(head)) == (stored, training_only)


def test_no_training_only_parameters_when_every_latent_term_is_off():
    with tj.torch.device("meta"):
        assert tj.build_models(read(JEPA_WEIGHT=0, SIGREG_LAMBDA=0))[1] is None


def test_describe_shows_what_differs_by_group_with_the_published_value():
    script = dict(RUN_SCRIPT_DEFAULTS="run_x.sh MODEL_DIM WARMUP_STEPS EXPAND",
                  RUN_SCRIPT_PUBLISHED=" MODEL_DIM=640 WARMUP_STEPS=- SEED=3")
    config = Config.from_env(script | dict(MODEL_DIM="128", WARMUP_STEPS="3", EXPAND="1", SEED="7", MLP_MULT="3"))
    head, *lines = config.render(changed=True).splitlines()
    assert head.split() == ["knob", "value", "default", "source"] and "ALL=1" in lines.pop()
    assert [line.split(maxsplit=3) for line in lines] == [
        ["run:"], ["SEED", "7", "42", "environment"],
        ["model:"], ["MODEL_DIM", "128", "512", "run_x.sh (published: 640)"], ["EXPAND", "1", "2", "run_x.sh"],
        ["training:"], ["WARMUP_STEPS", "3", "10", "run_x.sh (published: 10)"]]
