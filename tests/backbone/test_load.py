"""From a file to a backbone: what is recognised, what is refused, and what the notes say."""

import argparse
import collections
import datetime
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from backbone_helpers import equal, resnet_state

from odcft.backbone.inspection import describe
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


@pytest.fixture
def state():
    return resnet_state()


def test_normalisation_is_part_of_the_backbone():
    backbone = load_backbone("scratch:test_resnet").backbone
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    with torch.no_grad():
        assert torch.allclose(backbone(images), backbone.net((images - mean) / std))


@pytest.mark.parametrize(
    "arch", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "test_mambaout"]
)
def test_features_have_the_width_the_backbone_states(arch):
    backbone = load_backbone(f"scratch:{arch}").backbone
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, backbone.size, backbone.size)).shape == (2, backbone.width)


def test_a_partial_backbone_is_refused_unless_allowed(tmp_path, state):
    part = dict(list(state.items())[:40])
    torch.save({"arch": "test_resnet", "state_dict": part}, tmp_path / "part.pth")
    with pytest.raises(OdcftError, match=r"only 40 of the 90 tensors of test_resnet.*--allow-partial"):
        load_backbone(tmp_path / "part.pth")
    loaded = load_backbone(tmp_path / "part.pth", allow_partial=True)
    assert any("50 tensors are not in the file" in note for note in loaded.notes)
    assert all(torch.equal(loaded.backbone.net.state_dict()[name], tensor) for name, tensor in part.items())


def test_odd_tensors_are_named(tmp_path, state):
    state["layer2.0.conv1.weight"].zero_()
    torch.save(state, tmp_path / "c.pth")
    (note,) = load_backbone(tmp_path / "c.pth").notes
    assert "layer2.0.conv1.weight is all 0" in note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var", "bn1.bias"])
@pytest.mark.parametrize("half", [False, True])
def test_a_backbone_that_is_not_finite_is_refused_by_name(tmp_path, odcft_command, state, name, value, half):
    name = name if name in state else next(key for key in state if key.endswith(name.split(".", 1)[1]))
    state[name].view(-1)[-1] = value
    torch.save({key: t.half() if half and t.is_floating_point() else t for key, t in state.items()}, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=f"not finite .{name}.*Use an earlier checkpoint"):
        load_backbone(tmp_path / "c.pth")
    code, _, told = odcft_command("inspect", tmp_path / "c.pth")
    assert code == 0
    assert f"{name} is not finite" in told
    assert "Fine-tune it" not in told
    for command in (("export", tmp_path / "c.pth", tmp_path / "out"), ("finetune", tmp_path / "c.pth", tmp_path)):
        code, _, told = odcft_command(*command, *(["--out", tmp_path / "RUN"] if command[0] == "finetune" else []))
        assert code == 2
        assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth"]


def test_a_head_or_a_copy_that_is_not_finite_does_not_matter(tmp_path, state):
    state["fc.weight"].fill_(float("nan"))
    torch.save({"teacher": state, "student": {name: t / 0.0 for name, t in state.items()}}, tmp_path / "c.pth")
    assert equal(load_backbone(tmp_path / "c.pth").backbone, state)


def test_replaced_classes_are_named_where_they_can_matter(tmp_path, state):
    """Nearly every file has settings, numbers and optimizers beside the weights; they say nothing about the network."""
    plain = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "when": datetime.datetime(2020, 1, 1)}
    torch.save({"state_dict": state, **plain, "path": Path("x"), "hist": collections.Counter("a")}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert not loaded.notes
    torch.save({"state_dict": state, "args": argparse.Namespace(), "net": torch.nn.Linear(1, 1)}, tmp_path / "c.pth")
    (note,) = load_backbone(tmp_path / "c.pth").notes
    assert "classes were not loaded" in note
    assert "Linear" in note
    assert "Namespace" not in note


def test_other_state_dicts_are_listed_by_name(tmp_path, state):
    whole = {f"encoder_q.{name}": tensor for name, tensor in state.items()}
    torch.save({"teacher": whole, "extra": torch.zeros(2)}, tmp_path / "c.pth")
    _, drawing = describe(load_backbone(tmp_path / "c.pth"))
    lines = [line.strip() for line in drawing.lines()]
    assert "left out   2 tensors and 1 other state dict" in lines
    assert "other (no part of this network): the file itself" in lines


def test_the_author_of_a_plain_vision_transformer_is_not_guessed(tmp_path):
    """The backbones that DINO and MAE released have the same tensors as any ViT without a head."""
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    headed = timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict()
    for tree, family in (
        (bare, "dino or timm"),
        ({"model": bare}, "mae or timm"),
        ({"teacher": bare}, "dino"),
        ({"model": {**bare, "decoder_embed.weight": torch.zeros(2, 2)}}, "mae"),
        (headed, "state_dict"),
    ):
        torch.save(tree, tmp_path / "c.pth")
        assert load_backbone(tmp_path / "c.pth").family == family


def test_an_odd_position_embedding_is_reported_as_missing(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    for length in (0, 1, 2, 70_000):
        state["pos_embed"] = torch.zeros(1, length, 64)
        torch.save(state, tmp_path / "c.pth")
        assert load_backbone(tmp_path / "c.pth", "test_vit").match.missing == (["pos_embed"] if length != 2 else [])


@pytest.mark.parametrize(
    "arch",
    [
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "resnet26",
        "mixer_b32_224",
        "convnextv2_atto",
        "mobilenetv3_small_050",
        "regnetx_002",
        "deit3_small_patch16_224",
        "poolformer_s12",
        "levit_128s",
        "resnest14d",
    ],
)
def test_timms_networks_are_recognised_by_their_tensors(arch, tmp_path):
    """Nothing names the architecture: a head of 3 classes, a prefix, and a file named after another network."""
    state = timm.create_model(arch, num_classes=3).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "resnet50.pth")
    loaded = load_backbone(tmp_path / "resnet50.pth")
    told, own = loaded.backbone.net.state_dict(), timm.create_model(arch, num_classes=0).state_dict()
    assert {name: t.shape for name, t in told.items()} == {name: t.shape for name, t in own.items()}
    assert all(torch.equal(told[name], state[name]) for name in loaded.match.tensors)
    assert loaded.match.coverage == 1


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [
        ("resnet18", {"in_chans": 1}),
        ("resnet18", {"in_chans": 2}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("vit_tiny_patch16_224", {"img_size": 96, "in_chans": 1}),
    ],
)
def test_other_channels_and_sizes_are_found(arch, kwargs, tmp_path):
    state = timm.create_model(arch, **kwargs).state_dict()
    torch.save(state, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert backbone.arch_args == kwargs
    assert backbone.size == kwargs.get("img_size", 224)
    assert backbone.input.color == {1: "gray", 2: "sobel", 3: "rgb"}[kwargs.get("in_chans", 3)]
    assert equal(backbone, state)
    assert torch.isfinite(backbone(torch.rand(2, 3, backbone.size, backbone.size))).all()


def test_unknown_architecture_is_refused_with_the_nearest_one():
    with pytest.raises(OdcftError, match="did you mean resnet50"):
        load_backbone("scratch:resnet_50")


def test_a_resnet_for_small_images_keeps_its_first_convolution(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    state["conv1.weight"] = torch.randn(64, 3, 3, 3)
    torch.save(state, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert backbone.arch_args == {"small_stem": True}
    assert torch.equal(backbone.net.conv1.weight, state["conv1.weight"])
    with torch.no_grad():
        assert backbone.net.layer1(backbone.net.maxpool(backbone.net.conv1(torch.rand(1, 3, 32, 32)))).shape[-1] == 32


def test_moco_v3_has_12_heads_whoever_names_the_network(tmp_path):
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    torch.save({"state_dict": {f"module.base_encoder.{name}": t for name, t in state.items()}}, tmp_path / "c.pth")
    for arch in (None, "vit_small_patch16_224"):
        assert load_backbone(tmp_path / "c.pth", arch).backbone.arch_args == {"num_heads": 12}


def test_another_first_convolution_is_refused_by_name(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    state["conv1.weight"] = torch.randn(64, 3, 5, 5)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=r"nearly a resnet18.*first convolution.*--allow-partial"):
        load_backbone(tmp_path / "c.pth")
