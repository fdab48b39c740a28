#!/usr/bin/env bash
# Set-up where needed, linter, then every test:   bash tests/run.sh [quick] [pytest arguments]
# quick: without the tests marked slow, in about two minutes. TEST_WORKERS (2) files run side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup_jepa.sh demo
source ./setup_jepa.sh
arguments=()
if [[ "${1-}" == quick ]]; then
    shift
    arguments=(-m "not slow")
fi
"$PY" -m ruff check --config tests/ruff.toml .
exec "$PY" -m pytest -c tests/pytest.ini tests -n "${TEST_WORKERS-2}" --dist loadfile \
    ${arguments[@]+"${arguments[@]}"} "$@"
