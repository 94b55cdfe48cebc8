"""How much memory a training step keeps of every image, found out without computing anything."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from odcft.backbone.network import Backbone


def bytes_per_image(backbone: Backbone, size: int, dtype: torch.dtype) -> int:
    """Bytes of the tensors that the forward pass of one image keeps for the backward pass.

    They are counted on tensors that have shapes but no numbers, so this takes no memory and about a second.

    Args:
        backbone: not changed.
        size: of the images, in pixels.
        dtype: of autocast; float32 for none.
    """
    one, two = (_kept(backbone, images, size, dtype) for images in (2, 4))
    return (two - one) // 2  # what does not grow with the batch, such as the weights, is not counted


def _kept(backbone: Backbone, images: int, size: int, dtype: torch.dtype) -> int:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    training = backbone.training
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    fake = FakeTensorMode()
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    weights: dict[str, Tensor] = {name: fake.from_tensor(tensor.detach().to("cpu")) for name, tensor in tensors}
    with fake:
        for name, parameter in backbone.named_parameters():
            weights[name].requires_grad_(parameter.requires_grad)
        try:
            backbone.train()
            with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                torch.func.functional_call(backbone, weights, torch.empty(images, backbone.input.bands, size, size))
        finally:
            backbone.train(training)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
