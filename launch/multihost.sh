#!/usr/bin/env bash
# Trains on several hosts over ssh, one process on each:
#   launch/multihost.sh --hosts FILE N configs/run/NAME.py [key=value …] [+offload]
# FILE has a host a line; N is the number of devices of each. All hosts have this repository and its
# .venv under the same path, and share output_dir. The first one, by its name in FILE, takes the
# others' connections on PORT (8476). Ctrl-C, SIGTERM and the end of this script, however it comes,
# let training save and end. PASS names variables that the hosts get from here.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() {
  echo "error: $1" >&2
  echo "usage: launch/multihost.sh --hosts FILE N configs/run/NAME.py [key=value …] [+offload]" >&2
  exit 2
}
[ "${1:-}" = --hosts ] && [ $# -ge 4 ] || usage "--hosts FILE, N and a config file are needed"
[ -r "$2" ] || usage "$2 cannot be read"
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$2")
[ ${#hosts[@]} -ge 1 ] || usage "$2 names no host"
shift 2

settings=(ATLAS_COORDINATOR="${hosts[0]##*@}:${PORT:-8476}" ATLAS_NUM_PROCESSES="${#hosts[@]}")
for name in ${PASS:-JAX_PLATFORMS XLA_FLAGS HF_HUB_OFFLINE HF_HOME VLLM_API_KEY}; do
  [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done
# What runs on a host: training, which is told to stop when the connection's input ends.
remote='cd "$0" || exit 1
exec 3<&0
env "$@" </dev/null 3<&- & training=$!
{ cat <&3; kill -TERM "$training"; } >/dev/null 2>&1 & watcher=$!
exec 3<&-
wait "$training"; code=$?
kill "$watcher" 2>/dev/null
exit "$code"'

# One pipe is the input of all connections; it ends when nobody here holds 9 any more.
pipe=$(mktemp -u)
mkfifo -m 600 "$pipe"
exec 7<>"$pipe" 8<"$pipe" 9>"$pipe" 7<&-
rm "$pipe"
interrupted=
trap 'interrupted=yes; exec 9>&-' INT TERM
connections=()
for i in "${!hosts[@]}"; do
  words=("$remote" "$PWD" "${settings[@]}" ATLAS_PROCESS_ID="$i" launch/launch.sh "$@")
  ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[i]}" "bash -c$(printf ' %q' "${words[@]}")" \
    <&8 9>&- > >(exec 9>&-; sed -u "s/^/[$i] /") 2> >(exec 9>&-; sed -u "s/^/[$i] /" >&2) &
  connections+=($!)
done
exec 8<&-

worst=0
for connection in "${connections[@]}"; do
  # A signal ends `wait`, not the connection.
  while interrupted=; code=0; wait "$connection" || code=$?; [ -n "$interrupted" ]; do :; done
  [ "$code" = 0 ] || worst=$code
done
exit "$worst"
