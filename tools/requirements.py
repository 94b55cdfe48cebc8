"""Print the requirements in pyproject.toml, one per line, to install them in their own layer of a container image.

    python tools/requirements.py pyproject.toml gpu onnx tiff      (the file, then the extras to include)

Needs Python 3.11 or newer.
"""

import sys
from pathlib import Path

import tomllib


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirements of the build, the package and its extras."""
    about = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = about["project"]
    wanted = [about["build-system"]["requires"], project["dependencies"]]
    return [line for group in [*wanted, *(project["optional-dependencies"][name] for name in extras)] for line in group]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
