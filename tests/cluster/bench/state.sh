# Sourced by the programs of the bench: where its state lies, and which host's process is alive.
HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
export DSC_DIR=${DSC_DIR:-$HERE/run}

host_pid() { cut -d' ' -f1 "$DSC_DIR/$1.pid"; }

start_time() { awk '{print $22}' "/proc/$1/stat" 2>/dev/null; }

# A host is noted as pid and start time, so that a pid of another process is never taken for it.
is_alive() {
  local pid started
  [ -s "$DSC_DIR/$1.pid" ] || return 1
  read -r pid started <"$DSC_DIR/$1.pid"
  [ "$(start_time "$pid")" = "$started" ]
}
