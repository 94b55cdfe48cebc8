import pytest
import timm
import torch
from torch import nn

from odcft.backbone import load_backbone
from odcft.errors import OdcftError
from odcft.inputs import IMAGENET, Adapter, Input, default, load

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)


def test_rgb_and_bgr_are_the_same_numbers_in_another_order():
    assert torch.allclose(Adapter(default("rgb", 8))(IMAGES), (IMAGES - MEAN) / STD)
    assert torch.allclose(Adapter(default("bgr", 8))(IMAGES), ((IMAGES - MEAN) / STD).flip(1))


def test_values_up_to_255():
    caffe = Input("bgr", 8, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), range=255)
    expected = IMAGES.flip(1) * 255 - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    assert torch.allclose(Adapter(caffe)(IMAGES), expected, atol=1e-4)


def test_sobel_is_deepclusters_two_layers():
    """Greyscale by a third each, then the two filters with padding 1, as convolutions with their stored weights."""
    grey = nn.Conv2d(3, 1, 1)
    sobel = nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        grey.weight.fill_(1 / 3), grey.bias.zero_(), sobel.bias.zero_()
        sobel.weight[0, 0] = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        sobel.weight[1, 0] = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
        expected = sobel(grey((IMAGES - MEAN) / STD))
    assert torch.allclose(Adapter(default("sobel", 8))(IMAGES), expected, atol=1e-5)


def test_lightness_of_black_white_and_grey():
    greys = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    levels = Adapter(default("lab_l", 8))(greys)[:, 0, 0, 0]
    assert levels.tolist() == pytest.approx([-50.0, 50.0, 53.39 - 50], abs=0.02)  # CIE L* of sRGB 0.5 is 53.39
    zhang = Adapter(Input("lab_l", 8, (50.0,), (100.0,), channels=4))(greys)
    assert zhang[:, 0, 0, 0].tolist() == pytest.approx([-0.5, 0.5, 0.0339], abs=2e-4)
    assert not zhang[:, 1:].any()  # no hints, no mask


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray", "lab_l", "sobel"])
def test_an_input_survives_json(color):
    assert load(default(color, 96).dump()) == default(color, 96)


def test_the_users_word_is_followed_and_a_first_convolution_adapted_only_then(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "rgb.pth")
    rgb = load_backbone(tmp_path / "rgb.pth")
    assert not rgb.notes
    assert load_backbone(tmp_path / "rgb.pth", input="bgr").backbone.input.color == "bgr"
    gray = load_backbone(tmp_path / "rgb.pth", input="gray")
    assert any("adapted from 3 to 1" in note for note in gray.notes)
    images = IMAGES[:, :1].expand(-1, 3, -1, -1).repeat(1, 1, 8, 8)
    with torch.no_grad():  # a gray image through the sum of the weights: the same but for the means of the channels
        a, b = rgb.backbone.net(images), gray.backbone.net(images[:, :1])
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(OdcftError, match="no way to adapt"):
        load_backbone(tmp_path / "rgb.pth", input="sobel")
    with pytest.raises(OdcftError, match="no such input"):
        load_backbone(tmp_path / "rgb.pth", input="infrared")
