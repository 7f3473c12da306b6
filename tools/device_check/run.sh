#!/usr/bin/env bash
# Checks atlas_jax on one device: bash tools/device_check/run.sh [--tiny]
# From the root of the repository. LIMIT (seconds, 470) bounds all of it, and SCALE multiplies what a
# case may take; the cases that are worth most come first. CASES="values rates" runs these alone.
# Results go to OUT (outputs/device_check). Packages that the machine has not come from whl/ beside
# this file, see get_wheels.sh; PYTHON is the interpreter (python3).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export OUT=${OUT:-outputs/device_check} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-1}
mkdir -p "$OUT"
rm -f "$OUT"/results.jsonl "$OUT"/errors.txt "$OUT"/rates.json
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/jax_cache}
tiny=${1:-}
python=${PYTHON:-python3}
begin=$SECONDS
limit=${LIMIT:-470}
scale=${SCALE:-1}
if ! "$python" -c 'import grain, gguf, psycopg, ml_collections, num2words' 2>/dev/null &&
  compgen -G "$here/whl/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$scratch/site" "$here"/whl/*.whl || exit 1
  export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
fi
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,power.limit --format=csv,noheader
fi

# check NAME SECONDS: one case, within its seconds and what is left of LIMIT.
check() {
  case " ${CASES:-$1} " in *" $1 "*) ;; *) return ;; esac
  local left=$((limit - (SECONDS - begin))) most=$(($2 * scale))
  if [ "$left" -lt 25 ]; then
    echo "{\"case\": \"$1\", \"skipped\": \"no time left\"}" | tee -a "$OUT/results.jsonl"
    return
  fi
  echo "=== $1 (${left}s left)"
  # shellcheck disable=SC2086  # empty without --tiny
  timeout --kill-after=5 "$((left < most ? left : most))" "$python" "$here/check.py" "$1" $tiny \
    2>"$OUT/stderr_$1.txt" || {
    echo "=== $1 ended with $?"
    tail -n 5 "$OUT/stderr_$1.txt"
  }
}
check rates 60
check values 120
check sft_8x4096 80
check generate 120
check grpo 90
check sft_8x4096_packed 80
check sft_1x8192 70
check sft_8x4096_dots 80
check grpo_unshared 80
"$python" "$here/table.py" "$OUT/results.jsonl" | tee "$OUT/table.txt"
tar -C "$OUT" --exclude=all.tgz -czf "$scratch/all.tgz" . && mv "$scratch/all.tgz" "$OUT/all.tgz"
rm -f "$OUT"/hlo_*.txt "$OUT"/stderr_*.txt "$OUT"/kernels_*.txt
echo "took $((SECONDS - begin)) s"
