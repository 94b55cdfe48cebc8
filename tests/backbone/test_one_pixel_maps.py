"""Maps of one pixel: the same outputs and gradients without the padding around them."""

import copy

import pytest
import timm
import torch
from torch import nn

from odcft.backbone import one_pixel_maps
from odcft.backbone.one_pixel_maps import OnePixelConv2d, skip_padding


@pytest.fixture
def products(monkeypatch):
    """The shapes of the weights that were multiplied as matrices."""
    shapes, linear = [], one_pixel_maps.F.linear

    def linear_and_note(maps, weight, bias):
        shapes.append(tuple(weight.shape))
        return linear(maps, weight, bias)

    monkeypatch.setattr(one_pixel_maps.F, "linear", linear_and_note)
    return shapes


def outputs_and_gradients(network, images):
    outputs = network.train()(images)
    outputs.square().mean().backward()
    return outputs, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 32), ("resnet18", 17), ("resnet14t", 32)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_outputs_and_gradients_are_the_same(arch, size, layout, products):
    torch.manual_seed(0)
    plain = timm.create_model(arch, num_classes=0).double().to(memory_format=layout)
    skipping = copy.deepcopy(plain)
    skip_padding(skipping)
    assert list(skipping.state_dict()) == list(plain.state_dict())
    images = torch.rand(4, 3, size, size, dtype=torch.float64).contiguous(memory_format=layout)
    outputs, gradients = outputs_and_gradients(plain, images)
    found, found_gradients = outputs_and_gradients(skipping, images)
    assert products
    assert torch.allclose(found, outputs, rtol=1e-9, atol=1e-12)
    for one, other in zip(found_gradients, gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-10 * float(other.abs().max()) + 1e-12)


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "pad", "met"),
    [(1, 3, 1, 1, 1), (2, 3, 2, 1, 2), (2, 7, 4, 3, 2), (3, 3, 1, 0, 3), (1, 1, 2, 0, 1), (1, 3, 3, 2, 1)],
)
def test_a_filter_keeps_what_meets_the_map(length, kernel, stride, pad, met, products):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, kernel, stride, pad).double()
    maps = torch.rand(2, 5, length, length, dtype=torch.float64)
    expected = conv(maps)
    assert expected.shape[2:] == (1, 1)
    skip_padding(conv)
    assert torch.allclose(conv(maps), expected, rtol=1e-9)
    assert products == [(4, 5 * met * met)]


def test_a_filter_that_meets_only_padding_stays_as_it_is(products):
    conv = nn.Conv2d(5, 4, 1, stride=5, padding=2)
    maps = torch.rand(2, 5, 1, 1)
    expected = conv(maps)
    skip_padding(conv)
    assert torch.equal(conv(maps), expected)
    assert not products


def test_larger_maps_and_other_convolutions_stay_as_they_are(products):
    network = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding="same")),
        *(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 1, padding=0, padding_mode="reflect")),
    )
    maps = torch.rand(2, 4, 1, 2)
    expected = network(maps)
    skip_padding(network)
    assert [type(layer) is OnePixelConv2d for layer in network] == [True, False, False, False, False]
    assert torch.equal(network(maps), expected)
    assert not products
