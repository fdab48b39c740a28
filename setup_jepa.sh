#!/usr/bin/env bash
# Environment and data for train_jepa.py. Safe to repeat: what is there and sound is left alone.
#
#   bash setup_jepa.sh           .venv; FineWeb given a CUDA device and a network, else the demo
#   bash setup_jepa.sh fineweb   .venv; published FineWeb shards (BPE sp8192 and bytes), tokenizer
#   bash setup_jepa.sh demo      .venv; shards of both kinds from the embedded corpus in data/demo/
#   bash setup_jepa.sh bytes     .venv; byte shards decoded from FineWeb's sp1024 or the demo's
#   bash setup_jepa.sh text      .venv; shards of both kinds from a text of your own (TEXT_PATH)
#   bash setup_jepa.sh env       .venv only
#   bash setup_jepa.sh dev       .venv only, with what tests and tools/compare.py need
#
# Environment variables (relative paths count from this folder):
#   PYTHON         interpreter that .venv is made with, 3.11 to 3.13 (default: the first one found)
#   SKIP_VENV=1    no .venv: take PYTHON (default python3) as it is and install nothing
#   TORCH_BUILD    cuda, cpu, or auto (default): cuda if nvidia-smi shows a GPU. A cluster's login
#                  node without a GPU needs TORCH_BUILD=cuda
#   TRAIN_SHARDS   training shards at most, or all (default: 53, up to 11 GB for each kind: what
#                  10,000 steps read; the run scripts take 75 under PRESET=best)
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
DEV_STAMP=$VENV/.jepa-requirements-dev
MAMBA_SSM=2.3.2.post1
UV=0.13.9
DRIVER=580    # the oldest NVIDIA driver for CUDA 13, which the registry's torch is built for
SELF=$(basename "$0")

note() { echo "$SELF: $*" 2>/dev/null || true; }    # a console on a full disk ends nothing
die() { echo "$SELF: $1" >&2; exit "${2:-1}"; }

# ---- environment

skips_venv() { [[ -n "${SKIP_VENV-}" && $SKIP_VENV != 0 ]]; }

# Sets PY, the Python that everything runs with.
set_python() { if skips_venv; then PY=${PYTHON:-python3}; else PY=$VENV/bin/python; fi; }
set_python

requirements_hash() { sha256sum "${1:-requirements.txt}" | cut -d' ' -f1; }

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

# with_clock WHAT COMMAND...: runs a command that may be silent for minutes. Outside a terminal,
# where it shows no bar, a line every ten seconds says how long it has run.
with_clock() {
    local what=$1 started=$SECONDS clock code=0
    shift
    if [[ -t 1 ]]; then
        "$@"
        return
    fi
    while sleep 10 9>&- >/dev/null 2>&1; do note "$what, $((SECONDS - started)) s so far"; done &
    clock=$!
    "$@" || code=$?
    kill $clock
    wait $clock 2>/dev/null || true
    return $code
}

# No nvcc needed: its SSD kernels are Triton. Its requirements are for parts that are not used here.
install_mamba() {
    local other="from importlib.metadata import version; exit(version('mamba_ssm') != '$MAMBA_SSM')"
    "$PY" -c "$other" 2>/dev/null && return
    note "installing mamba-ssm $MAMBA_SSM without its CUDA build"
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE with_clock "installing mamba-ssm" \
        "$PY" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
        "mamba-ssm==$MAMBA_SSM" ||
        note "warning: mamba-ssm could not be installed; trainer and tests run without it"
}

# Prints the version of the NVIDIA driver; fails where nvidia-smi shows no GPU.
gpu_driver() {
    local versions
    versions=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 1
    [[ $versions =~ ^[0-9]+(\.[0-9]+)* ]] && echo "${BASH_REMATCH[0]}"
}

# Without a GPU: torch for CPUs, 0.2 GB. The registry's build would bring 2.7 GB of CUDA libraries.
# uv knows where CPU builds are; if it cannot fetch one, pip takes the build that it finds.
install_cpu_torch() {
    local pin installed
    case "${TORCH_BUILD:=auto}" in
    cuda) return ;;
    cpu) ;;
    auto) if gpu_driver >/dev/null; then return; fi ;;
    *) die "TORCH_BUILD=$TORCH_BUILD: it is auto, cuda or cpu" 2 ;;
    esac
    pin=$(grep -o '^torch==[^ ]*' requirements.txt)
    installed=$("$PY" -c 'from importlib.metadata import version; print(version("torch"))' \
        2>/dev/null) && [[ "torch==$installed" == "$pin"* ]] && return
    note "no NVIDIA GPU: installing $pin for CPUs, 0.2 GB"
    with_clock "installing torch" fetch_cpu_torch "$pin" ||
        note "its CPU build cannot be fetched here; another build, up to 2.7 GB, does as well"
}

fetch_cpu_torch() {
    { "$PY" -m pip install -q --disable-pip-version-check "uv==$UV" &&
        "$PY" -m uv pip install -q --python "$PY" --torch-backend cpu "$1"; } >/dev/null 2>&1
}

install_requirements() {    # file
    local quiet=-q size="0.3 GB, or 2.8 GB with CUDA"
    [[ -t 1 ]] && quiet=
    [[ $1 == *dev* ]] && size="0.25 GB"
    note "installing $1 into $VENV: a download of $size"
    with_clock "installing $1" "$PY" -m pip install $quiet --disable-pip-version-check -r "$1" ||
        die "pip could not install $1 (see above); repeat this command"
}

make_env() {
    skips_venv && return
    make_venv
    if ! env_ready; then
        install_cpu_torch
        install_requirements requirements.txt
    fi
    install_mamba
    requirements_hash >"$STAMP.tmp" && mv "$STAMP.tmp" "$STAMP"
}

add_dev_requirements() {
    local file=requirements-dev.txt
    skips_venv && return
    [[ -f $DEV_STAMP && "$(<"$DEV_STAMP")" == "$(requirements_hash $file)" ]] && return
    install_requirements $file
    requirements_hash $file >"$DEV_STAMP.tmp" && mv "$DEV_STAMP.tmp" "$DEV_STAMP"
}

# Prints how many GPUs torch can use; says why there are none although the driver sees some.
cuda_devices() {
    local count driver
    count=$("$PY" -c \
        'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)') ||
        die "$PY cannot import torch; repair .venv with: rm -rf .venv; bash setup_jepa.sh env"
    if [[ $count == 0 && -z "${CUDA_VISIBLE_DEVICES+set}" ]] && driver=$(gpu_driver); then
        if ((${driver%%.*} < DRIVER)); then
            note "NVIDIA driver $driver is too old for torch's CUDA 13: update it to $DRIVER" >&2
        else
            note "torch cannot use the GPU that nvidia-smi shows; with a torch for CPUs in .venv:" \
                "rm -rf .venv; bash setup_jepa.sh env" >&2
        fi
    fi
    echo "$count"
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
    if [[ ${1-} == -h || ${1-} == --help ]]; then
        sed '1d; /^#/!Q; s/^# \{0,1\}//' "$SELF"
        return
    fi
    [[ $# -le 1 && ${1-} =~ ^(|fineweb|demo|bytes|text|env|dev)$ ]] ||
        die "usage: bash setup_jepa.sh [fineweb|demo|bytes|text|env|dev]" 2
    mkdir -p data
    if command -v flock >/dev/null; then    # of two set-ups at once, the second waits for the first
        exec 9>data/.setup.lock
        flock 9
    fi
    make_env
    case "${1-}" in
    env) return ;;
    dev) add_dev_requirements && return ;;
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
