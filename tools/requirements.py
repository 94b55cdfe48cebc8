"""Print what pyproject.toml requires, a line each, for an image layer of dependencies alone.

    python tools/requirements.py pyproject.toml gpu onnx      (the file, and the extras that are wanted)

Needs Python 3.11 or newer.
"""

import sys
from pathlib import Path

import tomllib


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """What the build, the package and its extras require."""
    about = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = about["project"]
    wanted = [about["build-system"]["requires"], project["dependencies"]]
    return [line for group in [*wanted, *(project["optional-dependencies"][name] for name in extras)] for line in group]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
