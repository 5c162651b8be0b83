#!/usr/bin/env bash
# An environment for each peer, outside this repository: bash benchmarks/peers/setup.sh [FOLDER]
# pip's own settings decide where packages come from, and whether torch is the build without CUDA.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-${TMPDIR:-/tmp}/peers}"
for peer in flower pfl; do
    "${PYTHON:-python3.11}" -m venv "$folder/$peer"
    "$folder/$peer/bin/python" -m pip install -q -r "$here/${peer}_app/requirements.txt"
done
"$folder/flower/bin/python" -c 'import flwr, ray; print("flwr", flwr.__version__, "ray", ray.__version__)'
"$folder/pfl/bin/python" -c 'import importlib.metadata as m; print("pfl", m.version("pfl"))'
echo "environments: $folder/flower $folder/pfl"
