#!/usr/bin/env python3
"""submit.py: runs of one configuration as a submission folder of the 16 MB challenge.

    python tools/submit.py RUN="runs/s42 runs/s43 runs/s44" AUTHOR="Full Name" GITHUB_ID=account

Writes artifact, script, logs, submission.json and README.md into OUT. The folder appears only when
MODE=eval in a copy of it, elsewhere and alone, has repeated the scores of the best run. The last
line of stdout is JSON. Settings are NAME=value arguments or environment variables (arguments win).
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
    run_tool,
)

from train_jepa import (  # noqa: E402
    SIZE_LIMIT,
    Config,
    UserError,
    differences,
    file_hash,
    format_knob,
    knob,
    source_text,
    write_atomically,
)

TRACK_SECONDS = 600  # of the 10-minute track: for training, and again for evaluation
SCRIPT = "train_jepa.py"  # the training script's name in the folder
# What the run script and set-up need beside them, by paths relative to their own folder.
SHIPPED_BESIDE = ("requirements.txt", "setup_jepa.sh", "tools/launch.sh", "tools/prepare_data.py")
# Knobs that the check of the artifact takes from the run, so that batches have the shapes of the
# run and sums its order.
EVAL_KNOBS = Config.tagged("eval")
# What the check's process may see of this environment: no knob, no rank, no PYTHONPATH.
PLAIN_ENVIRONMENT = ("PATH HOME USER LANG TMPDIR LD_LIBRARY_PATH CUDA_HOME CUDA_VISIBLE_DEVICES "
                     "OMP_NUM_THREADS TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR").split()


@dataclass(frozen=True)
class Settings:
    """Settings of submit.py."""
    run: str = knob("", "run folders of the submission, globs allowed, one per seed")
    out: str = knob("", "folder to write (empty: submissions/ and the title)")
    track: str = knob("10min", "challenge track", choices="10min unlimited")
    author: str = knob("", "author of the submission")
    github_id: str = knob("", "GitHub name of the author")
    submission_name: str = knob("", "title (empty: made from the configuration)")
    blurb: str = knob("", "a sentence about the submission (empty: made from the configuration)")
    data_path: str = knob("", "folder of shards for the check (empty: that of the run)")
    overwrite: bool = knob(False, "1 = replace an earlier submission in OUT")


def shipped_script() -> bytes:
    """The training script as the folder holds it, which is also what counts as code."""
    return source_text().encode()


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
    total = artifact.stat().st_size + len(shipped_script())
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

def seed_facts(run: RunRecord, kind: str, code_bytes: int) -> dict[str, Any]:
    """Entry of one run in submission.json."""
    stored = (run.path / "model.jepa").stat().st_size
    facts = dict(val_loss=run.result[f"{kind}_val_loss"], val_bpb=run.score(kind))
    facts |= {f"{name}_val_bpb": run.score(name) for name in SCORES}
    for name in ("temperature", "sliding_stride", "steps", "ms_per_step", "train_seconds",
                 "eval_seconds"):
        facts[name] = run.result.get(name)
    return facts | dict(artifact_bytes=stored, bytes_total=stored + code_bytes)


def submission_facts(settings: Settings, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """submission.json. Scores are means over seeds; bytes and wallclock are the largest of any."""
    config, kind, code_bytes = runs[0].config, runs[0].kind, len(shipped_script())
    size = f"{config['NUM_LAYERS']}x{config['MODEL_DIM']}"
    system = "transformer" if config["MIXER"] == "attention" else "Mamba-2"
    seeds = {str(run.seed): seed_facts(run, kind, code_bytes) for run in runs}

    def column(name: str) -> list:
        return [facts[name] for facts in seeds.values()]

    machines = {f"{run.result['world_size']} x {run.result['device']}" for run in runs}
    return dict(
        author=settings.author, github_id=settings.github_id,
        name=settings.submission_name or f"JEPA {system} {size} {config['TOKENIZER']}",
        blurb=settings.blurb or f"{system} language model ({size}) with latent prediction beside "
                                "the cross-entropy, trained on its own storage grid.",
        date=f"{datetime.now():%Y-%m-%d}", track=settings.track,
        val_loss=float(np.mean(column("val_loss"))), val_bpb=float(np.mean(column("val_bpb"))),
        val_bpb_std=deviation(column("val_bpb")), scoring=SCORES[kind],
        bytes_total=max(column("bytes_total")), bytes_code=code_bytes,
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
matrices are stored in $quant_bits bits. The command below lists every knob that differs from its
default; the logs list all knobs.

## How to reproduce

`bash setup_jepa.sh` installs the environment and the data. Then, in this folder:

    for seed in $seeds; do $launcher $script SEED=$$seed RUN_ID=seed$$seed \\
$training_knobs; done

`bash $run_script` starts the same script with the published settings of its kind. This command
scores the artifact alone:

    $launcher $script \\
$evaluation_knobs

## What is included

- `$script` as run (sha256 $script_sha256)
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
- MODE=eval in a copy of this folder, elsewhere, gave the scores of seed $best_seed to 1e-6.
""")


def run_script(config: dict[str, Any]) -> str:
    """The run script whose published settings are nearest to this configuration."""
    if config["MIXER"] == "attention":
        return "run_bytejepa.sh"
    return f"run_jepa_{config['TOKENIZER']}.sh"


def files_beside(config: dict[str, Any]) -> list[str]:
    """The run script and what it needs, as paths relative to this repository.

    Raises UserError for a missing file; of tools/, those that exist are taken."""
    names = [run_script(config), *SHIPPED_BESIDE]
    present = [name for name in names if (ROOT / name).is_file()]
    missing = [name for name in names if name not in present and not name.startswith("tools/")]
    if missing:
        raise UserError(f"{', '.join(missing)}: not found beside {SCRIPT}; a submission needs it")
    return present


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


def shell_lines(knobs: dict[str, str]) -> str:
    """Indented lines of a few NAME=value each, joined as the shell does; without empty values."""
    words = [f"{name}={value}" for name, value in knobs.items() if value]
    lines = ["    " + " ".join(words[i:i + 5]) for i in range(0, len(words), 5)]
    return " \\\n".join(lines)


def training_knobs(config: dict[str, Any]) -> dict[str, str]:
    """What differs from the defaults, with data and tokenizer where set-up puts them."""
    defaults = {name: f.default for name, f in Config.knobs().items()}
    values = configuration(config)
    values |= {name: config[name] for name in ("SLIDING_EVAL", "EVAL_STATE", "EVAL_ADAPT")
               if name in config}
    knobs = {name: format_knob(value) for name, value in values.items()
             if value != defaults.get(name)}
    knobs["DATA_PATH"] = f"data/datasets/{Path(config['DATA_PATH']).name}"
    if knobs.pop("TOKENIZER_PATH", ""):
        knobs["TOKENIZER_PATH"] = f"data/tokenizers/{Path(config['TOKENIZER_PATH']).name}"
    return knobs


def evaluation_knobs(run: RunRecord, data_path: str) -> dict[str, str]:
    """What repeats the run's scores from model.jepa: from its result where that says it."""
    knobs = dict(MODE="eval", ARTIFACT="model.jepa", DATA_PATH=data_path)
    knobs |= {name: format_knob(run.config[name]) for name in EVAL_KNOBS if name in run.config}
    return knobs | dict(
        DEVICE=run.result.get("machine", {}).get("device_type", "auto"),
        SLIDING_EVAL=str(int(run.score("sliding") is not None)),
        SLIDING_EVAL_STRIDE=str(run.result.get("sliding_stride") or 1),
        TEMP_SCALING=str(int(run.result.get("temperature") is not None)))


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


def configuration_fields(run: RunRecord) -> dict[str, Any]:
    """Fields of README for the configuration and the commands that reproduce it."""
    config, result = run.config, run.result
    mixers = {"mamba2": "Mamba-2", "attention": "attention"}
    first, ranks = config["VAL_MAX_TOKENS"], result["world_size"]
    knobs, beside = training_knobs(config), files_beside(config)[1:]
    return dict(
        validation_part=f"the first {first:,} tokens (not the whole) of" if first else "all of",
        data_name=Path(knobs["DATA_PATH"]).name, num_layers=config["NUM_LAYERS"],
        mixers=mixers.get(config["MIXER"], f"mixed ({config['MIXER']})"),
        model_dim=config["MODEL_DIM"], vocab_size=f"{config['VOCAB_SIZE']:,}",
        stored_parameters=f"{result['eval_params']:,}",
        training_parameters=f"{result['train_only_params']:,}",
        batch_tokens=f"{config['TRAIN_BATCH_TOKENS']:,}",
        sequence_tokens=f"{config['TRAIN_SEQ_LEN']:,}", quant_bits=config["QUANT_BITS"],
        launcher="python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}",
        training_knobs=shell_lines(knobs), run_script=run_script(config),
        evaluation_knobs=shell_lines(evaluation_knobs(run, knobs["DATA_PATH"])), script=SCRIPT,
        script_sha256=result["script_sha256"], best_seed=run.seed,
        shipped_beside=", ".join(f"`{name}`" for name in beside),
        temperature=temperature_sentence(run))


def submission_readme(facts: dict[str, Any], runs: Sequence[RunRecord], best: RunRecord) -> str:
    """README.md of the folder: results, configuration, reproduction, contents, compliance."""
    return README.substitute(result_fields(facts, runs) | configuration_fields(best))


# -----------------------------------------------------------------------------------------------
# check of the folder, and main
# -----------------------------------------------------------------------------------------------

def evaluate_copy(folder: Path, run: RunRecord, data_path: Path) -> dict[str, Any]:
    """Scores of MODE=eval in a copy of `folder` with a clean environment; UserError if it fails."""
    ranks = run.result["world_size"]
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    knobs = evaluation_knobs(run, str(data_path))
    command += [SCRIPT, *(f"{name}={value}" for name, value in knobs.items())]
    environment = {name: os.environ[name] for name in PLAIN_ENVIRONMENT if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="submission-") as elsewhere:
        copy = shutil.copytree(folder, Path(elsewhere) / "copy")
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failure = "not submitted: MODE=eval in a copy of the folder"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        own = [line for line in lines if line.startswith(f"{SCRIPT}:")]
        reason = (own or lines or ["it said nothing"])[-1]
        raise UserError(f"{failure} ended with {done.returncode}: {reason}")
    try:
        return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    except (IndexError, ValueError):
        raise UserError(f"{failure} did not end with scores as JSON") from None


def verify_copy(folder: Path, run: RunRecord, data_path: Path) -> dict[str, Any]:
    """Scores of a copy of `folder`; UserError unless they are the run's."""
    scores, wrong = evaluate_copy(folder, run, data_path), []
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


def fill_folder(folder: Path, facts: dict[str, Any], runs: Sequence[RunRecord],
                best: RunRecord) -> None:
    """Write every file of the submission into `folder`, which is new."""
    for name in files_beside(best.config):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for run in runs:
        shutil.copyfile(run.path / "log.txt", folder / f"train_seed{run.seed}.log")
    shutil.copyfile(best.path / "model.jepa", folder / "model.jepa")
    write_atomically(folder / SCRIPT, shipped_script())
    write_atomically(folder / "submission.json", (json.dumps(facts, indent=2) + "\n").encode())
    write_atomically(folder / "README.md", submission_readme(facts, runs, best).encode())


def output_folder(settings: Settings, title: str) -> Path:
    """OUT, or a folder named by the title; UserError where something else is in the way."""
    name = re.sub(r"[^\w.-]+", "-", title).strip("-.") or "submission"
    out = Path(settings.out or f"submissions/{name}")
    replaceable = settings.overwrite and (out / "submission.json").exists()
    if out.exists() and not replaceable:
        raise UserError(f"OUT={out}: exists already; choose another folder, or OVERWRITE=1 over an "
                        "earlier submission")
    return out


def submit(settings: Settings) -> dict[str, Any]:
    """Write the submission folder of the runs and check it from a copy; returns the report.

    All or nothing: the folder is made under another name and renamed only when the check has
    repeated the scores."""
    runs = find_runs(settings.run, "RUN")
    if faults := submission_faults(settings, runs):
        raise UserError("\n".join(faults))
    runs.sort(key=lambda run: run.seed)
    best = min(runs, key=lambda run: run.score(run.kind))
    facts = submission_facts(settings, runs)
    out = output_folder(settings, facts["name"])
    data_path = Path(settings.data_path or best.config["DATA_PATH"]).resolve()
    if not data_path.is_dir():
        raise UserError(f"DATA_PATH={data_path}: no such folder; checking the submission needs the "
                        "data of the run")
    files_beside(best.config)  # a missing file is reported before anything is written
    temporary = out.resolve().with_name(f".{out.resolve().name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        fill_folder(temporary, facts, runs, best)
        print(f"checking a copy of the folder by MODE=eval (seed {best.seed})", file=sys.stderr,
              flush=True)
        scores = verify_copy(temporary, best, data_path)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    print(f"submission: {out}  val_bpb:{facts['val_bpb']:.6f}  {facts['bytes_total']:,} bytes, "
          "verified in a copy")
    return dict(out=str(out), files=files, verified=scores, **facts)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool("submit.py", __doc__, Settings, submit, argv)


if __name__ == "__main__":
    sys.exit(main())
