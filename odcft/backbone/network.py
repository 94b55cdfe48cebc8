"""The backbone: a network without its classifier, and the adapter that converts images to the input it expects."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from odcft.backbone.input_recognition import input_from_cfg
from odcft.backbone.input_resizing import resized, size_step
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
        model_type: of the folder of Hugging Face's transformers that it came from, or "".
        checkpointing: whether only the activations between blocks are kept for the backward pass.
        frozen: names of the parts of `net` that stay in evaluation mode (frozen_stages.py).
        fixed_size: whether it is built for that size; `resize` builds it for another, if timm can.
    """

    def __init__(self, arch: str, input: Input | None = None, random: bool = True, **kwargs: Any) -> None:
        super().__init__()
        with nullcontext() if random else SkipRandomInit():
            net: Any = build(arch, **kwargs)
        self.net, self.arch, self.arch_args = net, arch, kwargs
        self.model_type = ""
        self.checkpointing = False
        self.frozen: tuple[str, ...] = ()
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
        self.resize(view.size)
        if not self.accepts_size(view.size):
            raise OdcftError(f"{self.arch} cannot process images of {view.size} pixels. It was made for {self.size}.")
        self.adapter = Adapter(self.input.with_view(view)).to(next(self.parameters()).device)

    def resize(self, size: int) -> None:
        """Build a network of fixed size for images of `size` pixels; do nothing where it takes any size.

        Its weights stay, and timm resamples those of positions. At its own size nothing changes.

        Raises:
            OdcftError: timm cannot build it for this size.
        """
        if not self.fixed_size or size == self.size:
            return
        device = next(self.parameters()).device
        self.net = resized(self.net, self.arch, self.arch_args, size).to(device)
        if self.checkpointing:
            self.save_activations_at_blocks_only()
        self.arch_args = {**self.arch_args, "img_size": size}
        self.adapter = Adapter(replace(self.input, size=size)).to(device)

    def save_activations_at_blocks_only(self) -> None:
        """Compute what is within a block again in the backward pass, which takes less memory and more time.

        Raises:
            OdcftError: the network cannot do it, or has batch norm, which would count every image twice.
        """
        advice = "Drop optim.checkpointing; optim.accumulate=2 saves memory, too."
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.net.modules()):
            raise OdcftError(
                f"{self.arch} has batch norm, and its running statistics would be updated again when activations are "
                f"computed again. {advice}"
            )
        try:
            self.net.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError, TypeError):
            raise OdcftError(f"{self.arch} has no gradient checkpointing in timm. {advice}") from None
        self.checkpointing = True

    def why_not(self, size: int) -> str:
        """Why the network takes no images of size x size pixels, not even after `resize`; "" if it does.

        It is found out by trying, on a copy.
        """
        copy = self
        if self.fixed_size and size != self.size:
            try:
                net = resized(self.net, self.arch, self.arch_args, size)
            except OdcftError as error:
                return str(error)
            copy = Backbone.__new__(Backbone)
            nn.Module.__init__(copy)
            copy.net, copy.adapter, copy.frozen = net, self.adapter, ()
        if not copy.accepts_size(size):
            return f"{self.arch} cannot process images of {size} pixels. It was made for {self.size}."
        return ""

    @property
    def size_step(self) -> int:
        """Pixels between two sizes that suit it: a transformer's patch, times how much later stages shrink the map."""
        return size_step(self.net, self.size)

    def train(self, mode: bool = True) -> "Backbone":
        """Switch to training mode, except for what is frozen, or to evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.net.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in 0..1 (or of the bands it takes), to pooled features (B, F)."""
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
            self.eval()(torch.zeros(1, self.input.bands, size, size, device=first.device))
        except (RuntimeError, AssertionError) as error:
            if ran_out_of_memory(error):
                raise
            return False
        finally:
            self.train(training)
        return True
