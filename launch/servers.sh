#!/usr/bin/env bash
# The vLLM servers of one node, all of one model; launch/slurm_grpo.sbatch runs it:
#   launch/servers.sh N [flag of atlas_jax.serve or vLLM …]
# The N devices of the node are split over N / DEVICES_PER_SERVER servers, of which the first listens
# on PORT and the others on those that follow. When one ends, for whatever reason, all do.
#   PORT=8765  DEVICES_PER_SERVER=N  VLLM_FLAGS=
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage() { echo "error: $1 (launch/servers.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help "${BASH_SOURCE[0]}"; exit ;; esac
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage "'${1:-}' is not a number of devices"
devices=$1 each=${DEVICES_PER_SERVER:-$1}
shift
for number in "$each" "${PORT:=8765}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || usage "'$number' is not a number above 0"
done
[ $((devices % each)) = 0 ] || usage "$devices devices do not divide into servers of $each"
find_python
find_gpus
[ -z "$has_driver" ] || need_gpus "$devices" servers
read -ra more <<<"${VLLM_FLAGS:-}"

trap end_jobs EXIT
# Not by the EXIT trap alone: a further signal that finds it begun would end it.
trap 'end_jobs; exit 130' INT
trap 'end_jobs; exit 143' TERM
trap 'end_jobs; exit 129' HUP
for ((i = 0; i < devices / each; i++)); do
  flags=(--port $((PORT + i)))
  if [ -n "$has_driver" ]; then
    flags+=(--tensor-parallel-size "$each")
    CUDA_VISIBLE_DEVICES=$(join "${gpus[@]:i * each:each}")
    export CUDA_VISIBLE_DEVICES
  fi
  "$python" -m atlas_jax.serve "${flags[@]}" "$@" "${more[@]}" &
done
code=0
wait -n || code=$?
exit "$code"
