#!/usr/bin/env bash
# Check what would be shipped: build source archive and wheel, install the wheel into an environment of its own, and
# there run the command line, the demo and the tests.
#
#   tools/release_check.sh PYTHON [TESTS …]       (PYTHON has `build` and setuptools; all quick tests by default)
#
# Everything is written to .release, which is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "$1") # may be relative to the checkout
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
shift
rm -rf .release build
mkdir .release

echo "1 Build: source archive, and from it the wheel"
"$python" -m build --no-isolation --sdist --outdir .release . > .release/build.log
tar -xzf .release/odcft-*.tar.gz -C .release
source=$(echo .release/odcft-*/)
"$python" -m build --no-isolation --wheel --outdir .release "$source" >> .release/build.log
wheel=$(echo .release/*.whl)
version=$(basename "$wheel" | cut -d- -f2)
grep -q "^## $version" CHANGELOG.md || { echo "CHANGELOG.md says nothing of $version" >&2; exit 1; }

echo "2 Install $wheel into an environment of its own"
"$python" -m venv .release/venv
bin=$PWD/.release/venv/bin
"$bin/python" -m pip install --quiet --upgrade pip
"$bin/python" -m pip install --quiet --constraint constraints.txt "$wheel"

echo "3 Run it outside of the checkout"
cd .release
unset PYTHONPATH
where=$("$bin/python" -c 'import odcft; print(odcft.__file__)')
case $where in "${bin%/bin}"/*) ;; *) echo "not the wheel: $where" >&2; exit 1 ;; esac
[ "$("$bin/odcft" --version)" = "odcft $version" ]
"$bin/odcft" recipes small > /dev/null
"$bin/odcft" doctor
"$bin/odcft" demo --out demo
cd ..

echo "4 Test it"
"$bin/python" -m pip install --quiet --constraint constraints.txt "${wheel}[dev,faiss,onnx]"
"$bin/python" tools/torchvision_on_cpu.py # as `make` does: tests import timm, which a CPU build of torch may not allow
# Not `python -m pytest`, which would find the checkout before the wheel.
OMP_NUM_THREADS=1 "$bin/pytest" -n 2 -q -m "not slow" "${@:-tests}"
echo "odcft $version can be shipped: .release/odcft-$version.tar.gz, $wheel"
