"""The Python names: `import odcft` is light, and every verb is a function, whatever was imported before."""

import pkgutil
import subprocess
import sys

import odcft

# Twice, in both orders, after the modules that hold them: a sub-module of a verb's name would hide the function.
EVERY_ORDER = """
import sys, types
import odcft
assert "torch" not in sys.modules
verbs = [name for name in odcft.__all__ if name != "__version__"]
for order in (verbs, verbs[::-1]):
    for name in order:
        assert isinstance(getattr(odcft, name), types.FunctionType), name
import odcft.evaluation.comparison, odcft.cli, odcft.demo, odcft.pretexts.training, odcft.exports
import odcft.clustering.kmeans
from odcft import *
for name in verbs:
    assert isinstance(getattr(odcft, name), types.FunctionType), name
    assert getattr(odcft, name) is globals()[name], name
"""


def test_every_verb_is_a_function_in_any_order_and_twice():
    subprocess.run([sys.executable, "-c", EVERY_ORDER], check=True)


def test_no_module_has_the_name_of_a_verb():
    modules = {module.name for module in pkgutil.iter_modules(odcft.__path__)}
    assert not modules & set(odcft.__all__)
