#!/usr/bin/env bash
# Trains on several hosts over ssh, one process on each:
#   launch/multihost.sh --hosts FILE N configs/run/NAME.py [key=value …] [+offload]
# FILE has a host a line; N is the number of devices of each. All hosts have this repository, its
# .venv and the caller's directory under the same paths, and share output_dir. The first one, by its
# name in FILE, takes the others' connections on PORT (8476). Ctrl-C, SIGTERM and the end of this
# script, however it comes, let training save and end; the exit code is then 75. The hosts get from here
# the settings of JAX and NCCL, the hub's and the keys of judges and servers; PASS names more variables.
# No command line shows their values.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage() { echo "error: $1 (launch/multihost.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help "${BASH_SOURCE[0]}"; exit ;; esac
[ "${1:-}" = --hosts ] && [ $# -ge 4 ] || usage "--hosts FILE, N and a config file are needed"
[ -r "$2" ] || usage "$2 cannot be read"
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$2")
[ ${#hosts[@]} -ge 1 ] || usage "$2 names no host"
shift 2
[[ $1 =~ ^[1-9][0-9]*$ ]] || usage "'$1' is not a number of devices"
find_config "$2"
read_words "${@:3}"

settings=(ATLAS_COORDINATOR="${hosts[0]##*@}:${PORT:-8476}" ATLAS_NUM_PROCESSES="${#hosts[@]}")
for name in JAX_PLATFORMS XLA_FLAGS XLA_CLIENT_MEM_FRACTION CUDA_DEVICE_MAX_CONNECTIONS "${!NCCL_@}" \
  HF_HUB_OFFLINE HF_HOME HF_TOKEN VLLM_API_KEY {GEMINI,OPENAI,ANTHROPIC,XAI}_API_KEY ${PASS:-}; do
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || usage "PASS has '$name', which is no name of a variable"
  [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done
# What runs on a host: it reads variables up to an empty one, and trains. Training is told to stop
# when the connection's input ends.
remote='while IFS= read -r -d "" setting && [ -n "$setting" ]; do export "$setting"; done
cd "$0" || exit 1
exec 3<&0
"$@" </dev/null 3<&- & training=$!
{ cat <&3; kill -TERM "$training"; } >/dev/null 2>&1 & watcher=$!
exec 3<&-
wait "$training"; code=$?
kill "$watcher" 2>/dev/null
exit "$code"'

# One pipe, in which nothing is written, ends the input of all connections when nobody here holds 9
# any more.
pipe=$(mktemp -u)
mkfifo -m 600 "$pipe"
exec 7<>"$pipe" 8<"$pipe" 9>"$pipe" 7<&-
rm "$pipe"
interrupted=
stop() {
  interrupted=yes
  echo "SIG$1: all hosts are told to save and end" 2>/dev/null || true
  exec 9>&-
}
trap '' PIPE
trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop HUP' HUP
# copy NUMBER: marks the lines of a host, and goes on reading when nobody reads them any more.
copy() {
  exec 9>&-
  trap '' INT HUP
  sed -u "s/^/[$1] /" 2>/dev/null || cat >/dev/null
}
connections=()
for i in "${!hosts[@]}"; do
  words=("$remote" "$PWD" "$root/launch/launch.sh" "$1" "$config" "${@:3}")
  # In sessions of their own: Ctrl-C and the end of the terminal come here alone.
  setsid ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[i]}" \
    "bash -c$(printf ' %q' "${words[@]}")" \
    < <(exec 9>&-; trap '' INT; printf '%s\0' "${settings[@]}" "ATLAS_PROCESS_ID=$i" ""; exec cat <&8) \
    9>&- > >(copy "$i") 2> >(copy "$i" >&2) &
  connections+=($!)
done
exec 8<&-

worst=0
for connection in "${connections[@]}"; do
  code=0
  wait_for "$connection" || code=$?
  # An error of one says more than that the others were stopped.
  case $worst in 0 | 75) [ "$code" = 0 ] || worst=$code ;; esac
done
exit "$worst"
