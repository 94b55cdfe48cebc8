"""The fine-tuning methods by name. Each is a module with the same functions.

Before training `HAS_NECK`, `features_for_kmeans` and `start` are used; at the start of an epoch `begin_epoch` and
`draw`; in every step `targets`, `entries_to_find` and `update`. A snapshot keeps the same for all (clusters.py).
Collaborative ODC is ODC over the joint features of several networks (model/members.py).
"""

from types import ModuleType

from odcft.clustering import deepcluster, odc

METHODS: dict[str, ModuleType] = {"odc": odc, "codc": odc, "dc": deepcluster}
