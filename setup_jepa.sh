#!/usr/bin/env bash
# Environment and data for train_jepa.py. Safe to repeat: what is there and sound is left alone.
#
#   bash setup_jepa.sh           .venv; FineWeb given a CUDA device and a network, else the demo
#   bash setup_jepa.sh fineweb   .venv; published FineWeb shards (BPE sp8192 and bytes), tokenizer
#   bash setup_jepa.sh demo      .venv; shards of both kinds from the embedded corpus in data/demo/
#   bash setup_jepa.sh bytes     .venv; byte shards decoded from FineWeb's sp1024 or the demo's
#   bash setup_jepa.sh text      .venv; shards of both kinds from a text of your own (TEXT_PATH)
#   bash setup_jepa.sh env       .venv only
#
# Environment variables (relative paths count from this folder):
#   PYTHON         interpreter that .venv is made with, 3.11 to 3.13 (default: the first one found)
#   SKIP_VENV=1    no .venv: take PYTHON (default python3) as it is and install nothing
#   TRAIN_SHARDS   training shards at most (default: all)
#   FINEWEB_KINDS  what `fineweb` downloads (default: "sp8192 bytes"; sp1024 too)
#   SOURCE_PATH, SOURCE_TOKENIZER, BYTES_PATH
#                  `bytes`: folder of other SentencePiece shards, their model, output folder
#   TEXT_PATH      `text`: UTF-8, plain or .xz, pieces separated by a line with one form feed (the
#                  first 2% of them become validation)
#   TEXT_NAME      of the folders data/datasets/NAME_sp8192 and NAME_bytes (default: the file's)
#   TEXT_PIECE     `text`: 0 (default): the pieces as they are. N: cut before paragraphs into
#                  documents of about N characters in a fixed random order: batches are more mixed
#
# tools/prepare_data.py makes the shards. tools/launch.sh and tests/run.sh source this file for its
# functions; set-up starts only when the file is executed.

VENV=.venv
STAMP=$VENV/.jepa-requirements    # hash of requirements.txt, written when all of it is installed
MAMBA_SSM=2.3.2.post1
SELF=$(basename "$0")

note() { echo "$SELF: $*"; }
die() { echo "$SELF: $1" >&2; exit "${2:-1}"; }

# ---- environment

skips_venv() { [[ -n "${SKIP_VENV-}" && $SKIP_VENV != 0 ]]; }

# Sets PY, the Python that everything runs with.
set_python() { if skips_venv; then PY=${PYTHON:-python3}; else PY=$VENV/bin/python; fi; }
set_python

requirements_hash() { sha256sum requirements.txt | cut -d' ' -f1; }

env_ready() {
    skips_venv && return
    [[ -x $PY && -f $STAMP && "$(<"$STAMP")" == "$(requirements_hash)" ]] && "$PY" -c '' 2>/dev/null
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n "${PYTHON-}" ]]; then
        supported "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13"
        echo "$PYTHON" && return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        supported "$candidate" && echo "$candidate" && return
    done
    die "no Python 3.11, 3.12 or 3.13 found; install one or name it: PYTHON=/path/to/python3"
}

make_venv() {
    local python version='import sys; print(sys.version_info[:2])'
    if "$PY" -m pip --version >/dev/null 2>&1; then
        [[ -z "${PYTHON-}" ]] && return
        [[ "$("$PY" -c "$version")" == "$("$PYTHON" -c "$version" 2>/dev/null)" ]] && return
        note "$VENV has another Python version than PYTHON=$PYTHON: making it anew"
    elif [[ -e $VENV || -L $VENV ]]; then
        note "$VENV is incomplete: making it anew"
    fi
    python=$(find_python)
    [[ -d $VENV && ! -L $VENV ]] || rm -f "$VENV"    # a dangling link or a file in the way
    "$python" -m venv --clear "$VENV" ||
        die "$python -m venv failed (Debian and Ubuntu: install python3-venv); or set PYTHON"
}

# No nvcc needed: its SSD kernels are Triton. Its requirements are for parts that are not used here.
install_mamba() {
    local other="from importlib.metadata import version; exit(version('mamba_ssm') != '$MAMBA_SSM')"
    "$PY" -c "$other" 2>/dev/null && return
    note "installing mamba-ssm $MAMBA_SSM without its CUDA build"
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "$PY" -m pip install -q \
        --disable-pip-version-check --no-deps --no-build-isolation "mamba-ssm==$MAMBA_SSM" ||
        note "warning: mamba-ssm could not be installed; trainer and tests run without it"
}

make_env() {
    skips_venv && return
    make_venv
    if ! env_ready; then
        note "installing requirements.txt into $VENV"
        local quiet=-q
        [[ -t 1 ]] && quiet=
        "$PY" -m pip install $quiet --disable-pip-version-check -r requirements.txt ||
            die "pip could not install requirements.txt (see above); repeat this command"
    fi
    install_mamba
    requirements_hash >"$STAMP.tmp" && mv "$STAMP.tmp" "$STAMP"
}

cuda_devices() {
    "$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' ||
        die "$PY cannot import torch; repair .venv with: rm -rf .venv; bash setup_jepa.sh env"
}

# ---- data

prepare_data() { "$PY" tools/prepare_data.py "$@"; }

# Without an argument: FineWeb if it can be used and fetched, else the demo; the reason is printed.
default_data() {
    local code=0 devices
    devices=$(cuda_devices)
    if [[ $devices != 0 ]]; then
        note "FineWeb: a CUDA device is there"
        prepare_data fineweb || code=$?
        [[ $code == 3 ]] || return $code
        note "demo corpus instead: the shards are not here and there is no network to fetch them"
    else
        note "demo corpus: no CUDA device found (FineWeb by hand: bash setup_jepa.sh fineweb)"
    fi
    prepare_data demo
}

setup() {
    [[ $# -le 1 && ${1-} =~ ^(|fineweb|demo|bytes|text|env)$ ]] ||
        die "usage: bash setup_jepa.sh [fineweb|demo|bytes|text|env]" 2
    mkdir -p data
    if command -v flock >/dev/null; then    # of two set-ups at once, the second waits for the first
        exec 9>data/.setup.lock
        flock 9
    fi
    make_env
    case "${1-}" in
    env) return ;;
    "") default_data ;;
    *) prepare_data "$1" ;;
    esac
    prepare_data summary
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")"
    setup "$@"
fi
