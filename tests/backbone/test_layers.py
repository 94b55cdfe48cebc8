"""Features of layers: pooled as published, the last equal to the backbone's own."""

import pytest
import torch

from odcft.backbone.layers import LAST, MAX_LAYERS, LayerFeatures, pool
from odcft.backbone.network import Backbone


@pytest.mark.parametrize(
    ("channels", "side", "numbers"),
    [(64, 112, 9216), (256, 56, 9216), (512, 28, 8192), (1024, 14, 9216), (2048, 7, 8192)],
)
def test_maps_of_a_resnet_50_are_pooled_to_the_published_numbers(channels, side, numbers):
    assert pool(torch.zeros(1, channels, side, side)).shape == (1, numbers)


def test_published_windows_are_used():
    """conv1: 12 windows of 10 pixels, four pixels beyond the edge on either side, where zeros count."""
    pooled = pool(torch.ones(1, 64, 112, 112)).view(64, 12, 12)
    assert torch.equal(pooled[0, 1:-1, 1:-1], torch.ones(10, 10))
    assert pooled[0, 0, 0] == pytest.approx(0.36)


@pytest.mark.parametrize("channels", [1, 96, 9216, 20_000])
def test_any_map_gives_at_most_about_9000_numbers_or_one_for_each_channel(channels):
    numbers = pool(torch.zeros(1, channels, 5, 5)).shape[1]
    assert numbers <= max(9_700, channels)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_convnext", "alexnet_deepcluster", "rotnet_nin4"])
def test_last_layer_is_what_the_backbone_gives(arch):
    torch.manual_seed(0)
    backbone = Backbone(arch).eval()
    images = torch.rand(2, 3, backbone.size, backbone.size)
    layers = LayerFeatures(backbone)
    with torch.no_grad():
        parts = layers.split(layers(images))
        assert torch.equal(parts[LAST], backbone(images))
    assert layers.names[-1] == LAST
    assert 2 <= len(layers.names) <= MAX_LAYERS + 1
    assert all(part.shape == (2, width) for part, width in zip(parts.values(), layers.widths, strict=True))


def test_stem_of_a_resnet_is_taken_before_its_pooling():
    """Published: after the first activation, 112 of 224 pixels wide."""
    backbone = Backbone("test_resnet").eval()
    layers = LayerFeatures(backbone)
    assert layers.names[0] == "act1"
    assert layers.widths[0] == 32 * round((9216 / 32) ** 0.5) ** 2


def test_of_a_deep_network_layers_are_spread_and_the_deepest_is_among_them():
    layers = LayerFeatures(Backbone("vit_tiny_patch16_224", img_size=32, depth=24).eval())
    assert layers.names == [*(f"blocks.{n}" for n in range(1, 24, 2)), LAST]
