"""The wheel has every module and every file that the package reads, wherever it was built."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from odcft import __version__

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_has_all_modules_recipes_and_the_index(tmp_path):
    source = tmp_path / "source"
    for name in ("odcft", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"odcft-{__version__}-")  # written in odcft/__init__.py only
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(source).as_posix() for path in (source / "odcft").rglob("*.py")}
    recipes = {f"odcft/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.*")}
    page = {f"odcft/reports/page.{ending}" for ending in ("html.jinja", "css", "js")}
    tables = {"odcft/backbone/timm_index.json", "odcft/evaluation/unlabelled_calibration.json"}
    assert names == modules | recipes | page | tables | {"odcft/py.typed"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import odcft, odcft.recipe as r; print(odcft.__file__); print(r.load_recipe('small').method, len(r.shipped()))"
    )
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    where, what = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "installed")
    assert what == f"odc {len(recipes) - 1}"  # but for __init__.py


def test_the_changelog_knows_the_version_and_the_metadata_do_not_repeat_it():
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert __version__ not in (ROOT / "pyproject.toml").read_text()
