"""The fine-tuning methods by name: each a module with the same functions, in the order of a run.

`HAS_NECK`, `features_for_kmeans` and `start` before it; `begin_epoch` and `draw` at the start of an epoch; `targets`
and `update` in every step. What a snapshot keeps is the same for all (clusters.py). Collaborative ODC is ODC over the
joint features of several networks (members.py).
"""

from types import ModuleType

from odcft.clustering import deepcluster, odc

METHODS: dict[str, ModuleType] = {"odc": odc, "codc": odc, "dc": deepcluster}
