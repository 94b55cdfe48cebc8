"""No engine runs where the tests do: what of the Dockerfile can be read is held against what it must do.

tools/replay_container.py carries it out in a tree of Debian files.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
sys.path.insert(0, str(ROOT / "tools"))
from replay_container import instructions  # noqa: E402

STEPS = instructions(DOCKERFILE)
FINAL = STEPS[max(number for number, (word, _) in enumerate(STEPS) if word == "FROM") :]


def at(word, start):
    """Where an instruction stands, and its text."""
    return next((number, text) for number, (name, text) in enumerate(STEPS) if name == word and text.startswith(start))


def test_torchs_wheel_brings_the_only_cuda():
    bases = [text.partition(" AS ")[0] for word, text in STEPS if word == "FROM"]
    assert set(bases) == {"python:${PYTHON}-slim-bookworm", "dependencies"}
    assert re.fullmatch(r"PYTHON=3\.\d+", STEPS[0][1])


def test_dependencies_are_a_layer_of_their_own_before_the_source_and_pinned():
    installed, command = at("RUN", "case")
    assert (
        installed
        < at("COPY", "odcft")[0]
        < at("RUN", "python -m pip --python /opt/odcft/bin/python install --no-deps")[0]
    )
    assert "--constraint constraints.txt" in command
    final = [text for word, text in FINAL if word == "COPY"]
    assert final == ["--from=dependencies /opt/odcft /opt/odcft", "--from=package /package /opt/odcft"]


def test_nothing_is_built_or_installed_in_what_is_shipped():
    """So there are no compilers, no caches and no pip in it but the base image's."""
    commands = [text for word, text in FINAL if word == "RUN"]
    assert len(commands) == 1
    assert commands[0].startswith("useradd")
    assert "--without-pip" in at("RUN", "python -m venv")[1]
    assert "apt-get" not in DOCKERFILE


def test_an_unknown_device_is_refused():
    command = at("RUN", "case")[1]
    assert re.findall(r"(\w+)\) kmeans=(\w+)", command) == [("gpu", "gpu"), ("cpu", "faiss")]
    assert "exit 1" in command


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and newer")
def test_every_dependency_and_the_gpu_extra_have_one_version():
    from requirements import requirements

    def name(line):
        return re.match(r"[\w-]+", line)[0].lower().replace("_", "-")

    pinned = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = ["gpu", "onnx", "faiss", "tiff", "heic", "dicom", "remote"]
    wanted = {name(line) for line in requirements(ROOT / "pyproject.toml", extras)}
    assert wanted <= pinned
    assert "faiss-gpu" in wanted


def test_it_runs_as_any_user_on_a_disk_that_cannot_be_written():
    words = [word for word, _ in FINAL]
    assert "HOME=/tmp" in dict(FINAL)["ENV"]
    assert dict(FINAL)["USER"] == "1000"
    assert dict(FINAL)["ENTRYPOINT"] == '["odcft"]'
    assert words.index("USER") > max(number for number, word in enumerate(words) if word in ("RUN", "COPY"))
    assert "--read-only --tmpfs /tmp" in (ROOT / "docs" / "containers.md").read_text()


def test_the_build_sees_only_what_it_copies():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    copied = {name for word, text in STEPS if word == "COPY" and "--from" not in text for name in text.split()[:-1]}
    assert copied == {line[1:] for line in ignored if line[0] == "!"}
    assert all((ROOT / name).exists() for name in copied)


def test_continued_lines_and_comments_are_read():
    text = "# a\nRUN a \\\n# between\n    && b\nCMD c\n"
    assert instructions(text) == [("RUN", "a  && b"), ("CMD", "c")]
