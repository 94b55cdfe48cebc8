"""Which input a checkpoint's network was trained on: each rule on its own."""

from dataclasses import replace

import pytest
from backbone_helpers import contents, matched

from odcft.backbone.checkpoint_metadata import Metadata
from odcft.backbone.input_recognition import input_from_cfg, recognise_input, with_color
from odcft.backbone.network_input import IMAGENET, Input, bands_input, default_input
from odcft.backbone.non_timm_networks import NETWORKS
from odcft.data.view import View
from odcft.errors import OdcftError

CFG = {"input_size": (3, 128, 160), "mean": (0.5,) * 3, "std": (0.25,) * 3, "classifier": "fc", "crop_pct": 0.95}


def shown(arch="resnet18", cfg=CFG, dropped=(), kwargs=None, **about):
    return recognise_input(contents({}, **about), arch, kwargs or {}, matched(dropped=dropped), cfg)


@pytest.mark.parametrize(
    ("arch", "kwargs", "color", "channels"),
    [
        ("resnet18", {}, "rgb", 0),
        ("resnet18", {"in_chans": 1}, "lab_l", 0),
        ("resnet18", {"in_chans": 2}, "sobel", 0),
        ("alexnet_deepcluster", {}, "sobel", 0),
        ("alexnet_deepcluster", {"in_chans": 3}, "rgb", 0),
        ("colorization_siggraph17", {}, "lab_l", 4),
    ],
)
def test_the_files_own_input_is_used_if_its_channels_are_the_networks(arch, kwargs, color, channels):
    own = replace(default_input(color, 48), channels=channels or default_input(color, 48).channels)
    assert shown(arch, metadata=Metadata(input=own), kwargs=kwargs) == own
    other = Metadata(input=replace(own, channels=own.channels + 1))
    told = shown(arch, metadata=other, kwargs=kwargs)
    assert told != other.input
    (said,) = other.ignored
    assert f"{own.channels + 1} channels: the first convolution takes {own.channels}" in said


def test_our_own_networks_have_their_own_input():
    for arch, (_, own, _) in NETWORKS.items():
        assert shown(arch) == own
    bgr = shown("alexnet_jigsaw", container="pickle")
    assert (bgr.color, bgr.size, bgr.mean, bgr.std) == ("bgr", 227, IMAGENET[0][::-1], IMAGENET[1][::-1])
    assert shown("alexnet_colorization", container="pickle").color == "lab_l"
    assert shown("alexnet_deepcluster", kwargs={"in_chans": 3}) == default_input("rgb", 224)
    assert shown("alexnet_deepcluster", kwargs={"in_chans": 1}) == default_input("gray", 224)
    assert shown("alexnet", kwargs={"in_chans": 2}) == default_input("sobel", 224)


def test_the_number_of_channels_implies_the_colours():
    assert shown(kwargs={"in_chans": 1}) == default_input("gray", 160)
    assert shown(kwargs={"in_chans": 2}) == default_input("sobel", 160)
    assert shown(kwargs={"in_chans": 1, "last_stride": 1}) == default_input("lab_l", 160)
    assert shown(kwargs={"in_chans": 1, "last_stride": 1, "img_size": 96}) == default_input("lab_l", 96)
    assert shown(kwargs={"in_chans": 2, "img_size": 64}) == default_input("sobel", 64)
    assert shown(kwargs={"in_chans": 1, "small_stem": True}) == default_input("gray", 32)
    for channels in (4, 7, 16):
        assert shown(kwargs={"in_chans": channels}) == bands_input(160, channels)
        assert shown(kwargs={"in_chans": channels}).bands == channels
    for channels in (0, 17):
        with pytest.raises(OdcftError, match=f"takes {channels} channels; odcft gives networks 1 to 16"):
            shown(kwargs={"in_chans": channels})


def test_caffe2_shows_bgr():
    assert shown(container="pickle", names=["blobs"]) == default_input("bgr", 160)
    assert shown(container="torch", names=["blobs"]).color == "rgb"
    assert shown(container="pickle").color == "rgb"


def test_timms_cfg_is_used_for_timms_files():
    timms = input_from_cfg(CFG, 160)
    assert (timms.mean, timms.std, timms.size, timms.crop_fraction) == ((0.5,) * 3, (0.25,) * 3, 160, 0.95)
    assert shown(metadata=Metadata("resnet18")) == timms
    assert shown(metadata=Metadata(cfg={"mean": (0.1,) * 3})) == replace(timms, mean=(0.1,) * 3)
    assert shown(metadata=Metadata("resnet18", cfg={"input_size": [3, 96, 96]})).size == 96
    assert shown(metadata=Metadata("resnet18", cfg={"input_size": [3, 96, 96]}), kwargs={"img_size": 64}).size == 64
    assert shown(metadata=Metadata("resnet18"), kwargs={"small_stem": True}).size == 32
    one = Metadata("resnet18", cfg={"mean": [0.1], "std": [0.1], "crop_pct": 0.5})
    assert shown(metadata=one) == replace(timms, crop_fraction=0.5)
    assert one.ignored == ["mean and std should have 3 numbers"]


def test_timms_classifier_implies_timms_normalisation_and_otherwise_it_is_imagenets():
    assert shown() == Input("rgb", 160, *IMAGENET)
    assert shown(dropped=["module.fc.weight"]) == input_from_cfg(CFG, 160)
    assert shown(dropped=["fc.bias", "head.weight"]) == Input("rgb", 160, *IMAGENET)
    several = {**CFG, "classifier": ("head", "head_dist")}
    assert shown(cfg=several, dropped=["head_dist.weight"]) == input_from_cfg(CFG, 160)
    for nothing in ({**CFG, "classifier": None}, {key: value for key, value in CFG.items() if key != "classifier"}):
        assert shown(cfg=nothing, dropped=["fc.weight", ".weight"]) == Input("rgb", 160, *IMAGENET)


def test_a_cfg_with_little_in_it_gets_the_usual_view():
    least = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert input_from_cfg(least, 64).view == View(64, 0.875, "bilinear")
    assert input_from_cfg({**least, "interpolation": "bicubic", "crop_pct": 1.0}, 64).view == View(64, 1.0, "bicubic")
    assert input_from_cfg({**least, "interpolation": "random"}, 64).interpolation == "bilinear"


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray", "lab_l", "sobel"])
def test_the_users_colours_override_the_networks(color):
    own = Input("rgb", 48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_fraction=0.9, interpolation="bicubic")
    told = with_color(own, color)
    assert (told.color, told.view) == (color, own.view)
    usual = default_input(color, 48)
    mean, std = {"rgb": (own.mean, own.std), "bgr": (own.mean[::-1], own.std[::-1])}.get(color, (usual.mean, usual.std))
    if color != "rgb":
        assert (told.mean, told.std) == (mean, std)
    back = with_color(with_color(own, "bgr"), "rgb")
    assert back == own
