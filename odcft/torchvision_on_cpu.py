"""Make torchvision importable with a CPU build of torch.

torchvision's wheel on PyPI is linked against CUDA. With a CPU build of torch its compiled operators cannot be loaded,
and `import torchvision` (which timm does) fails when it registers fake implementations of two of them, nms and
qnms. Neither odcft nor timm calls them, so they are declared here and the import succeeds; calling one still fails
because it has no kernel.
"""

import importlib.machinery
import sys
from pathlib import Path


class _BeforeTorchvision:
    """An import hook that acts once, just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec("torchvision")
        if spec is None or spec.origin is None:
            return spec

        import torch

        try:
            for library in Path(spec.origin).parent.glob("_C.*"):
                torch.ops.load_library(str(library))
        except OSError:
            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return spec


if "torchvision" not in sys.modules and not any(type(f).__name__ == "_BeforeTorchvision" for f in sys.meta_path):
    sys.meta_path.insert(0, _BeforeTorchvision())
