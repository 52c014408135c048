#!/bin/sh
# Make the environment of benchmarks/peers/olive_coverage.py; prints its Python.
#
#     benchmarks/peers/setup_olive.sh [FOLDER] [PYTHON]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../.work/olive}
"${2:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --upgrade pip >&2
"$folder/bin/python" -m pip install --quiet --requirement "$here/requirements-olive.txt" >&2
"$folder/bin/python" -c 'import olive.passes.onnx.quantization' >&2
echo "$folder/bin/python"
