#!/usr/bin/env bash
# Run the quick tests with the lowest versions that pyproject.toml allows, on the oldest Python.
#
#   tools/test_lowest.sh [FOLDER [PYTEST ARGUMENTS …]]
#
# FOLDER (default: .lowest) receives a virtual environment of about 6 GB, because torch's old wheels bring their CUDA.
# It is kept: a second call only runs the tests. PYTHON=python3.10 names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.lowest}
shift || true
python=${PYTHON:-python3.10}
extras=(faiss onnx remote tiff heic dicom)

if [ ! -e "$folder/ready" ]; then
    "$python" -m venv "$folder"
    echo "Installing the lowest versions into $folder (3 GB to download) …"
    "$folder/bin/python" -m pip install --quiet --upgrade pip
    "$folder/bin/python" tools/requirements.py pyproject.toml --lowest "${extras[@]}" > "$folder/lowest.txt"
    "$folder/bin/python" -m pip install --quiet --requirement "$folder/lowest.txt" \
        build hypothesis pytest pytest-xdist matplotlib PyYAML "onnx-ir<0.2" "protobuf<6" # as old as onnxscript 0.5
    "$folder/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
    touch "$folder/ready"
fi
"$folder/bin/python" -V
"$folder/bin/python" -m pip freeze --exclude-editable | grep -i -E '^(torch|torchvision|timm|numpy|pillow|pydantic|typer|scikit-learn|pyarrow)=='
OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q -m "not slow" "$@"
