#!/usr/bin/env bash
# Fetches to whl/ the packages that a machine with jax, flax, optax, orbax, transformers and torch for
# CUDA on Python 3.12 still needs. Run it where pip works.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p whl
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
  --platform any --dest whl \
  array-record gguf grain ml-collections num2words docopt pebble portpicker psycopg psycopg-binary \
  confusable-homoglyphs
