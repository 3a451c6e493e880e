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
# A file's tests stay together, and the long files, which come first by name, begin first; two launches at once fit two cores.
[ $# -gt 0 ] || set -- --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 25
echo "== tests";             pytest "$@"
