#!/usr/bin/env bash
# What a first session on a GPU should show, in calls of at most ten minutes each:
#   bash tools/gpu_check.sh [correct|bench|run|best] ...    nothing named: all four
#   bash tools/gpu_check.sh --tiny ...                 the same path on a CPU, in Triton's interpreter
# correct: kernels against PyTorch, tests marked cuda, five steps on CPU and GPU
# bench:   ceilings of the GPU, forms of the scan, MODE=bench of three configurations with a profile
# run:     a short training on the demo corpus to its artifact, and MODE=eval of it
# best:    the same under PRESET=best, MODE=bench of it, and how long its evaluation of FineWeb takes
# Results: a line on stdout and one of JSON in $OUT/gpu_check.jsonl (OUT: gpu_check) as each is known.
# It needs no network and installs nothing: PYTHON (default python3) with torch and triton.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || command -v python3)}
export SKIP_VENV=1 PYTHON OUT=${OUT:-gpu_check}
mkdir -p "$OUT"
if [[ ${1-} == --tiny ]]; then
    shift
    export TINY=1 TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1 OMP_NUM_THREADS=1
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/cache}
fi
exec "$PYTHON" tools/gpu_check.py "${@:-all}"
