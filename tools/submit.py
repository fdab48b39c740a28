#!/usr/bin/env python3
"""submit.py: runs of one configuration as a submission folder of the 16 MB challenge.

    python tools/submit.py RUN="runs/s42 runs/s43 runs/s44" AUTHOR="Full Name" GITHUB_ID=account

Writes submissions/records/<track>/<date>_<name>/ as the challenge asks for it: train_gpt.py (the
training script, self-extracting), submission.json, README.md, a log per seed; beside them the
artifact and all that README's commands need. The folder appears only when these commands have run
in a copy of it, elsewhere and alone: set-up, the training (at most ten steps), and the evaluation
of the artifact, which must repeat the scores of the best run. The last line of stdout is JSON.
Settings are NAME=value arguments or environment variables (arguments win).
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from compare import (  # noqa: E402
    SCORES,
    RunRecord,
    configuration,
    deviation,
    find_runs,
    markdown_table,
    read_run,
    run_tool,
)
from prepare_data import HUB  # noqa: E402

from train_jepa import (  # noqa: E402
    SHIPPED_NAME,
    SIZE_LIMIT,
    Config,
    UserError,
    Vocabulary,
    differences,
    file_hash,
    format_knob,
    knob,
    load_vocabulary,
    parse_knob,
    read_artifact,
    shipped_script,
    source_text,
    write_atomically,
)

TRACK_SECONDS = 600  # of the 10-minute track: for training, and again for evaluation
TRACK_FOLDERS = {"10min": "track_10min_16mb", "unlimited": "track_non_record_16mb"}
# What the run script and set-up need beside them, by paths relative to their own folder.
SHIPPED_BESIDE = ("requirements.txt", "setup_jepa.sh", "tools/launch.sh", "tools/prepare_data.py")
DEMO_DATA = ("demo_bytes", "demo_sp8192")  # made by set-up from data/demo
CHECK_STEPS = 10  # at most, of the training in the check
PROGRESS_SECONDS = 10  # between lines about a command of the check
# What a command of the check may see of this environment: no knob, no rank, no PYTHONPATH.
PLAIN_ENVIRONMENT = ("PATH HOME USER LANG TMPDIR LD_LIBRARY_PATH CUDA_HOME CUDA_VISIBLE_DEVICES "
                     "OMP_NUM_THREADS TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR").split()


@dataclass(frozen=True)
class Settings:
    """Settings of submit.py."""
    run: str = knob("", "run folders of the submission, globs allowed, one per seed")
    out: str = knob("", "folder to write (empty: submissions/records/TRACK/DATE_TITLE)")
    track: str = knob("10min|unlimited", "challenge track")
    author: str = knob("", "author of the submission")
    github_id: str = knob("", "GitHub name of the author")
    submission_name: str = knob("", "title (empty: made from the configuration)")
    blurb: str = knob("", "a sentence about the submission (empty: made from the configuration)")
    data_path: str = knob("", "folder of shards for the check (empty: that of the run)")
    overwrite: bool = knob(False, "1 = replace an earlier submission in OUT")


def code_bytes() -> int:
    """Bytes of the shipped script, which count as code."""
    return len(shipped_script(source_text()))


# -----------------------------------------------------------------------------------------------
# faults: why runs cannot be submitted
# -----------------------------------------------------------------------------------------------

def artifact_faults(run: RunRecord) -> Iterator[str]:
    """Is model.jepa there, the one that was scored, and small enough?"""
    artifact = run.path / "model.jepa"
    if not artifact.is_file():
        yield f"{run.path}: model.jepa is missing; a submission needs the artifact that was scored"
        return
    if file_hash(artifact) != run.result.get("artifact_sha256"):
        yield (f"{run.path}: model.jepa is not the artifact whose BPB result.json states (other "
               "sha256); restore that file or train again")
    total = artifact.stat().st_size + code_bytes()
    if total > SIZE_LIMIT:
        yield (f"{run.path}: {total:,} bytes (artifact + code), over the {SIZE_LIMIT:,} allowed; "
               "store fewer bits (QUANT_BITS, FP_STORAGE) or train a smaller model")


def logged_script(log: bytes) -> tuple[str | None, bytes]:
    """(sha256 that the log states, script text above that line); (None, b"") without such a line.

    A run that was started again has both twice; the last counts."""
    matches = list(re.finditer(rb"^script: (\d+) bytes, sha256 ([0-9a-f]{64})$", log, re.M))
    if not matches:
        return None, b""
    length, digest = matches[-1].groups()
    end = matches[-1].start() - 1
    return digest.decode(), log[max(end - int(length), 0):end]


def script_faults(run: RunRecord) -> Iterator[str]:
    """Did the run use today's script, by its log and its result?"""
    log_path = run.path / "log.txt"
    stated, text = logged_script(log_path.read_bytes() if log_path.is_file() else b"")
    if not stated:
        yield (f"{run.path}: log.txt does not say which script ran; a submission needs the run's "
               "own log")
        return
    today = hashlib.sha256(source_text().encode()).hexdigest()
    logged, result = hashlib.sha256(text).hexdigest(), str(run.result.get("script_sha256"))
    if not today == stated == logged == result:
        yield (f"{run.path}: the script changed since the run: sha256 {today[:12]} here, log.txt "
               f"states {stated[:12]} and holds {logged[:12]}, result.json states {result[:12]}; "
               "submit with the script that ran")


def check_vocabulary(run: RunRecord) -> None:
    """UserError unless the artifact counts the bytes of each token as the run's tokenizer does.

    BPB is a sum of losses over the bytes that the artifact itself claims for the tokens."""
    config = Config(**{name.lower(): run.config[name]
                       for name in ("TOKENIZER", "TOKENIZER_PATH", "VOCAB_SIZE")})
    header, *_ = read_artifact(run.path / "model.jepa")
    claimed = header.get("vocabulary") if isinstance(header, dict) else None
    own = load_vocabulary(config).pack()
    if Vocabulary.unpack(claimed, config.vocab_size).pack() != own:
        tokenizer = config.tokenizer_path if config.tokenizer == "bpe" else "the byte vocabulary"
        raise UserError(f"{run.path}: model.jepa counts the bytes of tokens otherwise than "
                        f"{tokenizer}; its BPB means nothing")


def run_faults(run: RunRecord, track: str) -> Iterator[str]:
    """Reasons, a line each, why this run cannot be submitted on the track."""
    if not run.result or not run.config:
        missing = "result.json" if run.config else "config.json"
        yield f"{run.path}: unfinished, it has no {missing}; let the run end first"
        return
    if not run.finished:
        yield (f"{run.path}: no round trip: result.json lacks roundtrip_val_bpb, the score of the "
               "artifact; train again")
    yield from artifact_faults(run)
    yield from script_faults(run)
    for name, what in (("data_seconds" if "data_seconds" in run.result else "train_seconds",
                        "training"), ("eval_seconds", "evaluation")):
        seconds = run.number(name)
        if track == "10min" and (seconds is None or seconds > TRACK_SECONDS):
            took = "an unknown time" if seconds is None else f"{seconds:.2f} s"
            yield (f"{run.path}: {what} took {took}, TRACK=10min allows {TRACK_SECONDS} s; take "
                   "TRACK=unlimited")


def submission_faults(settings: Settings, runs: Sequence[RunRecord]) -> list[str]:
    """All reasons, a line each, why these runs make no submission."""
    faults = []
    for name in ("AUTHOR", "GITHUB_ID"):
        if not getattr(settings, name.lower()).strip():
            faults.append(f"{name}: missing; a submission names its author: AUTHOR=\"Full Name\" "
                          "GITHUB_ID=account")
    for run in runs:
        faults += run_faults(run, settings.track)
    configured = [run for run in runs if run.config]
    for run in configured[1:]:
        first = configured[0]
        if lines := differences(configuration(first.config), configuration(run.config)):
            faults.append(f"{run.path}: another configuration than {first.path}: "
                          f"{'; '.join(lines)}")
    for seed in sorted({run.seed for run in configured}, key=str):
        paths = [str(run.path) for run in configured if run.seed == seed]
        if len(paths) > 1:
            faults.append(f"RUN: {len(paths)} runs have seed {seed} ({', '.join(paths)}); give one "
                          "run per seed")
    if len({run.kind for run in runs if run.kind}) > 1:
        kinds = ", ".join(f"{run.path}: {run.kind}" for run in runs if run.kind)
        faults.append(f"RUN: scored in different ways ({kinds}); one submission needs the same "
                      "evaluation knobs")
    return faults


# -----------------------------------------------------------------------------------------------
# submission.json
# -----------------------------------------------------------------------------------------------

def seed_facts(run: RunRecord, kind: str) -> dict[str, Any]:
    """Entry of one run in submission.json."""
    stored = (run.path / "model.jepa").stat().st_size
    facts = dict(val_loss=run.result[f"{kind}_val_loss"], val_bpb=run.score(kind))
    facts |= {f"{name}_val_bpb": run.score(name) for name in SCORES}
    for name in ("temperature", "sliding_stride", "steps", "ms_per_step", "train_seconds",
                 "eval_seconds"):
        facts[name] = run.result.get(name)
    return facts | dict(artifact_bytes=stored, bytes_total=stored + code_bytes())


def submission_facts(settings: Settings, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """submission.json. Scores are means over seeds; bytes and wallclock are the largest of any."""
    config, kind = runs[0].config, runs[0].kind
    size = f"{config['NUM_LAYERS']}x{config['MODEL_DIM']}"
    system = "transformer" if config["MIXER"] == "attention" else "Mamba-2"
    seeds = {str(run.seed): seed_facts(run, kind) for run in runs}

    def column(name: str) -> list:
        return [facts[name] for facts in seeds.values()]

    machines = {f"{run.result['world_size']} x {run.result['device']}" for run in runs}
    return dict(
        author=settings.author, github_id=settings.github_id,
        name=settings.submission_name or f"JEPA {system} {size} {config['TOKENIZER']}",
        blurb=settings.blurb or f"{system} language model ({size}) with latent prediction beside "
                                "the cross-entropy, trained on its own storage grid.",
        date=f"{datetime.now():%Y-%m-%d}",
        track=TRACK_FOLDERS[settings.track].removeprefix("track_"),
        val_loss=float(np.mean(column("val_loss"))), val_bpb=float(np.mean(column("val_bpb"))),
        val_bpb_std=deviation(column("val_bpb")), scoring=SCORES[kind],
        bytes_total=max(column("bytes_total")), bytes_code=code_bytes(),
        seeds=[run.seed for run in runs], seed_results=seeds, hardware=", ".join(sorted(machines)),
        steps=round(np.mean(column("steps"))), wallclock=max(column("train_seconds")))


# -----------------------------------------------------------------------------------------------
# README.md
# -----------------------------------------------------------------------------------------------

README = Template("""\
# $name

$blurb

**$val_bpb bits per byte** ($scoring; seeds: $seed_count), $bytes_total bytes.
Track $track; $author (@$github_id), $date.

## Results

$score_table

All scores are of the weights read back from the written artifact, on
$validation_part the validation set in $data_name.

## Configuration

$num_layers $mixers blocks of width $model_dim, $vocab_size token ids,
$stored_parameters stored parameters and $training_parameters that only training uses.
$batch_tokens tokens per step in sequences of $sequence_tokens;
matrices are stored in $quant_bits bits. `$run_script` and `tools/launch.sh` hold the defaults, the
command below what differs from them; the logs list all knobs.

## How to reproduce

In this folder, the environment and the data (Linux, Python 3.11 to 3.13):

```bash
$setup_command
```

$data_sentence

The training of the best seed; the other seeds: the same with $other_seeds.

```bash
$training_command
```

The scores of the artifact alone:

```bash
$evaluation_command
```

## What is included

- `$script` as run, self-extracting: `python $script --source` prints the source
  (sha256 $script_sha256)
- `model.jepa` of the best seed, $best_seed
- the full log of each seed (`train_seed*.log`), `submission.json`
- `$run_script` and what it needs: $shipped_beside

Counted against $size_limit bytes: `model.jepa` and `$script` ($bytes_code bytes).

## Compliance

- No validation data in training: it reads fineweb_train_*.bin only; scores use fineweb_val_*.bin.
- $temperature
- One pass: each score goes over the validation set once and predicts every token once, from the
  tokens before it; the weights do not change meanwhile.
- Training took at most $training_seconds s, evaluation $evaluation_seconds s,
  on $hardware; $limit.
- The three commands above were run in a copy of this folder, elsewhere, with the training cut to
  $check_steps steps: the last one gave the scores of seed $best_seed to 1e-6.

## Pull request

1. Fork https://github.com/openai/parameter-golf, clone the fork, make a branch.
2. Copy this folder to records/$track_folder/ of the clone; add nothing else.
3. Commit, push, and open a pull request against openai/parameter-golf with the first section of
   this file as its text.
""")


def run_script(config: dict[str, Any]) -> str:
    """The run script whose published settings are nearest to this configuration."""
    if config["MIXER"] == "attention":
        return "run_bytejepa.sh"
    return f"run_jepa_{config['TOKENIZER']}.sh"


def files_beside(config: dict[str, Any]) -> list[str]:
    """The run script and what README's commands need, as paths relative to this repository.

    Raises UserError for missing files."""
    names = [run_script(config), *SHIPPED_BESIDE]
    if Path(config["DATA_PATH"]).name in DEMO_DATA:
        corpus = sorted(path for path in (ROOT / "data/demo").rglob("*") if path.is_file())
        names += [str(path.relative_to(ROOT)) for path in corpus] or ["data/demo"]
    if missing := [name for name in names if not (ROOT / name).is_file()]:
        raise UserError(f"{', '.join(missing)}: not found in {ROOT}; a submission needs it")
    return names


def shipped_tokenizer(config: dict[str, Any]) -> Path | None:
    """The run's SentencePiece model if the folder must hold it, because set-up does not make it."""
    made = {*DEMO_DATA, *(folder for _, folder, _ in HUB.values())}
    if config["TOKENIZER"] != "bpe" or Path(config["DATA_PATH"]).name in made:
        return None
    return Path(config["TOKENIZER_PATH"]).resolve()


def score_rows(facts: dict[str, Any], runs: Sequence[RunRecord]) -> list[list[str]]:
    """Table of the runs: scores that all of them have, times, bytes; then mean and deviation."""
    kinds = [kind for kind in reversed(SCORES) if all(run.score(kind) is not None for run in runs)]
    rows = [["seed", *(f"{SCORES[kind]} BPB" for kind in kinds), "steps", "ms/step", "training s",
             "evaluation s", "bytes"]]
    for run in runs:
        entry = facts["seed_results"][str(run.seed)]
        rows.append([str(run.seed), *(f"{run.score(kind):.6f}" for kind in kinds),
                     f"{entry['steps']:,}", f"{entry['ms_per_step']:.1f}",
                     f"{entry['train_seconds']:.1f}", f"{entry['eval_seconds']:.1f}",
                     f"{entry['bytes_total']:,}"])
    blank = [""] * 5
    columns = [[run.score(kind) for run in runs] for kind in kinds]
    rows.append(["mean", *(f"{np.mean(column):.6f}" for column in columns), *blank])
    if len(runs) > 1:
        rows.append(["std", *(f"{deviation(column):.6f}" for column in columns), *blank])
    return rows


# -----------------------------------------------------------------------------------------------
# README's commands: run scripts with what differs from their defaults
# -----------------------------------------------------------------------------------------------

def plain_environment() -> dict[str, str]:
    """This environment without knobs, with this interpreter in place of .venv."""
    plain = {name: os.environ[name] for name in PLAIN_ENVIRONMENT if name in os.environ}
    return plain | dict(SKIP_VENV="1", PYTHON=sys.executable)


@functools.cache
def script_settings(script: Path, arguments: tuple[str, ...]) -> dict[str, str]:
    """Values by name that a run script, started with `arguments`, sets by default.

    It is run with a stand-in for Python that writes down its environment."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "python"
        python.write_text('#!/bin/sh\nexec env -0 >"$0.env"\n')
        python.chmod(0o755)
        command = ["bash", str(script), *arguments, "MODE=describe"]
        done = subprocess.run(command, env=plain_environment() | dict(PYTHON=str(python)),
                              capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{script.name}: {(done.stderr.splitlines() or ['failed'])[-1]}")
        exported = dict(entry.partition("=")[::2]
                        for entry in Path(f"{python}.env").read_text().split("\0"))
    return {name: exported[name] for name in exported["RUN_SCRIPT_DEFAULTS"].split()[1:]}


def script_arguments(script: str, given: dict[str, str], values: dict[str, Any]) -> dict[str, str]:
    """`given` and the further arguments with which the run script trains at `values` (by knob)."""
    knobs = Config.knobs()
    while True:  # a default may depend on an argument: until nothing differs
        arguments = tuple(f"{name}={text}" for name, text in given.items())
        texts = script_settings(ROOT / script, arguments)
        other = {}
        for name, value in values.items():
            text = texts.get(name)
            default = parse_knob(name, knobs[name], text) if text else knobs[name].default
            if name not in given and default != value:
                other[name] = format_knob(value)
        if not other:
            return given
        given = given | other


def command_text(script: str, arguments: dict[str, str]) -> str:
    """bash SHIPPED_NAME NAME=value ..., a few to a line."""
    words = [f"{name}={shlex.quote(value) if value else ''}" for name, value in arguments.items()]
    lines = [" ".join(words[i:i + 5]) for i in range(0, len(words), 5)]
    return " \\\n    ".join([f"bash {script}", *lines])


def places(run: RunRecord) -> dict[str, str]:
    """Machine, data and tokenizer for the run script in the folder: where set-up puts them."""
    device = run.result.get("machine", {}).get("device_type", "auto")
    arguments = dict(PROFILE="cpu" if device == "cpu" else "gpu", DEVICE=device,
                     NPROC_PER_NODE=str(run.result["world_size"]),
                     DATA_PATH=f"data/datasets/{Path(run.config['DATA_PATH']).name}")
    if run.config["TOKENIZER"] == "bpe":
        name = Path(run.config["TOKENIZER_PATH"]).name
        arguments["TOKENIZER_PATH"] = f"data/tokenizers/{name}"
    return arguments


def training_command(run: RunRecord) -> str:
    """The run script with what differs from its defaults, in the preset that needs least."""
    script, config = run_script(run.config), run.config
    names = {*configuration(config), *Config.tagged("eval"), "SLIDING_EVAL", "EVAL_STATE"}
    given = dict(SEED=str(run.seed), RUN_ID=f"seed{run.seed}") | places(run)
    values = {name: config[name] for name in Config.knobs() if name in names and name in config
              and name not in ("DATA_PATH", "TOKENIZER_PATH")}
    forms = [script_arguments(script, given | preset, values)
             for preset in ({}, dict(PRESET="best"))]
    return command_text(script, min(forms, key=len))


def evaluation_command(run: RunRecord) -> str:
    """The run script with what repeats the run's scores from model.jepa."""
    arguments = dict(MODE="eval", ARTIFACT="model.jepa") | places(run)
    arguments |= {name: format_knob(run.config[name])
                  for name in Config.tagged("eval") if name in run.config}
    arguments |= dict(
        SLIDING_EVAL=str(int(run.score("sliding") is not None)),
        SLIDING_EVAL_STRIDE=str(run.result.get("sliding_stride") or 1),
        TEMP_SCALING=str(int(run.result.get("temperature") is not None)))
    return command_text(run_script(run.config), arguments)


def setup_command(config: dict[str, Any], data_path: Path) -> tuple[str, str]:
    """The command that makes environment and data, and a sentence about the data."""
    name = Path(config["DATA_PATH"]).name
    kinds = {folder: kind for kind, (_, folder, _) in HUB.items()}
    if name in DEMO_DATA:
        return "bash setup_jepa.sh demo", "The data is the corpus in `data/demo/`."
    if name in kinds:
        shards = len(list(data_path.glob("fineweb_train_*.bin")))
        return (f"FINEWEB_KINDS={kinds[name]} TRAIN_SHARDS={shards} bash setup_jepa.sh fineweb",
                "The data is the published FineWeb shards, which it downloads.")
    if name == "fineweb10B_sp1024_bytes":
        return ("bash setup_jepa.sh env", "The data is FineWeb in bytes: `bash setup_jepa.sh bytes`"
                " downloads and decodes the published shards.")
    return "bash setup_jepa.sh env", f"The shards in `data/datasets/{name}` are not part of it."


def temperature_sentence(run: RunRecord) -> str:
    """Where the temperature of the scores came from."""
    temperature = run.result.get("temperature")
    if temperature is None:
        return "No temperature is applied."
    if run.config.get("TEMP_CALIB"):
        return "The temperature was set by hand before scoring."
    return f"The temperature ({temperature:g} for seed {run.seed}) was chosen on training tokens."


def limit_clause(track: str, hardware: str) -> str:
    """What the track allows, and whether the runs used the track's hardware."""
    if track == "unlimited":
        return "no limit applies"
    clause = f"the track allows {TRACK_SECONDS} s for each"
    if not re.match(r"8 x .*H100[^,]*$", hardware):
        clause += ", on 8 x H100, which these runs did not use"
    return clause


def result_fields(facts: dict[str, Any], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Fields of README for scores, times and sizes."""
    entries = facts["seed_results"].values()
    return facts | dict(
        val_bpb=f"{facts['val_bpb']:.6f}", seed_count=len(runs),
        bytes_total=f"{facts['bytes_total']:,}", bytes_code=f"{facts['bytes_code']:,}",
        size_limit=f"{SIZE_LIMIT:,}", score_table=markdown_table(score_rows(facts, runs)),
        seeds=" ".join(map(str, facts["seeds"])), training_seconds=f"{facts['wallclock']:.1f}",
        evaluation_seconds=f"{max(entry['eval_seconds'] for entry in entries):.1f}",
        limit=limit_clause(facts["track"], facts["hardware"]))


def configuration_fields(run: RunRecord, runs: Sequence[RunRecord],
                         data_path: Path) -> dict[str, Any]:
    """Fields of README for the configuration and the commands that reproduce it."""
    config, result = run.config, run.result
    mixers = {"mamba2": "Mamba-2", "attention": "attention"}
    first, command = config["VAL_MAX_TOKENS"], setup_command(config, data_path)
    others = [f"SEED={other.seed} RUN_ID=seed{other.seed}" for other in runs if other is not run]
    beside = [name for name in files_beside(config)[1:] if not name.startswith("data/demo")]
    if Path(config["DATA_PATH"]).name in DEMO_DATA:
        beside.append("data/demo/")
    if tokenizer := shipped_tokenizer(config):
        beside.append(f"data/tokenizers/{tokenizer.name}")
    return dict(
        validation_part=f"the first {first:,} tokens (not the whole) of" if first else "all of",
        data_name=Path(config["DATA_PATH"]).name, num_layers=config["NUM_LAYERS"],
        mixers=mixers.get(config["MIXER"], f"mixed ({config['MIXER']})"),
        model_dim=config["MODEL_DIM"], vocab_size=f"{config['VOCAB_SIZE']:,}",
        stored_parameters=f"{result['eval_params']:,}",
        training_parameters=f"{result['train_only_params']:,}",
        batch_tokens=f"{config['TRAIN_BATCH_TOKENS']:,}",
        sequence_tokens=f"{config['TRAIN_SEQ_LEN']:,}", quant_bits=config["QUANT_BITS"],
        setup_command=command[0], data_sentence=command[1],
        training_command=training_command(run), evaluation_command=evaluation_command(run),
        other_seeds=", ".join(f"`{words}`" for words in others) or "other values of SEED, RUN_ID",
        run_script=run_script(config), script=SHIPPED_NAME, script_sha256=result["script_sha256"],
        best_seed=run.seed, shipped_beside=", ".join(f"`{name}`" for name in beside),
        check_steps=min(CHECK_STEPS, config["ITERATIONS"]), temperature=temperature_sentence(run))


def submission_readme(facts: dict[str, Any], runs: Sequence[RunRecord], best: RunRecord,
                      data_path: Path) -> str:
    """README.md of the folder: results, configuration, reproduction, contents, compliance."""
    return README.substitute(
        result_fields(facts, runs) | configuration_fields(best, runs, data_path)
        | dict(track_folder=f"track_{facts['track']}"))


# -----------------------------------------------------------------------------------------------
# check of the folder
# -----------------------------------------------------------------------------------------------

def say(line: str) -> None:
    """A line about the progress, on stderr."""
    print(f"submit.py: {line}", file=sys.stderr, flush=True)


def readme_commands(readme: str) -> list[str]:
    """The commands in README's bash blocks, in order."""
    return re.findall(r"^```bash\n(.*?)\n```$", readme, re.M | re.S)


def shortened(command: str) -> str:
    """A training command with at most CHECK_STEPS iterations."""
    match = re.search(r"\bITERATIONS=(\d+)", command)
    if not match:
        return f"{command} ITERATIONS={CHECK_STEPS}"
    steps = min(int(match[1]), CHECK_STEPS)
    return f"{command[:match.start(1)]}{steps}{command[match.end(1):]}"


def run_command(command: str, folder: Path, label: str) -> tuple[int, str]:
    """Run a shell command in `folder`, where nothing else of this environment is known.

    Says on stderr every PROGRESS_SECONDS how far it is. Returns exit code and output."""
    started, path = time.monotonic(), folder.parent / "output"
    with open(path, "wb") as output:
        process = subprocess.Popen(["bash", "-c", command], cwd=folder, env=plain_environment(),
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                try:
                    process.wait(PROGRESS_SECONDS)
                except subprocess.TimeoutExpired:
                    last = (path.read_text(errors="replace").split("\n")[:-1] or ["no output"])[-1]
                    say(f"{label}: {time.monotonic() - started:.0f} s: {last.strip()[:100]}")
        finally:
            if process.poll() is None:  # this process is being stopped
                process.terminate()
                process.wait()
    say(f"{label}: {time.monotonic() - started:.0f} s, ended with {process.returncode}")
    return process.returncode, path.read_text(errors="replace")


def link_data(copy: Path, run: RunRecord, data_path: Path) -> None:
    """Links to the run's shards and tokenizer where the folder's commands expect them, except for
    the demo corpus, from which set-up makes both."""
    data_name, tokenizer = Path(run.config["DATA_PATH"]).name, shipped_tokenizer(run.config)
    if data_name in DEMO_DATA:
        return
    links = {copy / f"data/datasets/{data_name}/{path.name}": path
             for path in data_path.iterdir() if path.is_file() and not path.name.startswith(".")}
    if run.config["TOKENIZER"] == "bpe" and not tokenizer:
        path = Path(run.config["TOKENIZER_PATH"]).resolve()
        links[copy / f"data/tokenizers/{path.name}"] = path
    for link, path in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def last_object(output: str) -> dict[str, Any] | None:
    """The JSON object in the last line that looks like one; None if there is none."""
    try:
        return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    except (IndexError, ValueError):
        return None


def run_readme(folder: Path, run: RunRecord, data_path: Path) -> dict[str, Any]:
    """Run the commands of README in a copy of `folder`; the scores that the last one prints.

    Raises UserError if one fails. Set-up without network is no failure: the data is in place."""
    commands = readme_commands((folder / "README.md").read_text(encoding="utf-8"))
    commands[1] = shortened(commands[1])
    with tempfile.TemporaryDirectory(prefix="submission-") as elsewhere:
        copy = Path(shutil.copytree(folder, Path(elsewhere) / "copy"))
        link_data(copy, run, data_path)
        for i, (name, command) in enumerate(zip(("set-up", "training", "evaluation"), commands)):
            label = f"check {i + 1} of 3, {name}"
            first_line = command.splitlines()[0].removesuffix(" \\")
            say(f"{label}, in a copy of the folder: {first_line}")
            code, output = run_command(command, copy, label)
            if code == 3 and i == 0:
                say(f"{label}: no network; the data of the run takes its place")
            elif code:
                lines = [line for line in output.splitlines() if line.strip()]
                own = [line for line in lines if re.match(r"[\w.]+\.(py|sh): ", line)]
                reason = (own or lines or ["it said nothing"])[-1]
                raise UserError(f"not submitted: README's command for the {name}, run in a copy "
                                f"of the folder, ended with {code}: {reason}")
            if i == 1 and not read_run(copy / f"runs/seed{run.seed}").finished:
                raise UserError(f"not submitted: README's training left no score in "
                                f"runs/seed{run.seed} of a copy of the folder")
        scores = last_object(output)
    if scores is None:
        raise UserError("not submitted: README's evaluation did not end with scores as JSON")
    return scores


def verify_copy(folder: Path, run: RunRecord, data_path: Path) -> dict[str, Any]:
    """Scores of a copy of `folder`; UserError unless they are the run's."""
    scores, wrong = run_readme(folder, run, data_path), []
    for name in (*(f"{kind}_val_bpb" for kind in reversed(SCORES)), "temperature"):
        stated, repeated = run.result.get(name), scores.get(name)
        if stated is None:
            continue
        if not isinstance(repeated, (int, float)) or not abs(repeated - stated) <= 1e-6:
            wrong.append(f"{name} {repeated} instead of {stated}")
    if wrong:
        raise UserError(f"not submitted: the artifact of {run.path}, evaluated alone, gives "
                        f"{'; '.join(wrong)}")
    return scores


# -----------------------------------------------------------------------------------------------
# the folder, and main
# -----------------------------------------------------------------------------------------------

def fill_folder(folder: Path, facts: dict[str, Any], runs: Sequence[RunRecord],
                best: RunRecord, data_path: Path) -> None:
    """Write every file of the submission into `folder`, which is new."""
    for name in files_beside(best.config):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    launcher = (folder / "tools/launch.sh").read_text(encoding="utf-8")
    default = "TRAIN_SCRIPT:=train_jepa.py"
    if launcher.count(default) != 1:
        raise UserError(f"tools/launch.sh: one line with {default} was expected")
    launcher = launcher.replace(default, f"TRAIN_SCRIPT:={SHIPPED_NAME}")
    write_atomically(folder / "tools/launch.sh", launcher.encode())
    if tokenizer := shipped_tokenizer(best.config):
        (folder / "data/tokenizers").mkdir(parents=True)
        shutil.copyfile(tokenizer, folder / "data/tokenizers" / tokenizer.name)
    for run in runs:
        shutil.copyfile(run.path / "log.txt", folder / f"train_seed{run.seed}.log")
    shutil.copyfile(best.path / "model.jepa", folder / "model.jepa")
    write_atomically(folder / SHIPPED_NAME, shipped_script(source_text()))
    write_atomically(folder / "submission.json", (json.dumps(facts, indent=2) + "\n").encode())
    readme = submission_readme(facts, runs, best, data_path)
    write_atomically(folder / "README.md", readme.encode())


def output_folder(settings: Settings, facts: dict[str, Any]) -> Path:
    """OUT, or a folder named by track, date and title; UserError where something else is there."""
    title = re.sub(r"[^\w.-]+", "-", facts["name"]).strip("-.") or "submission"
    track = TRACK_FOLDERS[settings.track]
    out = Path(settings.out or f"submissions/records/{track}/{facts['date']}_{title}")
    replaceable = settings.overwrite and (out / "submission.json").exists()
    if out.exists() and not replaceable:
        raise UserError(f"OUT={out}: exists already; choose another folder, or OVERWRITE=1 over an "
                        "earlier submission")
    return out


def data_folder(settings: Settings, run: RunRecord) -> Path:
    """DATA_PATH, or that of the run; UserError if it is missing and set-up cannot make it."""
    path = Path(settings.data_path or run.config["DATA_PATH"]).resolve()
    if not path.is_dir() and Path(run.config["DATA_PATH"]).name not in DEMO_DATA:
        raise UserError(f"DATA_PATH={path}: no such folder; checking the submission needs the "
                        "data of the run")
    return path


def submit(settings: Settings) -> dict[str, Any]:
    """Write the submission folder of the runs and check it from a copy; returns the report.

    All or nothing: the folder is made elsewhere and moved only when the check has repeated the
    scores."""
    runs = find_runs(settings.run, "RUN")
    if faults := submission_faults(settings, runs):
        raise UserError("\n".join(faults))
    runs.sort(key=lambda run: run.seed)
    best = min(runs, key=lambda run: run.score(run.kind))
    for run in runs:
        check_vocabulary(run)
    facts = submission_facts(settings, runs)
    out, data_path = output_folder(settings, facts), data_folder(settings, best)
    existing = next(folder for folder in out.resolve().parents if folder.is_dir())
    temporary = existing / f".{out.name}.{os.getpid()}.tmp"  # on the same file system
    try:
        temporary.mkdir()
        fill_folder(temporary, facts, runs, best, data_path)
        scores = verify_copy(temporary, best, data_path)
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    print(f"submission: {out}  val_bpb:{facts['val_bpb']:.6f}  {facts['bytes_total']:,} bytes, "
          f"verified in a copy; its README.md says how it becomes a pull request")
    return dict(out=str(out), files=files, verified=scores, **facts)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool("submit.py", __doc__, Settings, submit, argv)


if __name__ == "__main__":
    sys.exit(main())
