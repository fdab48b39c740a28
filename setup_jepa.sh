#!/usr/bin/env bash
# Environment and data for train_jepa.py. Safe to repeat: what is there and sound is left alone, the rest is made.
#
#   bash setup_jepa.sh            .venv; then FineWeb where a CUDA device and the network are there, else the demo
#   bash setup_jepa.sh fineweb    .venv; published FineWeb shards (BPE sp8192 and bytes) with their tokenizer
#   bash setup_jepa.sh demo       .venv; shards of both kinds from the embedded corpus in data/demo/
#   bash setup_jepa.sh bytes      .venv; byte shards decoded from SentencePiece shards (FineWeb sp1024, else the demo)
#   bash setup_jepa.sh text       .venv; shards of both kinds from a text of your own (TEXT_PATH)
#   bash setup_jepa.sh env        .venv only
#
# Environment knobs (relative paths count from this folder):
#   PYTHON            interpreter that .venv is made with (3.11 to 3.13; default: the first such one found)
#   SKIP_VENV=1       no .venv: take PYTHON (default python3) as it is and install nothing
#   TRAIN_SHARDS      at most so many training shards (default: all)
#   FINEWEB_KINDS     what `fineweb` fetches (default: "sp8192 bytes"; sp1024 too)
#   SOURCE_PATH, SOURCE_TOKENIZER, BYTES_PATH    `bytes`: folder of SentencePiece shards, their model, output folder
#   TEXT_PATH, TEXT_NAME          `text`: UTF-8 text, plain or .xz, pieces separated by a line with one form feed (the
#                                 first 2% of them become validation); folders data/datasets/NAME_sp8192, NAME_bytes
#   TEXT_PIECE        `text`: 0 (default): the pieces as they are; N: cut before paragraphs into documents of about N
#                     characters, in a fixed random order. A small batch then sees several of them, as a large one does
#
# The run scripts source this file for its functions; set-up itself starts only when it is executed.

VENV=.venv
STAMP=$VENV/.jepa-requirements          # hash of requirements.txt, written once everything in it is installed
MAMBA_SSM=2.3.2.post1
SELF=$(basename "$0")
if [[ -n "${SKIP_VENV-}" && "${SKIP_VENV-}" != 0 ]]; then PY=${PYTHON:-python3}; else PY=$VENV/bin/python; fi

note() { echo "$SELF: $*"; }
die() { echo "$SELF: $1" >&2; exit "${2:-1}"; }

# ---------------------------------------------------------------------------------------------- environment

requirements_hash() { sha256sum requirements.txt | cut -d' ' -f1; }

env_ready() {
    [[ -n "${SKIP_VENV-}" && "${SKIP_VENV-}" != 0 ]] && return 0
    [[ -x $PY && -f $STAMP && "$(<"$STAMP")" == "$(requirements_hash)" ]] && "$PY" -c '' 2>/dev/null
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n "${PYTHON-}" ]]; then
        supported "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13"
        echo "$PYTHON"; return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    die "no Python 3.11, 3.12 or 3.13 found; install one or name it: PYTHON=/path/to/python3 bash setup_jepa.sh"
}

make_venv() {
    local python version='import sys; print(sys.version_info[:2])'
    if "$PY" -m pip --version >/dev/null 2>&1; then
        [[ -z "${PYTHON-}" || "$("$PY" -c "$version")" == "$("$PYTHON" -c "$version" 2>/dev/null)" ]] && return
        note "$VENV has another Python version than PYTHON=$PYTHON: making it anew"
    elif [[ -e $VENV || -L $VENV ]]; then
        note "$VENV is incomplete: making it anew"
    fi
    python=$(find_python)
    if [[ -L $VENV || ! -d $VENV ]]; then rm -f "$VENV"; fi    # a dangling link or a plain file in the way
    "$python" -m venv --clear "$VENV" ||
        die "$python -m venv failed (on Debian and Ubuntu it needs the package python3-venv); or set PYTHON"
}

mamba_ready() {
    "$PY" -c 'import sys; from importlib.metadata import version; sys.exit(version("mamba_ssm") != sys.argv[1])' \
        "$MAMBA_SSM" 2>/dev/null
}

# Pure Python: its SSD kernels are Triton, so no nvcc and no compile. Its own requirements (transformers and more)
# are for parts that are not used here.
install_mamba() {
    mamba_ready && return
    note "installing mamba-ssm $MAMBA_SSM without its CUDA build"
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "$PY" -m pip install -q --disable-pip-version-check \
        --no-deps --no-build-isolation "mamba-ssm==$MAMBA_SSM" ||
        note "warning: mamba-ssm could not be installed; the trainer runs without it, tests that compare with it skip"
}

make_env() {
    if [[ -n "${SKIP_VENV-}" && "${SKIP_VENV-}" != 0 ]]; then return; fi
    make_venv
    if ! env_ready; then
        note "installing requirements.txt into $VENV"
        local quiet=-q
        [[ -t 1 ]] && quiet=
        "$PY" -m pip install $quiet --disable-pip-version-check -r requirements.txt ||
            die "pip could not install requirements.txt (see above); repeat this command: what is there stays"
    fi
    install_mamba
    requirements_hash >"$STAMP.tmp" && mv "$STAMP.tmp" "$STAMP"
}

cuda_devices() { "$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'; }

# --------------------------------------------------------------------------------------------- run scripts

# PRESET=best of system A, which run_experiments.sh measures: a latent of 16 dimensions that keeps its rank
# (decorrelated, no gradient through the targets); rows that go on where they ended, in training and in the evaluation,
# one pass in place of sliding; the activation; LR that ends at a tenth; the storage grid for the last part only.
NARROW_LATENT="JEPA_DIM=16 JEPA_COV=1 DETACH_TARGETS=1"
BEST_A="$NARROW_LATENT CARRY_STATE=1 EVAL_STATE=carry SLIDING_EVAL=0 ACTIVATION=leaky_relu2 MIN_LR=0.1 QAT_FRACTION=0.3"

# default_to NAME=VALUE...: exports those whose name is not set yet.
default_to() {
    local word
    for word in "$@"; do [[ -v ${word%%=*} ]] || export "${word?}"; done
}

# Arguments KEY=VALUE win over the environment. Those that the scripts themselves read are exported here; all but the
# scripts' own names are passed on to train_jepa.py.
take_arguments() {
    local argument
    USER_NAMES=" $(compgen -e | tr '\n' ' ') "
    ARGS=()
    for argument in "$@"; do
        case "${argument%%=*}" in
        PROFILE | PRESET | NPROC_PER_NODE | TORCHRUN_ARGS | SKIP_VENV | PYTHON)
            export "${argument?}"
            continue ;;
        MODE | DRY_RUN | DATA_PATH | TOKENIZER_PATH | MAX_WALLCLOCK_SECONDS | ITERATIONS | MICRO_BATCHES)
            [[ $argument == *=* ]] && export "${argument?}" ;;
        esac
        ARGS+=("$argument")
    done
    if [[ -n "${SKIP_VENV-}" && "${SKIP_VENV-}" != 0 ]]; then PY=${PYTHON:-python3}; fi
}

# True where the configuration or the help text is all that is asked for: no data, one process.
only_describes() {
    local mode=${MODE-}
    [[ ${mode,,} == describe || " ${ARGS[*]-} " == *" --help "* || " ${ARGS[*]-} " == *" -h "* ]] ||
        [[ -n "${DRY_RUN-}" && "${DRY_RUN-}" != 0 && "${DRY_RUN-}" != false ]]
}

# Sets and exports PROFILE and PRESET, and GPUS; says in one line which and why. An empty value means the default.
choose_profile() {
    local why="by request" count=""
    case "${PROFILE:=auto}" in auto | gpu | cpu) ;; *) die "PROFILE=$PROFILE: it is auto, gpu or cpu" 2 ;; esac
    case "${PRESET:=published}" in
    published | best) ;; *) die "PRESET=$PRESET: it is published or best" 2 ;; esac
    if [[ -n "${NPROC_PER_NODE-}" && ! "$NPROC_PER_NODE" =~ ^[1-9][0-9]*$ ]]; then
        die "NPROC_PER_NODE=$NPROC_PER_NODE: it is a number of ranks, 1 or more" 2
    fi
    env_ready || bash setup_jepa.sh env || exit
    GPUS=0
    if [[ $PROFILE == auto ]] || { [[ $PROFILE == gpu ]] && ! only_describes; }; then
        GPUS=$(cuda_devices) || die "$PY cannot import torch; repair with: rm -rf .venv; bash setup_jepa.sh env"
        count="$GPUS CUDA device(s)"
        [[ $GPUS == 0 ]] && count="no CUDA device found"
    fi
    if [[ $PROFILE == auto ]]; then
        why="auto: $count"
        if [[ $GPUS == 0 ]]; then PROFILE=cpu; else PROFILE=gpu; fi
    elif [[ $PROFILE == gpu && -n $count ]]; then
        why="by request; $count"
    fi
    [[ $PROFILE == cpu ]] && why="$why; small model, demo corpus, about two minutes of training"
    note "PROFILE=$PROFILE ($why), PRESET=$PRESET"
    export PROFILE PRESET
}

complete_data() { compgen -G "$1/fineweb_train_*.bin" >/dev/null && compgen -G "$1/fineweb_val_*.bin" >/dev/null &&
    [[ ! -e $1/.partial ]]; }

first_complete() {
    local folder
    for folder in "$@"; do if complete_data "$folder"; then echo "$folder"; return; fi; done
    return 1
}

# choose_data DEMO FINEWEB...: defaults of DATA_PATH and TOKENIZER_PATH, folders below data/datasets. Under the gpu
# profile the first FineWeb folder that is complete, fetched if need be; the demo where set-up cannot do that.
choose_data() {
    local demo=data/datasets/$1 fineweb=("${@:2}") found=
    fineweb=("${fineweb[@]/#/data/datasets/}")
    if [[ ! -v DATA_PATH ]]; then
        if ! only_describes && [[ ! "${MODE-}" =~ ^(bench|sample|submit|compare)$ ]]; then    # those read no shards
            if [[ $PROFILE == cpu ]]; then
                complete_data "$demo" || bash setup_jepa.sh demo || exit
            elif ! first_complete "${fineweb[@]}" >/dev/null; then
                FINEWEB_KINDS="${FINEWEB_KINDS-${2#fineweb10B_}}" bash setup_jepa.sh || exit
            fi
        fi
        if [[ $PROFILE == gpu ]] && found=$(first_complete "${fineweb[@]}"); then
            export DATA_PATH=./$found
        else
            export DATA_PATH=./$demo
            [[ $PROFILE == gpu ]] && ! only_describes &&
                note "no FineWeb in ${fineweb[0]}: training on the demo corpus (bash setup_jepa.sh fineweb gets it)"
        fi
    fi
    # The demo shards are made with the embedded model, whatever tokenizer was downloaded since.
    local tokenizer=data/tokenizers/fineweb_8192_bpe.model
    [[ $DATA_PATH == "./$demo" || ! -f $tokenizer ]] && tokenizer=data/demo/fineweb_8192_bpe.model
    export TOKENIZER_PATH="${TOKENIZER_PATH-./$tokenizer}"
}

# Replaces this shell by the training: one process, or torchrun with one rank per GPU. A number of GPUs that does not
# divide MICRO_BATCHES is rounded down to one that does; NPROC_PER_NODE is taken as it is. TORCHRUN_ARGS (several
# machines, restarts) stands in place of --standalone.
launch() {
    local ranks=${NPROC_PER_NODE:-$GPUS} micro=${MICRO_BATCHES:-8} name defaults=$SELF
    for name in $(compgen -e); do
        if [[ $USER_NAMES != *" $name "* && " ${ARGS[*]-}" != *" $name="* ]]; then defaults+=" $name"; fi
    done
    export RUN_SCRIPT_DEFAULTS=$defaults    # script and the names it set: the trainer reports where a value came from
    if only_describes || [[ $PROFILE == cpu && -z "${NPROC_PER_NODE-}" || $ranks == 0 ]]; then ranks=1; fi
    if [[ -z "${NPROC_PER_NODE-}" && $ranks -gt 1 && $micro =~ ^[1-9][0-9]*$ ]]; then
        while ((micro % ranks)); do ((ranks--)); done
        if ((ranks != GPUS)); then note "$ranks of $GPUS GPUs used: the ranks must divide MICRO_BATCHES=$micro"; fi
    fi
    if [[ $ranks == 1 ]] && { [[ -z "${TORCHRUN_ARGS-}" ]] || only_describes; }; then
        exec "$PY" train_jepa.py ${ARGS[@]+"${ARGS[@]}"}
    fi
    # shellcheck disable=SC2086 — arguments are words
    exec "$PY" -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node="$ranks" train_jepa.py \
        ${ARGS[@]+"${ARGS[@]}"}
}

# ---------------------------------------------------------------------------------------------------- data

data_tool() {
    "$PY" - "$@" <<'PYTHON'
"""Shards in the challenge's format: 256 little-endian int32 (magic, version, token count, rest 0), uint16 tokens."""
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
BOS = 1                      # begins each document in SentencePiece shards
MARK = 0                     # byte shards: begins each document and costs no bytes; a NUL of the text is dropped
DATASETS, TOKENIZERS, DEMO = Path("data/datasets"), Path("data/tokenizers"), Path("data/demo")
STAGING = Path("data/.download")
NO_NETWORK = 3
SHARD_NAME = re.compile(r"fineweb_(train|val)_(\d{6})\.bin")
# kind: (Hugging Face data set, folder of the shards in it and here, tokenizer)
HUB = {
    "sp8192": ("kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe.model"),
    "sp1024": ("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe.model"),
    "bytes": ("mistobaan/fineweb10B_bytes", "fineweb10B_bytes", None),
}


class Failure(Exception):
    """One line for the user: what is wrong and what would be right."""


class NoNetwork(Failure):
    """The hub does not answer; set-up without an argument then falls back to the demo (exit code NO_NETWORK)."""


def note(text):
    print(f"setup_jepa.sh: {text}", flush=True)


def bar(**options):
    """A progress bar on a terminal, nothing in a pipe."""
    from tqdm import tqdm
    return tqdm(disable=not sys.stderr.isatty(), leave=False, **options)


# ---- shards

def shard_tokens(path):
    """Number of tokens of a sound shard; ValueError with the defect otherwise."""
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ValueError("no shard: the magic number is missing")
    if header[1] != VERSION:
        raise ValueError(f"version {header[1]} instead of {VERSION}")
    expected, size = 4 * HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    if header[2] < 0 or size != expected:
        raise ValueError(f"{size:,} bytes instead of {expected:,}")
    return int(header[2])


def is_sound(path):
    try:
        return shard_tokens(path) >= 0
    except (OSError, ValueError):
        return False


def shard(path):
    """The tokens of a sound shard as a read-only memory map."""
    try:
        count = shard_tokens(path)
    except (OSError, ValueError) as error:
        raise Failure(f"{path}: {error}") from None
    return np.memmap(path, "<u2", "r", 4 * HEADER_INTS, (count,)) if count else np.empty(0, "<u2")


def write_shard(path, chunks):
    """Writes the arrays in `chunks` under a temporary name, then renames. Returns the number of tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = path.with_name(f".{path.name}.tmp"), 0
    with open(temporary, "wb") as file:
        file.write(bytes(4 * HEADER_INTS))
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, "<u2").data)
            count += len(chunk)
        if count >= 2**31:
            raise Failure(f"{path}: {count:,} tokens are too many for one shard")
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = MAGIC, VERSION, count
        file.seek(0)
        file.write(header.data)
    os.replace(temporary, path)
    return count


def shards_in(folder, split=None):
    """Shard files in reading order, training first."""
    found = [(m[1] != "train", m[2], p) for p in folder.glob("*.bin") if (m := SHARD_NAME.fullmatch(p.name))]
    return [p for late, _, p in sorted(found) if split is None or late == (split != "train")]


def train_limit():
    text = os.environ.get("TRAIN_SHARDS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise Failure(f"TRAIN_SHARDS={text}: it is a number of shards, 1 or more")
    return int(text) if text else None


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_json(path, value):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_file(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def sentencepiece_model(path):
    from sentencepiece import SentencePieceProcessor
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise Failure(f"{path} is no SentencePiece model ({str(error).splitlines()[0]})") from None


# ---- demo: the embedded corpus as shards of both kinds

def byte_document(text):
    data = np.frombuffer(text.encode(), np.uint8)
    return np.concatenate(([MARK], data[data != MARK])).astype("<u2")


PIECE = 8000        # characters
LAYOUT = 1          # to be raised when `laid_out` changes: shards made before are then made anew


def wrapped(text, width):
    """`text` cut at spaces into lines of at most `width` columns where it can be."""
    lines = []
    while len(text) > width:
        cut = text.rfind(" ", 1, width + 1)
        if cut < 0 and (cut := text.find(" ", width)) < 0:
            break
        lines.append(text[:cut])
        text = text[cut + 1:]
    return "\n".join([*lines, text])


def laid_out(piece, chosen):
    """The piece as one plain-text edition or another would set it: in the novels' file most paragraphs are one line,
    all with single spaces and straight double quotes. Lines of 60 to 75 columns, indents, wide spaces after sentences
    and `single quotes', drawn by `chosen`: a byte model that has seen one layout only is lost in any other."""
    width, indent = chosen.randint(60, 75), " " * chosen.choice((0, 2, 4))
    gap, quotes = " " * chosen.randint(1, 2), chosen.random() < 0.5
    paragraphs = [" ".join(paragraph.split()) for paragraph in piece.split("\n\n")]
    if quotes:
        paragraphs = [re.sub(r'"([^"]*)"', r"`\1'", paragraph) for paragraph in paragraphs]
    paragraphs = [re.sub(r"([.!?:;][\"']?) (?=\S)", r"\1" + gap, paragraph) for paragraph in paragraphs]
    return "\n\n".join(wrapped(indent + paragraph, width) if paragraph else paragraph for paragraph in paragraphs)


def pieces_of(documents, size):
    """The documents cut before paragraphs into pieces of about `size`, in a fixed random order: a short run then sees
    a bit of everything, where whole novels in a row would teach it one voice after the other."""
    pieces = []
    for document in documents:
        piece = ""
        for paragraph in document.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= size:
                pieces.append(piece)
                piece = ""
        if piece.strip():
            pieces.append(piece)
    random.Random(0).shuffle(pieces)
    return pieces


def demo():
    tokenizer = DEMO / "fineweb_8192_bpe.model"
    files = {"train": DEMO / "novels_train.txt.xz", "val": DEMO / "alice_valid.txt"}
    for path in (tokenizer, *files.values()):
        if not path.is_file():
            raise Failure(f"{path} is missing; it belongs to the repository")
    source = {path.name: digest(path) for path in (tokenizer, *files.values())} | {"piece": PIECE, "layout": LAYOUT}
    if not (TOKENIZERS / tokenizer.name).is_file():
        copy_file(tokenizer, TOKENIZERS / tokenizer.name)
    encode = {
        "demo_sp8192": lambda text: np.array([BOS, *model.encode(text)], "<u2"),
        "demo_bytes": byte_document,
    }
    for name, document in encode.items():
        targets = {split: DATASETS / name / f"fineweb_{split}_000000.bin" for split in files}
        if read_json(DATASETS / name / "source.json") == source and all(map(is_sound, targets.values())):
            continue
        model = sentencepiece_model(tokenizer)
        for split, path in files.items():
            raw = path.read_bytes()
            text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
            documents = text.split("\f\n")     # a line with one form feed separates novels
            if split == "train":
                chosen = random.Random(1)
                documents = [laid_out(piece, chosen) for piece in pieces_of(documents, PIECE)]
            count = write_shard(targets[split], bar(iterable=map(document, documents), total=len(documents), desc=name))
            note(f"{targets[split]}: {len(documents)} document(s), {count:,} tokens")
        write_json(DATASETS / name / "source.json", source)


# ---- text: a text of the user's as shards of both kinds

def text():
    path = Path(os.environ.get("TEXT_PATH", ""))
    if not path.is_file():
        raise Failure(f"TEXT_PATH={path}: it names a UTF-8 text file, plain or .xz")
    name = os.environ.get("TEXT_NAME") or path.name.split(".")[0]
    targets = {split: f"fineweb_{split}_000000.bin" for split in ("train", "val")}
    size = os.environ.get("TEXT_PIECE") or "0"
    if not size.isdecimal():
        raise Failure(f"TEXT_PIECE={size}: it is a number of characters, or 0")
    source = {"text": digest(path), "piece": int(size)}
    folders = {kind: DATASETS / f"{name}_{kind}" for kind in ("sp8192", "bytes")}
    if all(read_json(f / "source.json") == source and all(is_sound(f / t) for t in targets.values())
           for f in folders.values()):
        return note(f"{' and '.join(map(str, folders.values()))}: complete")
    try:
        raw = path.read_bytes()
        whole = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise Failure(f"TEXT_PATH={path}: cannot be read ({error})") from None
    pieces = [piece for piece in whole.split("\f\n") if piece.strip()]
    if len(pieces) < 2:
        raise Failure(f"TEXT_PATH={path}: one piece cannot give training and validation; a line with one form feed "
                      "separates pieces")
    held_out = max(1, len(pieces) // 50)
    parts = {"train": pieces[held_out:], "val": pieces[:held_out]}
    if int(size):
        parts = {split: pieces_of(documents, int(size)) for split, documents in parts.items()}
    model = sentencepiece_model(DEMO / "fineweb_8192_bpe.model")

    def batches(documents, kind):
        for at in bar(iterable=range(0, len(documents), 256), desc=f"{name}_{kind}"):
            batch = documents[at:at + 256]
            made = map(byte_document, batch) if kind == "bytes" else (
                [BOS, *ids] for ids in model.encode(batch, num_threads=os.cpu_count() or 1))
            yield np.concatenate([np.asarray(document, "<u2") for document in made])

    for kind, folder in folders.items():
        for split, documents in parts.items():
            count = write_shard(folder / targets[split], batches(documents, kind))
            note(f"{folder / targets[split]}: {len(documents)} document(s), {count:,} tokens")
        write_json(folder / "source.json", source)


# ---- fineweb: download from the Hugging Face hub

def hub():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    import huggingface_hub
    return huggingface_hub


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def remote_files(repo):
    """Names of all files of a Hugging Face data set; NoNetwork when it cannot be asked."""
    try:
        return [s.rfilename for s in hub().HfApi().dataset_info(repo, timeout=15).siblings]
    except Exception as error:             # the hub client raises a dozen unrelated types for one cause
        raise NoNetwork(f"cannot reach the Hugging Face data set {repo} ({first_line(error)}); with network repeat "
                        "this command, without: bash setup_jepa.sh demo") from None


def download(repo, name, target, force=False):
    """One file, resumed where an earlier try stopped, moved to its place when whole."""
    staging = STAGING / repo.replace("/", "--")
    try:
        got = hub().hf_hub_download(repo_id=repo, filename=name, repo_type="dataset", local_dir=str(staging),
                                    force_download=force)
    except Exception as error:             # as above
        raise Failure(f"download of {name} from {repo} broke off ({first_line(error)}); repeat this command: "
                      "finished shards stay") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    got = Path(got)
    if got.is_symlink() or not got.resolve().is_relative_to(staging.resolve()):
        copy_file(got, target)
    else:
        os.replace(got, target)


def remote_plan(repo, folder):
    """({split: [remote path]}, all files): shards of one data set, as many as the manifest counts."""
    files = remote_files(repo)
    shards = [f for f in files if SHARD_NAME.fullmatch(Path(f).name)]
    here = [f for f in shards if Path(f).parent.name == folder]
    if not here and len({Path(f).parent for f in shards}) == 1:
        here = shards                      # a data set of its own, without the folder's name
    manifest = next((f for f in sorted(files, key=len) if Path(f).name == "manifest.json"), None)
    counts = {}
    if manifest:
        download(repo, manifest, DATASETS / folder / "manifest.json", force=True)
        listed = read_json(DATASETS / folder / "manifest.json")
        entries = listed.get("datasets", []) if isinstance(listed, dict) else []
        entry = next((e for e in entries if isinstance(e, dict) and e.get("name") == folder), {})
        stats = entry.get("stats") or {}
        counts = {split: stats.get(f"files_{split}") for split in ("train", "val")}
    if not all(isinstance(n, int) for n in counts.values()) or not counts:
        note(f"{repo}: no manifest.json with counts for {folder}; all shards listed there are taken")
        counts = {}
    plan = {}
    for split in ("val", "train"):
        plan[split] = sorted((f for f in here if SHARD_NAME.fullmatch(Path(f).name)[1] == split),
                             key=lambda f: Path(f).name)
        wanted = counts.get(split, max(1, len(plan[split])))
        if len(plan[split]) < wanted:
            raise Failure(f"{repo} holds {len(plan[split])} {split} shards of {folder}, {wanted} are wanted")
        plan[split] = plan[split][:wanted]
    return plan, files


def fetch_shard(repo, name, target):
    """A sound shard at `target`, downloaded when missing or damaged; a second damaged download is an error."""
    for attempt in range(2):
        if target.exists():
            try:
                shard_tokens(target)
                return
            except ValueError as error:
                note(f"{target} is damaged ({error}): fetching it again")
                target.unlink()
        download(repo, name, target, force=attempt > 0)
    try:
        shard_tokens(target)
    except ValueError as error:
        target.unlink()
        raise Failure(f"{name} of {repo} is damaged ({error}), twice; repeat this command later") from None


def fetch(kind):
    repo, name, tokenizer = HUB[kind]
    folder, limit = DATASETS / name, train_limit()
    record, partial = folder / "source.json", folder / ".partial"
    known = read_json(record)
    if known.get("repo") == repo and not partial.exists() and (not tokenizer or (TOKENIZERS / tokenizer).is_file()):
        local = [folder / n for n in known["val"] + known["train"][:limit]]
        if all(map(is_sound, local)):
            return note(f"{folder}: complete, {len(local)} shards")
    plan, files = remote_plan(repo, name)
    folder.mkdir(parents=True, exist_ok=True)
    partial.touch()                        # the run scripts take no folder that still has it
    if tokenizer:
        remote = next((f for f in sorted(files, key=len) if Path(f).name == tokenizer), None)
        if remote is None:
            raise Failure(f"{repo} holds no {tokenizer}")
        download(repo, remote, TOKENIZERS / tokenizer)
        sentencepiece_model(TOKENIZERS / tokenizer)
    wanted = plan["val"] + plan["train"][:limit]
    note(f"{folder}: {len(wanted)} shards wanted from {repo}")
    for remote in bar(iterable=wanted, desc=name, unit="shard"):
        fetch_shard(repo, remote, folder / Path(remote).name)
    write_json(record, {"repo": repo, **{s: [Path(f).name for f in plan[s]] for s in plan}})
    partial.unlink()
    note(f"{folder}: complete, {len(wanted)} shards")


def fineweb():
    kinds = os.environ.get("FINEWEB_KINDS", "sp8192 bytes").split()
    if not kinds or not set(kinds) <= set(HUB):
        raise Failure(f"FINEWEB_KINDS={' '.join(kinds)}: it lists some of {', '.join(HUB)}")
    for kind in kinds:
        fetch(kind)
    shutil.rmtree(STAGING, ignore_errors=True)


# ---- bytes: SentencePiece shards decoded to byte shards, in constant memory

class Decoder:
    """Tables from token ids to bytes, by the rule of the byte accounting: the space of a piece that follows a
    boundary (control, unknown or unused piece) is none; BOS becomes the boundary mark, other boundaries nothing."""

    def __init__(self, path):
        model = sentencepiece_model(path)
        pieces, count = [], model.vocab_size()
        self.boundary = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
                                  for i in range(count)])
        self.leading = np.zeros(count, bool)
        for i in range(count):
            piece = model.id_to_piece(i)
            if self.boundary[i]:
                pieces.append(bytes([MARK]) if i == model.bos_id() else b"")
            elif model.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]).replace(bytes([MARK]), b""))
            else:
                pieces.append(piece.replace("▁", " ").encode().replace(bytes([MARK]), b""))
                self.leading[i] = piece.startswith("▁")
        self.flat = np.frombuffer(b"".join(pieces), np.uint8)
        self.length = np.array([len(p) for p in pieces])
        self.start = np.array([0, *accumulate(self.length.tolist())])[:-1]

    def decode(self, ids, after_boundary):
        """ids (n,) -> bytes (m,) uint8; `after_boundary`: what precedes ids[0] is a boundary."""
        boundary = self.boundary[ids]
        dropped = self.leading[ids] & np.concatenate(([after_boundary], boundary[:-1]))
        length, start = self.length[ids] - dropped, self.start[ids] + dropped
        ends = np.cumsum(length)
        return self.flat[np.repeat(start - (ends - length), length) + np.arange(ends[-1] if len(ends) else 0)]

    def stream(self, path, after_boundary, progress, chunk=1 << 20):
        ids, bad = shard(path), len(self.boundary)
        for begin in range(0, len(ids), chunk):
            part = np.array(ids[begin:begin + chunk])
            if part.max() >= bad:
                raise Failure(f"{path}: token id {part.max()}, but the tokenizer has {bad} pieces")
            yield self.decode(part, after_boundary)
            after_boundary = bool(self.boundary[part[-1]])
            progress.update(len(part))


def decode_source():
    """(folder of SentencePiece shards, its tokenizer): what the user named, else FineWeb, else the demo."""
    if "SOURCE_PATH" in os.environ:
        if "SOURCE_TOKENIZER" not in os.environ:
            raise Failure("SOURCE_PATH needs SOURCE_TOKENIZER, the SentencePiece model of those shards")
        return Path(os.environ["SOURCE_PATH"]), Path(os.environ["SOURCE_TOKENIZER"])
    try:
        fetch("sp1024")
        return DATASETS / HUB["sp1024"][1], TOKENIZERS / HUB["sp1024"][2]
    except NoNetwork as error:
        note(f"{error}".split("; ")[0] + ": decoding the demo corpus instead")
    demo()
    return DATASETS / "demo_sp8192", DEMO / "fineweb_8192_bpe.model"


def to_bytes():
    folder, tokenizer = decode_source()
    limit = train_limit()
    shards = shards_in(folder, "train")[:limit] + shards_in(folder, "val")
    if not shards:
        raise Failure(f"{folder} holds no shards named fineweb_train_NNNNNN.bin or fineweb_val_NNNNNN.bin")
    output = Path(os.environ.get("BYTES_PATH") or DATASETS / f"{folder.resolve().name}_bytes")
    if output.resolve() == folder.resolve():
        raise Failure(f"BYTES_PATH={output} is the source folder itself")
    decoder, record = Decoder(tokenizer), output / "source.json"
    done, origin = read_json(record), {"tokenizer": digest(tokenizer), "folder": str(folder.resolve())}
    if shards_in(output) and "tokenizer" not in done:
        raise Failure(f"{output} holds shards that were not made by this conversion; name another folder: BYTES_PATH=")
    tokens = {path: len(shard(path)) for path in shards}
    output.mkdir(parents=True, exist_ok=True)
    (output / ".partial").touch()
    if {key: done.get(key) for key in origin} != origin:
        for stale in shards_in(output):    # decoded from other shards or with another tokenizer
            stale.unlink()
        done = origin | {"mark": MARK, "shards": {}}
        write_json(record, done)
    with bar(total=sum(tokens.values()), desc=output.name, unit="token", unit_scale=True) as progress:
        before = None                      # a document may run on from the shard before
        for path in shards:
            source = [tokens[path], path.stat().st_mtime_ns]
            entry, target = done["shards"].get(path.name, {}), output / path.name
            if entry.get("source") == source and is_sound(target) and shard_tokens(target) == entry["bytes"]:
                progress.update(tokens[path])
            else:
                follows = before is not None and before.name[:-10] == path.name[:-10] and tokens[before]
                after_boundary = not follows or bool(decoder.boundary[shard(before)[-1]])
                count = write_shard(target, decoder.stream(path, after_boundary, progress))
                done["shards"][path.name] = {"source": source, "bytes": count}
                write_json(record, done)
                note(f"{target}: {count:,} values from {tokens[path]:,} tokens")
            before = path
    (output / ".partial").unlink()
    note(f"{output}: {len(shards)} byte shards, documents begin with {MARK}")


# ---- summary

def summary():
    from importlib.metadata import PackageNotFoundError, version
    print("\nSummary")
    print(f"  Python     {sys.version.split()[0]}  {sys.executable}")
    try:
        import torch
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) or "no GPU found"
        print(f"  torch      {torch.__version__}")
        print(f"  CUDA       {torch.version.cuda or 'not in this build'}; {gpus}")
    except ImportError as error:
        print(f"  torch      cannot be imported: {error}")
    try:
        print(f"  mamba-ssm  {version('mamba_ssm')}")
    except PackageNotFoundError:
        print("  mamba-ssm  not installed (optional)")
    folders = [f for f in sorted(DATASETS.glob("*")) if shards_in(f)]
    for folder in folders:
        parts = []
        for split in ("train", "val"):
            counts = [shard_tokens(p) for p in shards_in(folder, split) if is_sound(p)]
            parts.append(f"{split} {len(counts)} shard(s), {sum(counts):,} tokens")
        state = "  (incomplete)" if (folder / ".partial").exists() else ""
        print(f"  {folder}: {'; '.join(parts)}{state}")
    if not folders:
        print("  no shards in data/datasets")


def main():
    actions = {f.__name__: f for f in (demo, fineweb, summary, text)} | {"bytes": to_bytes}
    try:
        actions[sys.argv[1]]()
    except Failure as error:
        print(f"setup_jepa.sh: {error}", file=sys.stderr)
        sys.exit(NO_NETWORK if isinstance(error, NoNetwork) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


main()
PYTHON
}

# ---------------------------------------------------------------------------------------------------- main

# Without an argument: FineWeb where it can be used and fetched, else the demo; the reason is printed.
default_data() {
    local code=0
    if [[ $(cuda_devices) == 0 ]]; then
        note "demo corpus: no CUDA device found (FineWeb by hand: bash setup_jepa.sh fineweb)"
        data_tool demo
        return
    fi
    note "FineWeb: a CUDA device is there"
    data_tool fineweb || code=$?
    if [[ $code == 3 ]]; then
        note "demo corpus instead: the shards are not here and there is no network to fetch them"
        data_tool demo
    elif [[ $code != 0 ]]; then
        exit "$code"
    fi
}

setup() {
    local what=${1-}
    [[ $# -le 1 && $what =~ ^(|fineweb|demo|bytes|text|env)$ ]] ||
        die "usage: bash setup_jepa.sh [fineweb|demo|bytes|text|env]" 2
    if command -v flock >/dev/null; then   # two runs started at once: the second waits, then finds all done
        exec 9>data/.setup.lock
        flock 9
    fi
    make_env
    case "$what" in
    env) return ;;
    "") default_data ;;
    *) data_tool "$what" || exit 1 ;;
    esac
    data_tool summary
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")"
    setup "$@"
fi
