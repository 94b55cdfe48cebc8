"""odcft: fine-tune self-supervised vision backbones on unlabelled images by Online Deep Clustering.

The public names are fetched on first use, so that `import odcft` (which the command line does) does not import torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from odcft import torchvision_on_cpu  # noqa: F401 - first: it must stand before anything imports torchvision

if TYPE_CHECKING:  # for editors and type checkers
    from odcft.api import clusters, embed, evaluate, export, find_images, fine_tune, init_memory, load_backbone, report
    from odcft.distributed.stop_signals import Stopped
    from odcft.errors import OdcftError
    from odcft.recipe import Recipe, load_recipe

__version__ = "0.2.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime looks up its maker's host, and writes into HOME

_MODULES = {
    "load_recipe": "odcft.recipe",
    "Recipe": "odcft.recipe",
    "OdcftError": "odcft.errors",
    "Stopped": "odcft.distributed.stop_signals",
}

__all__ = [
    "OdcftError",
    "Recipe",
    "Stopped",
    "__version__",
    "clusters",
    "embed",
    "evaluate",
    "export",
    "find_images",
    "fine_tune",
    "init_memory",
    "load_backbone",
    "load_recipe",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module(_MODULES.get(name, "odcft.api")), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'odcft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
