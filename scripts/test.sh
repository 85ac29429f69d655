#!/usr/bin/env bash
# Lint and the whole test suite; arguments go to pytest (e.g. -m slow, -k pause).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev
ruff check .
ruff format --check .
python -m pytest "$@"
