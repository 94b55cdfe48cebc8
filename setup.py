"""Which packages there are; all else is in pyproject.toml."""

from setuptools import find_packages, setup

# The recipes live at the top of the repository, where people look for them, and are installed as odcft/recipes.
setup(
    packages=[*find_packages(include=["odcft", "odcft.*"]), "odcft.recipes"],
    package_dir={"odcft.recipes": "recipes"},
)
