"""Gradient checkpointing: the same gradients from less memory, and refused where it would change the result."""

import pytest
import torch

from odcft.backbone.activation_memory import bytes_per_image
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


def gradients(backbone):
    backbone.train().zero_grad()
    torch.manual_seed(5)
    backbone(torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    return [parameter.grad.clone() for parameter in backbone.parameters() if parameter.grad is not None]


def test_checkpointing_gives_the_same_bits_and_keeps_less_also_after_resizing():
    backbone = load_backbone("scratch:test_vit").backbone
    before, kept = gradients(backbone), bytes_per_image(backbone, 160, torch.float32)
    backbone.save_activations_at_blocks_only()
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(backbone), strict=True))
    assert bytes_per_image(backbone, 160, torch.float32) < 0.5 * kept
    backbone.resize(96)
    assert backbone.net.grad_checkpointing


@pytest.mark.parametrize(("arch", "why"), [("test_resnet", "has batch norm"), ("alexnet", "has batch norm")])
def test_checkpointing_is_refused_where_batch_norm_would_count_twice(arch, why):
    with pytest.raises(OdcftError, match=why + r".*optim\.accumulate=2"):
        load_backbone(f"scratch:{arch}").backbone.save_activations_at_blocks_only()
