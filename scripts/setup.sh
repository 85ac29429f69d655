#!/usr/bin/env bash
# Make .venv with the pinned requirements and this project in it; nothing to do when it is up to date.
# usage: source scripts/setup.sh [dev]     (dev: the test and lint tools too)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=requirements.txt
[ "${1:-}" != dev ] || wanted=requirements-dev.txt  # a script that sources this without arguments lends it its own
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is older than 3.11; name a newer one with PYTHON=python3.12" >&2
  exit 2
}
stamp=".venv/$(cat requirements.txt "$wanted" pyproject.toml | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing $wanted into .venv (a few minutes the first time)" >&2
  # torch first and alone: fairscale and deepspeed import it while they build, so both build without isolation.
  .venv/bin/python -m pip install -q "$(grep -o '^torch==[0-9.]*' requirements.txt)" "setuptools>=77,<85" wheel ninja
  .venv/bin/python -m pip install -q --no-build-isolation -r "$wanted"
  .venv/bin/python -m pip install -q --no-build-isolation --no-deps -e .
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
