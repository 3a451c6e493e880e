# The batch scripts in this folder source this file. It runs one step; on USR1 it asks the ranks to stop and requeues the
# job. Each script defines ask_ranks_to_stop, after which all ranks save at the same step and exit with status 0.

say() { echo "$(date '+%F %T') batch: $*"; }

asked=
step=
on_usr1() {
  [ -z "$asked" ] || return 0  # a second USR1 would end the ranks while they save
  asked=1
  say "asked to stop: the ranks save and exit"
  [ -z "$step" ] || ask_ranks_to_stop
}
trap on_usr1 USR1

say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
python=${PYTHON:-.venv/bin/python}
# two jobs may share a node, so the port depends on the job's number
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# run_step COMMAND...: run srun with the options that every step needs; sets `status` to that of its ranks.
run_step() {
  # In the background, because bash runs a trap only between commands or while it waits. srun does not inherit
  # --cpus-per-task from sbatch. SRUN_OPTIONS: more options, such as a container's, separated by blanks.
  # shellcheck disable=SC2086
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SRUN_OPTIONS:-} "$@" &
  step=$!
  [ -z "$asked" ] || ask_ranks_to_stop  # USR1 came before the step began
  while :; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break  # a trapped signal ends a wait, not the step
  done
  say "the ranks exited with status $status"
}

# Exit with the ranks' status, or requeue the job if they were asked to stop.
leave() {
  if [ -n "$asked" ] && [ "$status" -ne 2 ]; then  # 2: the ranks would refuse the same input again
    say "requeueing the job"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # the requeue ends this script
  fi
  exit "$status"
}
