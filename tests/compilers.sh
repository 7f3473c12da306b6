#!/usr/bin/env bash
# Runs the tests marked `compiler` in .venv-compilers, which this script makes: JAX for accelerators
# needs Python 3.12, and the tests need its compilers, which need no device.
#   tests/compilers.sh       PYTHON=python3.12 tests/compilers.sh
# Without such a Python or without the packages it says so, with the number of tests, and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
version=0.11.2  # of JAX, for which the numbers in docs/plan.md are
minutes=5       # at most, for each of the two parts below
marks='@needs\(|mark\.compiler'
mapfile -t files < <(grep -rlE "$marks" tests --include='test_*.py')
skip() {
  echo "SKIPPED [$(cat "${files[@]}" | grep -cE "$marks")] tests for compilers: $1"
  exit 0
}

for name in "${PYTHON:-python3}" python3.13 python3.12; do
  python=$(command -v "$name") || continue
  "$python" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null && break
  python=""
done
[ -n "${python:-}" ] || skip "there is no Python 3.12 or 3.13"
stamp=.venv-compilers/.installed-$version
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  PYTHON=$python make_venv .venv-compilers || skip "$python makes no environment"
  echo "installing compilers of JAX $version into .venv-compilers (a few minutes)"
  timeout "${minutes}m" .venv-compilers/bin/python -m pip install --quiet --editable ".[plan]" \
    "jax[tpu]==$version" {jax-cuda13-plugin,jax-cuda13-pjrt}=="$version" \
    beartype pytest pytest-timeout pytest-xdist scipy ||
    skip "pip cannot install them"
  touch "$stamp"
fi
code=0
timeout "${minutes}m" .venv-compilers/bin/python -m pytest --quiet -rs -m compiler "${files[@]}" || code=$?
[ "$code" != 124 ] || skip "they took more than $minutes minutes"
exit "$code"
