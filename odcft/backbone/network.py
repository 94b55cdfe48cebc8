"""The backbone: a network without its classifier, and the adapter that converts images to the input it expects."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from odcft.backbone.input_recognition import input_from_cfg
from odcft.backbone.network_input import Adapter, Input
from odcft.backbone.non_timm_networks import NETWORKS, SkipRandomInit, build
from odcft.data.view import View
from odcft.errors import OdcftError, ran_out_of_memory


class Backbone(nn.Module):
    """A network without its classifier, and the adapter that converts images to the input it expects.

    Attributes:
        net: the network itself; its state dict has the names of timm's network (or of the one in NETWORKS).
        arch: its name.
        arch_args: further arguments it was built with.
        input: its size, colours, range and normalisation.
        width: F, the length of a feature.
        size: side in pixels of the images it was made for.
        fixed_size: whether it takes no other size.
    """

    def __init__(self, arch: str, input: Input | None = None, random: bool = True, **kwargs: Any) -> None:
        super().__init__()
        with nullcontext() if random else SkipRandomInit():
            net: Any = build(arch, **kwargs)
        self.net, self.arch, self.arch_args = net, arch, kwargs
        cfg: dict[str, Any] = getattr(net, "pretrained_cfg", {})
        if input is None:
            size = kwargs.get("img_size") or cfg["input_size"][-1] if cfg else 0
            input = input_from_cfg(cfg, size) if cfg else NETWORKS[arch][1]
        self.adapter = Adapter(input)
        self.fixed_size: bool = bool(cfg.get("fixed_input_size")) if cfg else NETWORKS[arch][2]
        # Pooled features may be wider than the output of the last block.
        self.width: int = getattr(net, "head_hidden_size", None) or net.num_features

    @property
    def input(self) -> Input:
        """The input the network expects."""
        return self.adapter.input

    @property
    def size(self) -> int:
        """Side in pixels of the images it was made for."""
        return self.input.size

    def set_view(self, view: View) -> None:
        """Use another size, crop and interpolation from now on; exports record it.

        Raises:
            OdcftError: the network does not take images of that size.
        """
        if self.fixed_size and view.size != self.size:
            raise OdcftError(f"{self.arch} takes images of {self.size} pixels only, not {view.size}.")
        if not self.accepts_size(view.size):
            raise OdcftError(f"{self.arch} cannot process images of {view.size} pixels. It was made for {self.size}.")
        self.adapter = Adapter(self.input.with_view(view)).to(next(self.parameters()).device)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in 0..1, to pooled features (B, F)."""
        return self.net(self.adapter(images))

    @property
    def is_transformer(self) -> bool:
        """Whether it has attention and no batch norm, and so does not train with SGD at a ConvNet's learning rate."""
        modules = dict(self.net.named_modules())
        return any("attn" in name for name in modules) and not any(
            isinstance(module, nn.BatchNorm2d) for module in modules.values()
        )

    @torch.no_grad()
    def accepts_size(self, size: int) -> bool:
        """Whether the network can process images of size x size pixels, found out by trying.

        Small images can shrink to nothing before the last layer.
        """
        training, first = self.training, next(self.parameters())
        try:
            self.eval()(torch.zeros(1, 3, size, size, device=first.device))
        except (RuntimeError, AssertionError) as error:
            if ran_out_of_memory(error):
                raise
            return False
        finally:
            self.train(training)
        return True
