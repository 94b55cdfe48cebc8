"""Encoders of CLIP, efficientnet_pytorch and segmentation_models_pytorch load to the bit under their authors' names."""

import re

import pytest
import timm
import torch
from backbone_helpers import equal
from timm.models.byobnet import checkpoint_filter_fn

from odcft.backbone.checkpoint_files import read
from odcft.backbone.load import load_backbone
from odcft.backbone.original_layouts import layout_of, with_timm_names


def random_state(net, seed=0):
    """The network's state dict, filled with random numbers."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=draw) * 0.1
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return net.state_dict()


def as_clip_resnet(state):
    """timm's names under those of OpenAI's ModifiedResNet."""
    for name, tensor in state.items():
        name = re.sub(r"^stem\.conv(\d)\.(conv|bn)", r"visual.\2\1", name)
        name = re.sub(
            r"^stages\.(\d)\.(\d+)\.conv(\d)_\w+\.(conv|bn)",
            lambda found: f"visual.layer{int(found[1]) + 1}.{found[2]}.{found[4]}{found[3]}",
            name,
        )
        name = re.sub(
            r"^stages\.(\d)\.(\d+)\.shortcut\.conv\.(conv|bn)",
            lambda found: f"visual.layer{int(found[1]) + 1}.{found[2]}.downsample.{int(found[3] == 'bn')}",
            name,
        )
        name = name.replace("head.pos_embed", "visual.attnpool.positional_embedding")
        yield re.sub(r"^head\.([qkv])\.", r"visual.attnpool.\1_proj.", name), tensor
    yield "visual.attnpool.c_proj.weight", torch.zeros(1024, 2048)
    yield "visual.attnpool.c_proj.bias", torch.zeros(1024)
    yield "transformer.resblocks.0.ln_1.weight", torch.ones(4)
    yield "logit_scale", torch.tensor(1.0)


def as_efficientnet_pytorch(state):
    """timm's names under those of lukemelas/EfficientNet-PyTorch."""
    number = {}
    for name in state:
        if found := re.match(r"blocks\.\d+\.\d+\.", name):
            number.setdefault(found[0], len(number))
    expanded = {name.split("conv_pwl")[0] for name in state if "conv_pwl" in name}
    with_expansion = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    with_expansion |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    without = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    se = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    for name, tensor in state.items():
        if found := re.match(r"(blocks\.\d+\.\d+\.)(.+)\.(\w+)$", name):
            names = {**(with_expansion if found[1] in expanded else without), **se}
            yield f"_blocks.{number[found[1]]}.{names[found[2]]}.{found[3]}", tensor
        else:
            layer, leaf = name.split(".")
            yield f"{ends[layer]}.{leaf}", tensor


def small_clip_resnet():
    cfg = timm.models.byobnet.model_cfgs["resnet50_clip"]
    blocks = tuple(timm.models.byobnet.ByoBlockCfg(type="bottle", d=1, c=64, s=2, br=0.25) for _ in cfg.blocks)
    small = timm.models.byobnet.replace(cfg, blocks=blocks, stem_chs=(4, 4, 8))
    return timm.models.byobnet.ByobNet(small, num_classes=0, img_size=32)


def test_clips_resnets_are_named_as_timm_names_them():
    net = small_clip_resnet()
    theirs = dict(as_clip_resnet(random_state(net)))
    ours, converted = with_timm_names(theirs), checkpoint_filter_fn(dict(theirs), net)
    assert layout_of(theirs) == "clip resnet"
    for name, tensor in net.state_dict().items():
        assert torch.equal(ours[f"visual.{name}"], converted[name]), name
        assert torch.equal(ours[f"visual.{name}"], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50_clip", "resnet101_clip", "resnet50x4_clip"])
def test_clips_resnets_load_and_their_projection_is_left_out(arch, tmp_path):
    state = random_state(timm.create_model(arch, num_classes=0))
    torch.save(dict(as_clip_resnet(state)), tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert (loaded.backbone.arch, loaded.match.coverage) == (arch, 1)
    assert equal(loaded.backbone, state)
    assert loaded.backbone.input.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert "visual.head.proj.weight" in loaded.match.dropped


def test_blocks_that_are_counted_through_are_put_into_stages():
    stages = [["ds_r2_k3_s1_e1_c8_se0.25"], ["ir_r3_k3_s2_e6_c16_se0.25"], ["ir_r1_k5_s2_e6_c24_se0.25"]]
    blocks = timm.models._efficientnet_builder.decode_arch_def(stages)
    state = random_state(timm.models.efficientnet.EfficientNet(blocks, num_classes=0, num_features=32))
    theirs = dict(as_efficientnet_pytorch(state))
    assert layout_of(theirs) == "efficientnet_pytorch"
    assert {"_blocks.5._expand_conv.weight", "_conv_head.weight"} < set(theirs)
    ours = with_timm_names(theirs)
    assert set(ours) == set(state)
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["tf_efficientnet_b0", "tf_efficientnet_b3"])
def test_efficientnet_pytorch_inside_a_segmentation_model(arch, tmp_path):
    state = random_state(timm.create_model(arch, num_classes=0))
    model = {f"encoder.{name}": tensor for name, tensor in as_efficientnet_pytorch(state)}
    model |= {f"decoder.blocks.{n}.conv1.0.weight": torch.ones(8, 8, 3, 3) for n in range(5)}
    torch.save({"state_dict": {**model, "segmentation_head.0.weight": torch.ones(1, 8, 3, 3)}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert (loaded.backbone.arch, loaded.match.coverage) == (arch, 1)
    assert equal(loaded.backbone, state)


FEATURES_ONLY = {
    "resnet18": ("resnet18", 0),
    "convnext_atto": ("convnext_atto", 2),
    "swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", 2),
    "regnetx_002": ("regnetx_002", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES_ONLY)
def test_encoders_of_timms_inside_a_segmentation_model(name, tmp_path):
    """`tu-` encoders lack what stands behind the last stage, which is said."""
    arch, missing = FEATURES_ONLY[name]
    state = random_state(timm.create_model(name, features_only=True))
    torch.save({f"encoder.model.{key}": tensor for key, tensor in state.items()}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert (loaded.backbone.arch, len(loaded.match.missing)) == (arch, missing)
    own = loaded.backbone.net.state_dict()
    for key, tensor in state.items():
        assert torch.equal(own[re.sub(r"^([a-z]+)_(\d)\.", r"\1.\2.", key)], tensor)
    assert any("start random" in note for note in loaded.notes) == bool(missing)


def test_torchvisions_encoders_keep_their_names(tmp_path):
    state = random_state(timm.create_model("resnet18", num_classes=0))
    model = {f"encoder.{name}": tensor for name, tensor in state.items()}
    torch.save({**model, "decoder.blocks.0.conv1.0.weight": torch.ones(8, 8, 3, 3)}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert loaded.match.where == "encoder."
    assert equal(loaded.backbone, state)
    assert read(tmp_path / "c.pth").layout == ""
