# Sourced by the SLURM scripts, at their start, in the directory where the job was submitted: `train`
# runs the training step and hands the job back to the queue where it is not finished.
#   source launch/slurm.sh; train SRUN_OPTION… -- N configs/run/NAME.py [key=value …]
# SIGUSR1, which comes 600 s before the time is over, lets the step save and continue in another turn.
# The job goes back to the queue REQUEUE_SECS (480) later at the latest, whether the step has ended by
# then or not. After a failure it starts again from the last checkpoint, RESTARTS (3) times in a row;
# failures are counted in the file atlas_jax_failures_JOB.
# shellcheck source=launch/environment.sh
source launch/environment.sh
step='' limit='' failures=atlas_jax_failures_$SLURM_JOB_ID

# Set from the first line on: without it the signal ends the job.
trap stop_step USR1
stop_step() {
  echo "SIGUSR1: training is told to save and end"
  [ -n "$limit" ] || limit=$((SECONDS + ${REQUEUE_SECS:-480}))
  [ -z "$step" ] || kill -TERM "$step" 2>/dev/null || true
}

# hand_back CODE: requeues the job whose step ended so, if there is something to gain; returns CODE.
hand_back() {
  local count=0
  case $1 in
    0 | 75) rm -f "$failures" ;;
    2) return 2 ;; # wrong arguments stay wrong
    *)
      [ ! -f "$failures" ] || count=$(<"$failures")
      if [ "$count" -ge "${RESTARTS:-3}" ]; then
        rm -f "$failures"
        return "$1"
      fi
      echo $((count + 1)) >"$failures"
      ;;
  esac
  [ "$1" = 0 ] || scontrol requeue "$SLURM_JOB_ID" || true
  return "$1"
}

train() {
  local options=() code=0
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  # Without it a step may get one core of the node.
  [ -z "${SLURM_CPUS_ON_NODE:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_ON_NODE")
  if [ -n "$limit" ]; then hand_back 75 || return; fi # the signal came before there was a step
  # `--wait`: processes that are left end by themselves, and say why.
  srun --wait=600 --ntasks-per-node=1 "${options[@]}" launch/launch.sh "$@" &
  step=$!
  [ -z "$limit" ] || kill -TERM "$step" # it came just now
  while kill -0 "$step" 2>/dev/null && [ "${limit:-$((SECONDS + 1))}" -gt "$SECONDS" ]; do sleep 1; done
  if kill -0 "$step" 2>/dev/null; then
    echo "training has not ended; the job goes back to the queue before its time is over"
    code=75
    hand_back 75 || true
    wait "$step" || true
  else
    wait "$step" || code=$?
    [ -z "$limit" ] || [ "$code" = 0 ] || code=75 # in its first seconds the signal ends it at once
    hand_back "$code" || true
  fi
  return "$code"
}
