"""The fine-tuning methods by name: each a module with `start`, `targets`, `update`, `stored` and `restore`."""

from odcft.methods import odc

METHODS = {"odc": odc}
