# quickstart.sh and test.sh source this file. It installs everything into .venv of this checkout, once per set of pins.
# Usage: . scripts/setup_venv.sh requirements/FILE.txt ; afterwards .venv/bin/python is ready.

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
       "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: ds_dpo needs Python 3.11 or 3.12; found $(python3 --version 2>/dev/null || echo none). Set PYTHON=/path/to/python3.11" >&2
  return 1
}

setup_venv() {
  requirements=$1
  stamp=.venv/installed-$(basename "$requirements" .txt)
  wanted=$(cat requirements/*.txt setup.py | sha256sum | cut -d' ' -f1)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python=$(find_python) || exit 2
  echo "== installing $requirements into .venv with $($python --version) (a minute or two, once)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv || { echo "error: $python cannot make a venv (on Debian: apt install python3-venv)" >&2; exit 2; }
  log=.venv/install.log
  if ! .venv/bin/python -m pip install --disable-pip-version-check -r "$requirements" >"$log" 2>&1 ||
     ! .venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e . >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: installation failed; the whole output is in $log" >&2
    exit 2
  fi
  echo "$wanted" >"$stamp"
}

# Two ranks on two cores: one thread each, which does not spin while it waits for the other rank.
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 PATH="$PWD/.venv/bin:$PATH"

setup_venv "$1"
