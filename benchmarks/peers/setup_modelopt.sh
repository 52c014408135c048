#!/bin/sh
# Make the environment of benchmarks/peers/modelopt_int8.py; prints its Python.
#
#     benchmarks/peers/setup_modelopt.sh [FOLDER] [PYTHON]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../.work/modelopt}
"${2:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --upgrade pip >&2
"$folder/bin/python" -m pip install --quiet --requirement "$here/requirements-modelopt.txt" >&2
"$folder/bin/python" -c 'import modelopt.onnx.quantization' >&2
echo "$folder/bin/python"
