#!/usr/bin/env bash
# Set-up where needed, linter, then every test:   bash tests/run.sh [quick] [pytest arguments]
# quick: the parts by themselves, in about two minutes. TEST_WORKERS (2) files run side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup_jepa.sh dev
bash setup_jepa.sh demo
source ./setup_jepa.sh
arguments=()
if [[ "${1-}" == quick ]]; then
    shift
    arguments=(-m "not slow")    # nor the files whose tests run whole trainings or set-ups
    for file in checkpoint distributed end_to_end experiments generation gpu_check readme \
        run_folder settings setup submit training; do
        arguments+=(--ignore "tests/test_$file.py")
    done
fi
"$PY" -m ruff check --config tests/ruff.toml .
exec "$PY" -m pytest -c tests/pytest.ini tests -n "${TEST_WORKERS-2}" --dist loadfile \
    ${arguments[@]+"${arguments[@]}"} "$@"
