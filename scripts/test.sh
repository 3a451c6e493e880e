#!/usr/bin/env bash
# Everything that must hold: lint, format, types, layers, tests. All of it is installed into .venv. Safe to run again.
#   scripts/test.sh            the whole
#   scripts/test.sh ARGS...    lint and types, then pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_venv.sh requirements/dev.txt

echo "== ruff check";        ruff check .
echo "== ruff format";       ruff format --check .
echo "== mypy";              mypy
echo "== layers";            lint-imports
echo "== tests";             pytest "$@"
