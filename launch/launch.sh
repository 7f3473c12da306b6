#!/usr/bin/env bash
# Trains on N devices of this machine:
#   launch/launch.sh N configs/run/NAME.py [key=value …] [+offload]
# key=value sets --config.key; +offload keeps the optimizer state in host memory; offload=… takes more.
# Without a GPU or TPU the N devices are virtual ones on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { echo "error: $1" >&2; echo "usage: launch/launch.sh N configs/run/NAME.py [key=value …] [+offload]" >&2; exit 2; }
[ $# -ge 2 ] || usage "N and a config file are needed"
[[ $1 =~ ^[1-9][0-9]*$ ]] || usage "'$1' is not a number of devices"
devices=$1 config=$2
shift 2
[ -f "${config%%:*}" ] || usage "${config%%:*} does not exist"
arguments=()
for word in "$@"; do
  case $word in
    +offload | offload) arguments+=(--config.offload=optimizer) ;;
    zero1) arguments+=(--config.sharding=zero1) ;;
    deepspeed=*) usage "there is no DeepSpeed here; use sharding=zero1 (stages 1, 2), sharding=fsdp (stage 3) or +offload" ;;
    torch_compile=*) usage "every step is compiled; leave torch_compile out" ;;
    dataloader_num_workers=*) arguments+=("--config.data.num_workers=${word#*=}") ;;
    --*) arguments+=("$word") ;;
    *=*) arguments+=("--config.$word") ;;
    *) usage "'$word' is not key=value" ;;
  esac
done
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
  found=$(nvidia-smi --list-gpus | wc -l)
  [ "$devices" -le "$found" ] || usage "$devices devices asked for, $found GPUs found"
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((devices - 1)))}
elif ! compgen -G "/dev/accel*" >/dev/null; then
  export JAX_PLATFORMS=cpu
  source launch/environment.sh
  fast_cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" -m atlas_jax.train --config "$config" "${arguments[@]}"
