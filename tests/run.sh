#!/usr/bin/env bash
# Everything that must hold before a change lands: `bash tests/run.sh [--long] [pytest arguments]`.
# --long also runs the tests marked `long`, which take minutes each.
# Makes or reuses .venv, .venv-vllm and, where there is Python 3.12 or 3.13, .venv-compilers; needs
# Python 3.11 to 3.13 and pip, no GPU and no model hub.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
chosen=(-m "not long")
if [ "${1:-}" = --long ]; then
  chosen=()
  shift
fi
need_environment test
PYTHON=.venv/bin/python launch/install_vllm.sh
run() { .venv/bin/python -m "$@"; }
run ruff format --check --quiet .
run ruff check --quiet .
run mypy
.venv/bin/lint-imports --no-cache | tail -n 3
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two processes: most of the time goes into compiling, which keeps one core busy.
# -rs: what is skipped is listed with its reason, and counted.
run pytest --quiet -rs --durations=8 --numprocesses=2 --dist=loadgroup --no-loadscope-reorder \
  "${chosen[@]}" "$@"
[ $# -gt 0 ] || tests/compilers.sh
