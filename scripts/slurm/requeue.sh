# Sourced by the batch scripts beside it: run one step, ask its ranks to stop on USR1, and go back into the queue then.
# A script defines ask_ranks_to_stop, which all ranks follow by saving at the same step and leaving with status 0.

say() { echo "$(date '+%F %T') batch: $*"; }

asked=
step=
on_usr1() {
  [ -z "$asked" ] || return 0  # it may come again, and a second one would end the ranks while they save
  asked=1
  say "asked to stop: the ranks save and leave"
  [ -z "$step" ] || ask_ranks_to_stop
}
trap on_usr1 USR1

say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
python=${PYTHON:-.venv/bin/python}
# two jobs may share a node, so the port follows from the job's number
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# run_step COMMAND...: srun with what every step needs; `status` is that of its ranks.
run_step() {
  # in the background: bash runs a trap only between commands, or while it waits. srun no longer takes --cpus-per-task
  # over from sbatch. SRUN_OPTIONS: more of them, such as a container's, parted by blanks.
  # shellcheck disable=SC2086
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SRUN_OPTIONS:-} "$@" &
  step=$!
  [ -z "$asked" ] || ask_ranks_to_stop  # it came before there was a step
  while :; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break  # a trapped signal ends a wait, not the step
  done
  say "the ranks left with status $status"
}

# Leave with the ranks' status, or back into the queue where they were asked to stop.
leave() {
  if [ -n "$asked" ] && [ "$status" -ne 2 ]; then  # 2: what the ranks refuse they refuse again
    say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # it ends this script
  fi
  exit "$status"
}
