#!/usr/bin/env bash
# vLLM servers and GRPO together on this machine:
#   launch/launch_with_server.sh S T configs/run/NAME.py [key=value …] [+offload]
# Servers take the first S devices, training the next T. The first half of the servers is the
# teacher's, the rest the student's; on one device the two share its memory. Without a GPU all of
# it runs on the CPU. Logs are in output_dir/logs; the servers ask for the token in
# output_dir/server_token. Ctrl-C, SIGTERM and the end of the terminal let training save and then end
# what was started here. The exit code is that of training, 75 if it was stopped before its end.
#   PORT=8765             of the first server; the others follow
#   DEVICES_PER_SERVER=   devices that one server splits its model over; by default as few as
#                         leave room for keys and values beside the larger model
#   VLLM_FLAGS=           further flags of every server, such as "--max-model-len 4096"
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage() { echo "error: $1 (launch/launch_with_server.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help "${BASH_SOURCE[0]}"; exit ;; esac
[ $# -ge 3 ] || usage "numbers of devices and a config file are needed"
for number in "$1" "$2" "${PORT:=8765}" "${DEVICES_PER_SERVER:-1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || usage "'$number' is not a number above 0"
done
servers=$1 trainers=$2
find_config "$3"
read_words "${@:4}"
no_flags
[ $((servers % ${DEVICES_PER_SERVER:-1})) = 0 ] ||
  usage "$servers devices do not divide into servers of DEVICES_PER_SERVER=$DEVICES_PER_SERVER"
find_python
find_gpus
[ -z "$has_driver" ] || need_gpus $((servers + trainers)) "servers and training"

# Everything that can be wrong without a server or a device is said before any starts.
names=model_name_or_path,student_model,output_dir,rollout.protocol,rollout.weight_sync,model.lora.rank
values=$("$python" "$root/tools/read_config.py" "$names" --check_devices "$trainers" \
  --config "$config" "${settings[@]}" --config.rollout.backend=vllm \
  --config.rollout.teacher_servers="http://127.0.0.1:$PORT" \
  --config.rollout.student_servers="http://127.0.0.1:$((PORT + 1))") || exit
{ read -r teacher; read -r student; read -r output; read -r protocol; read -r sync; read -r rank; } <<<"$values"
adapters=()
if [ "$sync" = adapter ]; then
  for most in 8 16 32 64 128 256 320 512; do [ "$most" -lt "$rank" ] || break; done
  adapters=(--enable-lora --max-lora-rank "$most")
fi
if [ -z "${DEVICES_PER_SERVER:-}" ] && [ -n "$has_driver" ]; then
  # Each role needs a server of its own, if there are devices for two.
  most=$servers models=("$teacher")
  [ "$protocol" != teaching ] || models+=("$student")
  [ "$protocol" != teaching ] || [ $((servers % 2)) != 0 ] || most=$((servers / 2))
  DEVICES_PER_SERVER=$(devices_per_server "$most" "${models[@]}") || exit
fi
: "${DEVICES_PER_SERVER:=1}"
count=$((servers / DEVICES_PER_SERVER)) share=0.9
half=$(((count + 1) / 2))
[ "$protocol" = teaching ] || half=$count
roles=()
for ((i = 0; i < count; i++)); do
  if [ "$i" -lt "$half" ]; then roles+=(teacher); else roles+=(student); fi
done
if [ "$protocol" = teaching ] && [ "$count" = 1 ]; then roles+=(student) share=0.45; fi
for i in "${!roles[@]}"; do
  ! (exec 3<>"/dev/tcp/127.0.0.1/$((PORT + i))") 2>/dev/null ||
    usage "port $((PORT + i)) is taken; set PORT to the first of ${#roles[@]} free ones"
done
weights=$output/weights follow=()
[ "${output:0:1}" = / ] || weights=$PWD/$weights
[ "$sync" != restart ] || follow=(rollout.sync_dir="$weights")
logs=$output/logs
mkdir -p "$logs"

# Whoever reads what is printed here may be gone, which ends nothing.
trap '' PIPE
say() { echo "$@" 2>/dev/null || true; }
started=() training="" interrupted="" urls=()
# stop NAME NUMBER: on that signal.
stop() {
  interrupted=yes
  if [ -z "$training" ]; then
    say "SIG$1: ending the servers; training has not started"
    end_jobs  # a further signal that finds the EXIT trap begun would end that trap
    exit $((128 + $2))
  fi
  local words="SIG$1: training is told to save and end, then the servers end; this may take a while"
  say "$words"
  # Ctrl-C has ended whoever reads this script's output, such as `tee`.
  [ "$1" != INT ] || [ -t 1 ] || { echo "$words" >/dev/tty; } 2>/dev/null || true
  kill -TERM "$training" 2>/dev/null || true
}
trap end_jobs EXIT
trap 'stop INT 2' INT
trap 'stop TERM 15' TERM
trap 'stop HUP 1' HUP

# start NUMBER: a server, in a session of its own so that Ctrl-C comes here alone.
start() {
  local role=${roles[$1]} port=$((PORT + $1)) model devices="" flags=() more=() place=CPU
  model=$teacher
  [ "$role" = teacher ] || model=$student
  if [ -n "$has_driver" ]; then
    devices=$(join "${gpus[@]:$1 % count * DEVICES_PER_SERVER:DEVICES_PER_SERVER}")
    place="GPU $devices"
    flags=(--gpu-memory-utilization "$share" --tensor-parallel-size "$DEVICES_PER_SERVER")
  fi
  [ "$sync$role" != restartteacher ] || flags+=(--follow "$weights/latest")
  [ "$role" != teacher ] || flags+=("${adapters[@]}")
  read -ra more <<<"${VLLM_FLAGS:-}"
  say "$role server on port $port, $place: $model"
  CUDA_VISIBLE_DEVICES=$devices ATLAS_TRACEBACK=1 setsid "$python" -m atlas_jax.serve \
    --model "$model" --port "$port" --token-file "$output/server_token" "${flags[@]}" "${more[@]}" \
    >"$(log "$1")" 2>&1 &
  started+=($!)
  urls+=("http://127.0.0.1:$port")
}
log() { echo "$logs/${roles[$1]}_server_$((PORT + $1)).log"; }

# until_healthy NUMBER
until_healthy() {
  until healthy "${urls[$1]}"; do
    kill -0 "${started[$1]}" 2>/dev/null || {
      echo "error: the server of ${urls[$1]} ended; $(log "$1") ends with: $(tail -n 1 "$(log "$1")")" >&2
      exit 1
    }
    sleep 1
  done
  say "${urls[$1]} is healthy"
}

for i in "${!roles[@]}"; do
  start "$i"
  # Two that share a GPU would each count the other's memory while it loads.
  [ "$share" = 0.9 ] || [ -z "$has_driver" ] || until_healthy "$i"
done
for i in "${!roles[@]}"; do until_healthy "$i"; done

place=CPU
if [ -n "$has_driver" ]; then
  CUDA_VISIBLE_DEVICES=$(join "${gpus[@]:servers:trainers}")
  export CUDA_VISIBLE_DEVICES
  place="GPU $CUDA_VISIBLE_DEVICES"
fi
export VLLM_API_KEY=${VLLM_API_KEY:-$(<"$output/server_token")}
say "training on $place; logs are in $logs"
# The copy to the log outlives Ctrl-C, the terminal and whoever reads what is printed here.
exec 5> >(exec setsid tee -p -a "$logs/training.log")
copy=$!
setsid "$root/launch/launch.sh" "$trainers" "$config" "${@:4}" rollout.backend=vllm \
  rollout.teacher_servers="$(join "${urls[@]:0:half}")" \
  rollout.student_servers="$(join "${urls[@]:half}")" "${follow[@]}" >&5 2>&1 5>&- &
training=$!
exec 5>&-
code=0
wait_for "$training" || code=$?
wait "$copy" || true
exit "$code"
