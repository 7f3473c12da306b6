# Sourced by the SLURM scripts: `train` runs the training step and hands the job back to the queue
# where it is not finished.
#   source launch/slurm.sh; train SRUN_OPTION… -- N configs/run/NAME.py [key=value …]
# SIGUSR1, which comes before the time is over, lets it save and continue in another turn; after a
# failure it starts again from the last checkpoint, RESTARTS (3) times.
train() {
  local options=() code=0 again='' interrupted=''
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  # `--wait`: processes that are left end by themselves, and say why.
  srun --wait=600 --ntasks-per-node=1 "${options[@]}" launch/launch.sh "$@" &
  local step=$!
  trap 'again=yes interrupted=yes; kill -TERM "$step"' USR1
  # A signal ends `wait`, not the step.
  while interrupted=''; code=0; wait "$step" || code=$?; [ -n "$interrupted" ]; do :; done
  trap - USR1
  if [ "$code" != 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-3}" ]; then again=yes; fi
  [ -z "$again" ] || scontrol requeue "$SLURM_JOB_ID"
  return "$code"
}
