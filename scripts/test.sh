#!/usr/bin/env bash
# Run all checks: lint, format, types, layers, tests. Installs what they need into .venv. Safe to run again.
#   scripts/test.sh            all checks; 25 to 50 minutes on two cores
#   scripts/test.sh --fast     lint, types, layers, unit tests but the slow ones, two real launches; 4 to 7 minutes
#   scripts/test.sh ARGS...    lint, types and layers, then pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_venv.sh requirements/dev.txt

echo "== ruff check";        ruff check .
echo "== ruff format";       ruff format --check .
echo "== mypy";              mypy
echo "== layers";            lint-imports
# The tests of a file stay together. Long files come first by name and start first. Two launches at once fit two cores.
several=(--numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 25)
case "${1:-}" in
  "") set -- "${several[@]}" ;;
  --fast) shift; set -- "${several[@]}" -m "not slow" tests/integration/test_baselines.py tests/unit "$@" ;;
esac
echo "== tests";             pytest "$@"
