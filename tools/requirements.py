"""Print the requirements in pyproject.toml, one per line, to install them without the package itself.

    python tools/requirements.py pyproject.toml gpu onnx tiff        (the file, then the extras to include)
    python tools/requirements.py pyproject.toml --lowest onnx        (the lowest versions that it allows)

A container image installs them in a layer of their own (Dockerfile), tools/test_lowest.sh tests the lowest.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirements of the build, the package and its extras."""
    about = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = about["project"]
    wanted = [about["build-system"]["requires"], project["dependencies"]]
    return [line for group in [*wanted, *(project["optional-dependencies"][name] for name in extras)] for line in group]


def lowest(requirement: str) -> str:
    """The same requirement, pinned to the lowest version that it allows: "numpy>=1.26" becomes "numpy==1.26"."""
    return re.sub(r">=\s*", "==", requirement, count=1)


if __name__ == "__main__":
    path, *options = sys.argv[1:]
    found = requirements(Path(path), [name for name in options if name != "--lowest"])
    print("\n".join(map(lowest, found) if "--lowest" in options else found))
