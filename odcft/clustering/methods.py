"""The fine-tuning methods by name: each a module with the same functions, in the order of a run.

`neck`, `compact` and `start` before it; `begin_epoch` and `draw` at the start of an epoch; `targets` and `update` in
every step; `stored` and `restore` for snapshots.
"""

from types import ModuleType

from odcft import members
from odcft.clustering import deepcluster, odc

METHODS: dict[str, ModuleType] = {"odc": odc, "dc": deepcluster, "codc": members}
