"""The fine-tuning methods by name: each a module with `start`, `targets` and `update`."""

from odcft.methods import odc

METHODS = {"odc": odc}
