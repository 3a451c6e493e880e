#!/usr/bin/env bash
# Run all checks: lint, format, types, layers, tests. Installs what they need into .venv. Safe to run again.
#   scripts/test.sh            all checks
#   scripts/test.sh ARGS...    lint and types, then pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_venv.sh requirements/dev.txt

echo "== ruff check";        ruff check .
echo "== ruff format";       ruff format --check .
echo "== mypy";              mypy
echo "== layers";            lint-imports
# The tests of a file stay together. Long files come first by name and start first. Two launches at once fit two cores.
[ $# -gt 0 ] || set -- --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 25
echo "== tests";             pytest "$@"
