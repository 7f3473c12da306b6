#!/usr/bin/env bash
# Trains on N devices of this machine:
#   launch/launch.sh N configs/run/NAME.py [key=value …] [+offload]
# key=value and --config.key=value are the same; +offload keeps the optimizer state in host memory;
# offload=… takes more. The config may also be the name of a shipped recipe (teacher_sft) or a
# PACKAGE.MODULE. Relative paths are those of the caller's directory; a config that is not there is
# looked for in the repository. Of CUDA_VISIBLE_DEVICES the first N are taken. Without a GPU or TPU
# the N devices are virtual ones on the CPU. Ctrl-C and SIGTERM let training save; it then ends with
# 75, and the same command continues.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage() { echo "error: $1 (launch/launch.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help "${BASH_SOURCE[0]}"; exit ;; esac
[ $# -ge 2 ] || usage "N and a config file are needed"
[[ $1 =~ ^[1-9][0-9]*$ ]] || usage "'$1' is not a number of devices"
devices=$1
find_config "$2"
read_words "${@:3}"
find_python
find_gpus
if [ -n "$has_driver" ] && [ "${JAX_PLATFORMS:-}" != cpu ]; then
  need_gpus "$devices" "training"
  CUDA_VISIBLE_DEVICES=$(join "${gpus[@]:0:devices}")
  export CUDA_VISIBLE_DEVICES
  fast_gpus
elif [ "${JAX_PLATFORMS:-}" = cpu ] || ! has_tpu; then
  [ "${JAX_PLATFORMS:-}" = cpu ] || refuse_accelerator
  export JAX_PLATFORMS=cpu
  fast_cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi
export ATLAS_DEVICES=$devices
exec "$python" -m atlas_jax.train --config "$config" "${arguments[@]}"
