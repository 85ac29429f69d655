#!/usr/bin/env bash
# Lint and the whole test suite; arguments go to pytest (e.g. -m slow, -k pause, -n 0 for one process).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev
ruff check .
ruff format --check .
python -m pytest -n logical --maxprocesses 4 --dist loadgroup "$@"
