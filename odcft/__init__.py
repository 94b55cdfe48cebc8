"""odcft: fine-tune self-supervised vision backbones on unlabelled images by Online Deep Clustering.

The public verbs are fetched on first use, so that `import odcft` (which the command line does) does not import torch.
"""

from importlib import import_module
from typing import Any

from odcft import torchvision_on_cpu  # noqa: F401 - first: it must stand before anything imports torchvision

__version__ = "0.2.0"

_VERBS = {
    "load_recipe": "odcft.recipe",
    "load_backbone": "odcft.backbone.load",
    "init_memory": "odcft.first_memory",
    "fine_tune": "odcft.train",
    "evaluate": "odcft.evaluation.comparison",
    "embed": "odcft.embeddings",
    "export": "odcft.exports",
    "report": "odcft.reports.run_report",
}


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'odcft' has no attribute {name!r}")


__all__ = ["__version__", *_VERBS]
