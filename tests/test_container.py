"""No engine runs where the tests do: what of the Dockerfile can be read is held against what it must do."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LINES = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def at(start):
    return next(number for number, line in enumerate(LINES) if line.startswith(start))


def test_torchs_wheel_brings_the_only_cuda():
    (base,) = [line for line in LINES if line.startswith("FROM")]
    assert re.fullmatch(r"FROM python:3\.\d+-slim-\w+", base)


def test_dependencies_are_a_layer_of_their_own_before_the_source_and_pinned():
    assert at("RUN python requirements.py") < at("COPY odcft") < at("RUN pip install --no-deps")
    assert "--constraint constraints.txt" in LINES[at("RUN python requirements.py") + 1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and newer")
def test_every_dependency_and_the_gpu_extra_have_one_version():
    sys.path.insert(0, str(ROOT / "tools"))
    from requirements import requirements

    def name(line):
        return re.match(r"[\w-]+", line)[0].lower().replace("_", "-")

    pinned = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = ["gpu", "onnx", "faiss", "tiff", "heic", "dicom", "remote"]
    wanted = {name(line) for line in requirements(ROOT / "pyproject.toml", extras)}
    assert wanted <= pinned
    assert "faiss-gpu" in wanted


def test_it_runs_as_any_user_on_a_disk_that_cannot_be_written():
    assert "ENV HOME=/tmp" in LINES
    assert "--read-only --tmpfs /tmp" in DOCKERFILE
    assert LINES[at("USER")] == "USER 1000"
    assert 'ENTRYPOINT ["odcft"]' in LINES
