#!/bin/sh
# Make the environment of a peer, by requirements-PEER.txt; prints its Python.
#
#     benchmarks/peers/setup.sh olive|modelopt [FOLDER] [PYTHON]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
peer=$1
case $peer in
olive) module=olive.passes.onnx.quantization ;;
modelopt) module=modelopt.onnx.quantization ;;
*) echo "setup.sh: no peer '$peer': olive or modelopt" >&2 && exit 2 ;;
esac
folder=${2:-$here/../.work/$peer}
"${3:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --upgrade pip >&2
"$folder/bin/python" -m pip install --quiet --requirement "$here/requirements-$peer.txt" >&2
"$folder/bin/python" -c "import $module" >&2
echo "$folder/bin/python"
