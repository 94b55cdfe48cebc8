from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from odcft.backbone.load import load_backbone
from odcft.backbone.network_input import CHANNELS, IMAGENET, Adapter, Input, default_input, input_from_json
from odcft.data.view import View
from odcft.errors import OdcftError

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)


def test_rgb_and_bgr_are_the_same_numbers_in_another_order():
    assert torch.allclose(Adapter(default_input("rgb", 8))(IMAGES), (IMAGES - MEAN) / STD)
    assert torch.allclose(Adapter(default_input("bgr", 8))(IMAGES), ((IMAGES - MEAN) / STD).flip(1))


def test_values_up_to_255():
    caffe = Input("bgr", 8, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), range=255)
    expected = IMAGES.flip(1) * 255 - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    assert torch.allclose(Adapter(caffe)(IMAGES), expected, atol=1e-4)


def test_sobel_is_deepclusters_two_layers():
    """Grey as the mean of the channels, then the two filters with padding 1: convolutions with the stored weights."""
    grey = nn.Conv2d(3, 1, 1)
    sobel = nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        grey.weight.fill_(1 / 3), grey.bias.zero_(), sobel.bias.zero_()
        sobel.weight[0, 0] = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        sobel.weight[1, 0] = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
        expected = sobel(grey((IMAGES - MEAN) / STD))
    assert torch.allclose(Adapter(default_input("sobel", 8))(IMAGES), expected, atol=1e-5)


def test_lightness_of_black_white_and_grey():
    greys = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    levels = Adapter(default_input("lab_l", 8))(greys)[:, 0, 0, 0]
    assert levels.tolist() == pytest.approx([-50.0, 50.0, 53.39 - 50], abs=0.02)  # CIE L* of sRGB 0.5 is 53.39
    zhang = Adapter(Input("lab_l", 8, (50.0,), (100.0,), channels=4))(greys)
    assert zhang[:, 0, 0, 0].tolist() == pytest.approx([-0.5, 0.5, 0.0339], abs=2e-4)
    assert not zhang[:, 1:].any()  # no hints, no mask


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray", "lab_l", "sobel"])
def test_an_input_survives_json(color):
    assert input_from_json(default_input(color, 96).dump()) == default_input(color, 96)


def test_the_users_colours_are_used_and_a_first_convolution_is_only_adapted_for_them(tmp_path):
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
    for ckpt in (tmp_path / "rgb.pth", "scratch:test_resnet"):
        with pytest.raises(OdcftError, match="no such input"):
            load_backbone(ckpt, input="infrared")


def test_other_colours_keep_the_view(tmp_path):
    """Crop, interpolation and intensity range do not depend on the colours."""
    shown = Input("rgb", 48, *IMAGENET, crop_fraction=0.9, interpolation="bicubic", intensity=(0.0, 4095.0))
    assert input_from_json(shown.dump()) == shown
    save(tmp_path / "c.safetensors", shown)
    for color in CHANNELS:
        seen = load_backbone(tmp_path / "c.safetensors", input=color, allow_partial=True).backbone.input
        assert seen.color == color
        assert seen.view == View(48, 0.9, "bicubic", (0.0, 4095.0))


def save(path, shown, arch="test_resnet"):
    import json

    from safetensors.torch import save_file

    told = {"architecture": arch, "arch_args": "{}", "input": json.dumps(shown.dump())}
    save_file(timm.create_model(arch, num_classes=0).state_dict(), path, metadata=told)


@pytest.mark.parametrize("color", CHANNELS)
@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "alexnet"])
def test_random_weights_are_drawn_for_the_colours_the_network_takes(arch, color):
    """As for Fig. 1 of the paper and DC from scratch: a ResNet for two channels whose filters are drawn for two."""
    loaded = load_backbone(f"scratch:{arch}", input=color)
    assert not loaded.notes
    backbone = loaded.backbone
    first = next(module for module in backbone.net.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == CHANNELS[color] == backbone.input.channels
    assert backbone.input.color == color
    side = backbone.size
    with torch.no_grad():
        assert torch.isfinite(backbone.eval()(torch.rand(1, 3, side, side))).all()
    again = load_backbone(f"scratch:{arch}", input=color).backbone.net.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in backbone.net.state_dict().items())


def test_filters_for_two_channels_have_the_variance_for_two():
    weight = load_backbone("scratch:resnet50", input="sobel").backbone.net.conv1.weight
    assert weight.shape == (64, 2, 7, 7)
    assert weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)  # Kaiming, by what comes out


def test_filters_trained_on_colours_are_not_used_for_gradients(tmp_path):
    """Refused; if the user allows a partial backbone, that layer starts random and the rest is kept."""
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save(state, tmp_path / "rgb.pth")
    with pytest.raises(OdcftError, match=r"no way to adapt its first convolution.*--allow-partial"):
        load_backbone(tmp_path / "rgb.pth", input="sobel")
    loaded = load_backbone(tmp_path / "rgb.pth", input="sobel", allow_partial=True)
    (note,) = loaded.notes
    assert "(conv1.0.weight) now takes 2 channels and starts random, as --input sobel asks" in note
    told = loaded.backbone.net.state_dict()
    assert told["conv1.0.weight"].shape[1] == 2
    assert all(torch.equal(told[name], tensor) for name, tensor in state.items() if name != "conv1.0.weight")
    assert loaded.backbone(torch.rand(1, 3, 64, 64)).shape == (1, loaded.backbone.width)
    again = load_backbone(tmp_path / "rgb.pth", input="sobel", allow_partial=True).backbone.net.state_dict()
    assert torch.equal(again["conv1.0.weight"], told["conv1.0.weight"])
    other = load_backbone(tmp_path / "rgb.pth", input="sobel", allow_partial=True, seed=1).backbone.net.state_dict()
    assert not torch.equal(other["conv1.0.weight"], told["conv1.0.weight"])


@pytest.mark.parametrize("color", CHANNELS)
def test_the_users_mean_and_std_are_fractions_of_the_range(color):
    """Whatever the range is: 1, 255, or 100 for lightness."""
    count = 3 if color == "sobel" else CHANNELS[color]
    mean, std = [0.1 * (c + 1) for c in range(count)], [0.2] * count
    loaded = load_backbone("scratch:test_resnet", input=color, mean=mean, std=std)
    shown, usual = loaded.backbone.input, default_input(color, 64)
    assert shown.mean == pytest.approx([m * usual.range for m in mean])
    assert shown.std == pytest.approx([s * usual.range for s in std])
    own = load_backbone("scratch:test_resnet", input=color).backbone.input
    assert load_backbone("scratch:test_resnet", input=color, std=std).backbone.input.mean == own.mean
    plain = Adapter(replace(usual, mean=(0.0,) * count, std=(1.0,) * count))
    if color != "sobel":
        assert torch.allclose(
            Adapter(replace(shown, size=8))(IMAGES),
            (plain(IMAGES) / usual.range - torch.tensor(mean).view(1, -1, 1, 1)) / 0.2,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5], None, "data.mean=[0.5]: test_resnet takes rgb; give 3 numbers, one a channel"),
        (None, [0.2] * 4, "give 3 numbers"),
        ([], None, "give 3 numbers"),
        ([0.5, 0.5, float("nan")], None, "give finite numbers"),
        (None, [0.2, 0.2, 0.0], "give finite numbers above 0"),
        (None, [0.2, 0.2, -1.0], "give finite numbers above 0"),
        (None, [0.2, 0.2, float("inf")], "give finite numbers above 0"),
    ],
)
def test_an_impossible_mean_or_std_is_refused(mean, std, said):
    with pytest.raises(OdcftError) as refusal:
        load_backbone("scratch:test_resnet", mean=mean, std=std)
    assert said in str(refusal.value)
