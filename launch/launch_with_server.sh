#!/usr/bin/env bash
# vLLM servers and GRPO together on this machine:
#   launch/launch_with_server.sh S T configs/run/NAME.py [key=value …] [+offload]
# Servers take the first S devices, training the next T. The first half of the servers is the
# teacher's, the rest the student's; on one device the two share its memory. Without a GPU all of
# it runs on the CPU. Logs are in output_dir/logs. Ctrl-C lets training save and then ends what was
# started here; the exit code is that of training.
#   PORT=8765             of the first server; the others follow
#   DEVICES_PER_SERVER=1  devices that one server splits its model over
#   VLLM_FLAGS=           further flags of every server, such as "--max-model-len 4096"
set -euo pipefail
cd "$(dirname "$0")/.."
usage() {
  echo "error: $1" >&2
  echo "usage: launch/launch_with_server.sh S T configs/run/NAME.py [key=value …] [+offload]" >&2
  exit 2
}
[ $# -ge 3 ] || usage "numbers of devices and a config file are needed"
for number in "$1" "$2" "${PORT:=8765}" "${DEVICES_PER_SERVER:=1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || usage "'$number' is not a number above 0"
done
servers=$1 trainers=$2 config=$3
shift 3
[ -f "${config%%:*}" ] || usage "${config%%:*} does not exist"
[ $((servers % DEVICES_PER_SERVER)) = 0 ] ||
  usage "$servers devices do not divide into servers of DEVICES_PER_SERVER=$DEVICES_PER_SERVER"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}

settings=()
for word in "$@"; do [[ $word == *=* && $word != --* ]] && settings+=("--config.$word"); done
names=model_name_or_path,student_model,output_dir,rollout.protocol,rollout.weight_sync
read_config() { "$python" tools/read_config.py "$names" --config "$config" "${settings[@]}"; }
values=$(read_config)
{ read -r teacher; read -r student; read -r output; read -r protocol; read -r sync; } <<<"$values"
follow=() weights=$PWD/$output/weights
[ "${output:0:1}" = / ] && weights=$output/weights
[ "$sync" = restart ] && follow=(rollout.sync_dir="$weights")
logs=$output/logs
mkdir -p "$logs"

gpus=()
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $(($(nvidia-smi --list-gpus | wc -l) - 1)))}"
  [ $((servers + trainers)) -le ${#gpus[@]} ] ||
    usage "$servers devices for servers and $trainers for training asked for, ${#gpus[@]} found"
fi

started=() training="" interrupted="" urls=()
finish() {
  trap - EXIT
  [ ${#started[@]} = 0 ] || kill -TERM "${started[@]}" 2>/dev/null || true
  [ ${#started[@]} = 0 ] || wait "${started[@]}" 2>/dev/null || true
}
stop() {
  interrupted=yes
  if [ -n "$training" ]; then kill -TERM "$training" 2>/dev/null || true; else exit 130; fi
}
trap finish EXIT
trap stop INT TERM

free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
healthy() {
  "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
    "$1/health" 2>/dev/null
}

# start ROLE MODEL FIRST_DEVICE SHARE: a server, in a session of its own so that Ctrl-C comes here.
start() {
  local port=$((PORT + ${#urls[@]})) devices="" flags=()
  free "$port" || usage "port $port is taken; set PORT to the first of free ones"
  if [ ${#gpus[@]} -gt 0 ]; then
    devices=$(IFS=,; echo "${gpus[*]:$3:DEVICES_PER_SERVER}")
    flags=(--gpu-memory-utilization "$4" --tensor-parallel-size "$DEVICES_PER_SERVER")
  fi
  [ "$sync$1" = restartteacher ] && flags+=(--follow "$weights/latest")
  # shellcheck disable=SC2086  # words of VLLM_FLAGS are flags of their own
  CUDA_VISIBLE_DEVICES=$devices setsid "$python" -m atlas_jax.serve --model "$2" --port "$port" \
    "${flags[@]}" ${VLLM_FLAGS:-} >"$logs/$1_server_$port.log" 2>&1 &
  started+=($!)
  urls+=("http://127.0.0.1:$port")
  echo "$1 server on port $port: $2"
}

count=$((servers / DEVICES_PER_SERVER)) share=0.9
half=$(((count + 1) / 2))
if [ "$protocol" = direct ]; then half=$count; fi
mapfile -t teacher_at < <(seq 0 $((half - 1)))
mapfile -t student_at < <(seq "$half" $((count - 1)))
if [ "$protocol" != direct ] && [ "$count" = 1 ]; then student_at=(0) share=0.45; fi
for i in "${teacher_at[@]}"; do start teacher "$teacher" $((i * DEVICES_PER_SERVER)) $share; done
for i in "${student_at[@]}"; do start student "$student" $((i * DEVICES_PER_SERVER)) $share; done
teacher_urls=$(IFS=,; echo "${urls[*]:0:${#teacher_at[@]}}")
student_urls=$(IFS=,; echo "${urls[*]:${#teacher_at[@]}}")

for i in "${!urls[@]}"; do
  until healthy "${urls[i]}"; do
    kill -0 "${started[i]}" 2>/dev/null || {
      code=0; wait "${started[i]}" || code=$?
      echo "error: the server of ${urls[i]} ended with $code; its log ends with" >&2
      tail -n 20 "$logs"/*_server_"${urls[i]##*:}".log >&2
      exit 1
    }
    sleep 1
  done
  echo "${urls[i]} is healthy"
done

if [ ${#gpus[@]} -gt 0 ]; then
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:servers:trainers}")
  export CUDA_VISIBLE_DEVICES
fi
setsid launch/launch.sh "$trainers" "$config" "$@" rollout.backend=vllm \
  rollout.teacher_servers="$teacher_urls" rollout.student_servers="$student_urls" \
  "${follow[@]}" \
  > >(tee -a "$logs/training.log") 2>&1 &
training=$!
# A signal ends `wait`, not training.
while :; do
  code=0 interrupted=""
  wait "$training" || code=$?
  [ -n "$interrupted" ] || break
done
exit "$code"
