#!/usr/bin/env bash
# The longer run that is to show that teaching helps, on two cores: makes the questions, teaches
# SmolLM2-135M the form of a lesson by SFT and then to teach by GRPO against itself as a frozen student,
# and compares both teachers on held-out questions and on kinds that were never trained on. Everything
# goes to outputs/demo of the repository.
#   bash launch/demo.sh [key=value of the GRPO run …]
# After Ctrl-C the same command continues where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
usage() { echo "error: $1 (bash launch/demo.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help launch/demo.sh; exit ;; esac
read_words "$@"
refuse_chosen "the demo"
out=outputs/demo
in_parts launch/demo.sh

say "1/6 install: .venv, 2.2 GB, the first time one to three minutes"
part need_environment gguf,hf

say "2/6 model"
prepare_cpu_run configs/run/demo_grpo.py
get_smollm2 "$out/smollm2"

say "3/6 questions"
if [ ! -f "$out/data/sft.jsonl" ]; then  # the last file of the four
  part .venv/bin/python tools/make_demo.py --output "$out/data" --model "$out/smollm2"
fi

say "4/6 SFT: the form of a lesson"
part launch/launch.sh 1 configs/run/demo_sft.py model_name_or_path="$out/smollm2" \
  output_dir="$out/sft"

say "5/6 GRPO: lessons that help"
part launch/launch.sh 1 configs/run/demo_grpo.py model_name_or_path="$out/sft/final" \
  student_model="$out/smollm2" output_dir="$out/grpo" data.eval_path= "$@"

evaluate() {
  part .venv/bin/python -m atlas_jax.evaluate --config configs/run/demo_grpo.py \
    --teacher "$out/sft/final" --teacher "$out/grpo/final" --student "$out/smollm2" \
    --data "$out/data/$1.jsonl" --output "$out/$2.json"
}
say "6/6 evaluation, held-out questions: teacher 1 after SFT, 2 after GRPO"
evaluate eval evaluation
say "6/6 evaluation, kinds that were never trained on"
evaluate unseen evaluation_unseen

part .venv/bin/python -m atlas_jax.report "$out/grpo"

say "done: the teacher is $out/grpo/final, what it taught is in $out/evaluation.json"
echo "curves and samples: $out/grpo/report.html"
