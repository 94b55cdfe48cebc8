"""Checkpoints of torchvision's, OpenAI's and Meta's own code give the features their own networks give."""

from dataclasses import replace

import pytest
import timm
import torch
from backbone_helpers import contents

from odcft.backbone.architecture_recognition import recognise
from odcft.backbone.load import load_backbone
from odcft.backbone.original_layouts import LAYOUTS, layout_of, with_timm_names
from odcft.errors import OdcftError


def filled(net):
    """The network with no norm at one, no bias and no layer scale at zero."""
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and (tensor.ndim < 2 or "scale" in name or "token" in name):
            low = 0.6 if "var" in name or "scale" in name or name.endswith("weight") else -0.2
            tensor.uniform_(low, low + 0.8)
    return net.eval()


TORCHVISION = {
    "vit_b_16": ("vit_base_patch16_224", {}, "heads"),
    "convnext_tiny": ("convnext_tiny", {}, "classifier.2"),
    "swin_t": ("swin_tiny_patch4_window7_224", {}, "head"),
    "swin_v2_t": ("swinv2_tiny_window8_256", {}, "head"),
    "efficientnet_b0": ("efficientnet_b0", {}, "classifier"),
    "efficientnet_b5": ("efficientnet_b5", {"bn_eps": 0.001}, "classifier"),
    "efficientnet_v2_s": ("efficientnetv2_s", {"bn_eps": 0.001}, "classifier"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_recognised_and_give_their_features(name, tmp_path):
    models = pytest.importorskip("torchvision.models")
    arch, arguments, head = TORCHVISION[name]
    net = filled(getattr(models, name)(weights=None))
    torch.save({"model": {f"module.{key}": tensor for key, tensor in net.state_dict().items()}}, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert (backbone.arch, backbone.arch_args) == (arch, arguments)
    net.set_submodule(head, torch.nn.Identity())
    side = backbone.size if backbone.fixed_size else 64
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        theirs, ours = net(pixels).flatten(1), backbone.net(pixels)
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def small_torchvision_networks():
    models = pytest.importorskip("torchvision.models")
    vit = models.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5)
    vit.heads = torch.nn.Identity()
    yield (
        vit,
        "vit_base_patch16_224",
        {**{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}},
    )
    setting = models.convnext.CNBlockConfig
    convnext = models.ConvNeXt([setting(8, 16, 1), setting(16, 24, 1), setting(24, 32, 2), setting(32, None, 1)])
    convnext.classifier[2] = torch.nn.Identity()
    yield convnext, "convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
    swin = models.SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4])
    swin.head = torch.nn.Identity()
    sizes = {"img_size": 64, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    yield swin, "swin_tiny_patch4_window7_224", sizes


@pytest.mark.parametrize("number", range(3))
def test_small_networks_of_torchvisions_give_their_features(number, tmp_path):
    net, arch, arguments = list(small_torchvision_networks())[number]
    torch.save(filled(net).state_dict(), tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", arch, arch_args=arguments)
    assert loaded.match.coverage == 1
    side = loaded.backbone.arch_args.get("img_size", 64)
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        theirs, ours = net(pixels).flatten(1), loaded.backbone.net(pixels)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ---------------------------------------------------------------- by timm's own converters

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}


def as_clip(state):
    for name, tensor in state.items():
        for ours, theirs in (
            *((r"cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("patch_embed.proj", "conv1")),
            *(("norm_pre.", "ln_pre."), ("blocks.", "transformer.resblocks."), ("attn.qkv.", "attn.in_proj_")),
            *(("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
            *((".norm1.", ".ln_1."), (".norm2.", ".ln_2.")),
        ):
            name = name.replace(ours, theirs)
        name = f"ln_post{name[4:]}" if name.startswith("norm.") else name
        tensor = tensor[0, 0] if name == "class_embedding" else tensor[0] if name == "positional_embedding" else tensor
        yield f"visual.{name}", tensor
    yield "visual.proj", torch.zeros(48, 16)
    yield "token_embedding.weight", torch.zeros(5, 4)
    yield "transformer.resblocks.0.ln_1.weight", torch.ones(4)


def as_dinov3(state):
    for name, tensor in state.items():
        if name.endswith("q_bias"):
            value = state[name.replace("q_bias", "v_bias")]
            yield name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.full_like(tensor, torch.nan), value])
            yield name.replace("q_bias", "qkv.bias_mask"), torch.ones(3 * len(tensor))
        elif not name.endswith("v_bias"):
            for ours, theirs in (
                *(("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")),
                *(("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2")),
            ):
                name = name.replace(ours, theirs)
            yield name.replace("mlp.fc2", "mlp.w3") if any("fc1_g" in key for key in state) else name, tensor
    yield "mask_token", torch.zeros(1, 48)
    yield "rope_embed.periods", torch.ones(4)


def as_meta_convnext(state):
    for name, tensor in state.items():
        for ours, theirs in (
            *(("stem.", "downsample_layers.0."), (".blocks.", "."), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv")),
            *(("mlp.grn.weight", "grn.gamma"), ("mlp.grn.bias", "grn.beta"), ("head.norm.", "norm.")),
        ):
            name = name.replace(ours, theirs)
        if ".downsample." in name:
            stage, rest = name.removeprefix("stages.").split(".downsample.")
            name = f"downsample_layers.{stage}.{rest}"
        yield name, tensor.view(1, 1, 1, -1) if "grn" in name else tensor


def as_microsoft_swin(state):
    for name, tensor in state.items():
        if ".downsample." in name:
            layer, rest = name.removeprefix("layers.").split(".", 1)
            name = f"layers.{int(layer) - 1}.{rest}"
        yield f"encoder.{name}", tensor
    yield "encoder.mask_token", torch.zeros(1, 1, 12)  # of SimMIM
    yield "decoder.0.weight", torch.zeros(3, 12, 1, 1)


STAGES = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
SWIN = {"img_size": 64, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
OTHERS = [
    (as_clip, "clip", "vit_base_patch16_clip_224", SIZES),
    (as_dinov3, "dinov3", "vit_small_patch16_dinov3_qkvb", SIZES),
    (as_dinov3, "dinov3", "vit_small_plus_patch16_dinov3", SIZES),
    (as_meta_convnext, "meta convnext", "convnext_tiny", STAGES),
    (as_meta_convnext, "meta convnext", "convnextv2_tiny", STAGES),
    (as_microsoft_swin, "microsoft swin", "swin_tiny_patch4_window7_224", SWIN),
    (as_microsoft_swin, "microsoft swin", "swinv2_tiny_window8_256", SWIN),
]


@pytest.mark.parametrize(("named", "layout", "arch", "arguments"), OTHERS)
def test_original_names_reach_the_tensors_they_belong_to(named, layout, arch, arguments, tmp_path):
    state = filled(timm.create_model(arch, num_classes=0, **arguments)).state_dict()
    theirs = dict(named(state))
    assert layout_of(theirs) == layout
    torch.save({"model": {name: tensor.clone() for name, tensor in theirs.items()}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", arch, arch_args=arguments)
    told = loaded.backbone.net.state_dict()
    assert loaded.match.coverage == 1
    assert all(torch.equal(told[name], tensor) for name, tensor in state.items())
    if layout == "dinov3":
        assert loaded.backbone.arch_args["global_pool"] == "token"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "arch"),
    [
        (as_dinov3, "vit_small_patch16_dinov3_qkvb"),
        (as_dinov3, "vit_small_patch16_dinov3"),
        (as_dinov3, "vit_small_plus_patch16_dinov3_qkvb"),
        (as_meta_convnext, "convnext_tiny"),
        (as_meta_convnext, "convnextv2_tiny"),
        (as_meta_convnext, "convnextv2_atto"),
        (as_microsoft_swin, "swin_tiny_patch4_window7_224"),
    ],
)
def test_the_usual_networks_are_recognised_under_original_names(named, arch, tmp_path):
    state = filled(timm.create_model(arch, num_classes=0)).state_dict()
    torch.save({"model": {name: tensor.clone() for name, tensor in named(state)}}, tmp_path / "resnet50.pth")
    loaded = load_backbone(tmp_path / "resnet50.pth")
    assert (loaded.backbone.arch, loaded.match.coverage) == (arch, 1)
    assert all(torch.equal(loaded.backbone.net.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("named", "layout", "arch", "arguments"), [one for one in OTHERS if one[0] is not as_clip])
def test_the_tables_here_agree_with_timms_own_converters(named, layout, arch, arguments):
    net = filled(timm.create_model(arch, num_classes=0, **arguments))
    theirs = {name.removeprefix("encoder."): tensor.clone() for name, tensor in named(net.state_dict())}
    ours = with_timm_names(theirs)
    converted = __import__(type(net).__module__, fromlist=["x"]).checkpoint_filter_fn(dict(theirs), net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(ours[name].reshape(tensor.shape), converted[name].reshape(tensor.shape)), name


@pytest.mark.slow
def test_the_window_of_swin_v2_is_asked_for_unless_the_file_has_its_tables(tmp_path):
    net = timm.create_model("swinv2_tiny_window16_256", num_classes=0)
    state = dict(as_microsoft_swin(net.state_dict()))
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=r"swinv2_tiny_window8_256 and swinv2_tiny_window16_256.*--arch"):
        load_backbone(tmp_path / "c.pth")
    assert load_backbone(tmp_path / "c.pth", "swinv2_tiny_window16_256").match.coverage == 1
    for stage, layer in enumerate(net.layers):
        name = f"encoder.layers.{stage}.blocks.0.attn.relative_coords_table"
        state[name] = layer.blocks[0].attn.relative_coords_table
    torch.save(state, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert {block.window_size[0] for block in backbone.net.layers[0].blocks} == {16}


def test_a_deeper_network_does_not_pass_for_a_shallower_one(tmp_path):
    state = timm.create_model("convnext_tiny", num_classes=0, **{**STAGES, "depths": [1, 1, 3, 1]}).state_dict()
    torch.save(dict(as_meta_convnext(state)), tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=r"nearly a convnext_tiny, but that has no place for stages\.2\.blocks\.2"):
        load_backbone(tmp_path / "c.pth", "convnext_tiny", arch_args=STAGES)


@pytest.mark.slow
def test_every_network_of_torchvisions_is_named_as_timm_names_it():
    models = pytest.importorskip("torchvision.models")
    names = {f"efficientnet_b{size}": f"efficientnet_b{size}" for size in range(8)}
    names |= {f"efficientnet_v2_{size}": f"efficientnetv2_{size}" for size in "sml"}
    names |= {f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")}
    for size in ("tiny", "small", "base"):
        names |= {f"swin_{size[0]}": f"swin_{size}_patch4_window7_224"}
        names |= {f"swin_v2_{size[0]}": f"swinv2_{size}_window8_256"}
    names |= {"vit_b_32": "vit_base_patch32_224", "vit_l_16": "vit_large_patch16_224"}
    names |= {"vit_l_32": "vit_large_patch32_224", "vit_h_14": "vit_huge_patch14_224"}
    for name, arch in names.items():
        with torch.device("meta"):
            state = getattr(models, name)(weights=None).state_dict()
        found = recognise(replace(contents(with_timm_names(state)), layout=layout_of(state)))
        assert (found[0], found[2].coverage) == (arch, 1)


@pytest.mark.slow
def test_the_activation_of_clip_is_asked_for_unless_openai_wrote_the_file(tmp_path):
    state = dict(as_clip(timm.create_model("vit_base_patch32_clip_224", num_classes=0).state_dict()))
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=r"vit_base_patch32_clip_224 and vit_base_patch32_clip_quickgelu_224.*--arch"):
        load_backbone(tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", "vit_base_patch32_clip_224")
    assert loaded.backbone.input.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    torch.save({**state, "input_resolution": torch.tensor(224)}, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert (backbone.arch, backbone.arch_args) == ("vit_base_patch32_clip_224", {"act_layer": "quick_gelu"})
    torch.save(state, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth", arch_args={"act_layer": "gelu"}).backbone
    assert backbone.arch == "vit_base_patch32_clip_224"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_tensors_under_the_marks_of_a_layout_are_answered(layout):
    """Names promise nothing about shapes."""
    marks = ["features.1.0.layer_scale", "class_embedding", "storage_tokens", "features.1.0.attn.qkv.weight"]
    marks += ["encoder.layers.encoder_layer_0.ln_1.weight", "downsample_layers.0.0.weight", "positional_embedding"]
    marks += ["layers.0.downsample.reduction.weight", "features.1.0.block.0.0.weight", "input_resolution"]
    marks += ["features.1.0.attn.cpb_mlp.0.weight", "blocks.0.attn.qkv.bias", "stages.0.0.grn.gamma"]
    for shape in ((), (0,), (1,), (2, 3), (1, 2, 3, 4, 5)):
        odd = {name: torch.zeros(shape) for name in marks}
        assert len(with_timm_names({**odd, "features.1.0.attn.qkv.bias": torch.zeros(shape)})) >= len(marks) - 2
        LAYOUTS[layout].convert(dict(odd))


# ---------------------------------------------------------------- what pretraining code saves


def as_sparse_convnext(state):
    """FCMAE's sparse encoder: MinkowskiEngine keeps a kernel's places in one axis, columns first."""
    for name, tensor in as_meta_convnext(state):
        dense = name.startswith("downsample_layers.0.")
        if name.endswith("weight") and tensor.ndim == 4 and not dense:
            columns_first = tensor.permute(3, 2, 1, 0) if ".dwconv." not in name else tensor[:, 0].permute(2, 1, 0)
            yield f"encoder.{name.removesuffix('weight')}kernel", columns_first.flatten(0, 1).contiguous()
            continue
        if not dense and (".norm." in name or name.endswith((".0.weight", ".0.bias"))):
            name = f"{name.rpartition('.')[0]}.ln.{name.rpartition('.')[2]}"
        if ".pwconv" in name:
            name = f"{name.rpartition('.')[0]}.linear.{name.rpartition('.')[2]}"
        if name.endswith(("conv.bias", ".1.bias")) and not dense:
            tensor = tensor[None]
        yield f"encoder.{name}", tensor.view(1, -1) if ".grn." in name else tensor


def test_fcmaes_sparse_encoder_is_the_dense_one(tmp_path):
    net = filled(timm.create_model("convnextv2_tiny", num_classes=0, **STAGES))
    for tensor in net.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("head.norm.")}
    theirs = dict(as_sparse_convnext(state))
    assert theirs["encoder.stages.0.0.dwconv.kernel"].shape[0] == 49
    torch.save(
        {"model": {**theirs, "mask_token": torch.ones(1), "decoder.0.dwconv.bias": torch.ones(8)}}, tmp_path / "c"
    )
    loaded = load_backbone(tmp_path / "c", "convnextv2_tiny", arch_args=STAGES)
    told = loaded.backbone.net.state_dict()
    assert all(torch.equal(told[name], tensor) for name, tensor in state.items())
    assert loaded.match.missing == ["head.norm.weight", "head.norm.bias"]
    assert "2 tensors are not in the file, so they start random: head.norm.weight, head.norm.bias" in loaded.notes


SWIN_SIZES = [  # the windows and images of SimMIM, MoBY and EsViT
    ({"window_size": 6, "img_size": 192}, {"window_size": 6, "img_size": 192}),
    ({"window_size": 14, "img_size": 224}, {"window_size": 14}),
    ({}, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "told"), SWIN_SIZES)
def test_windows_of_swin_show_in_its_tables(arguments, told, tmp_path):
    state = filled(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **arguments)).state_dict()
    theirs = dict(as_microsoft_swin(state))
    theirs["encoder.mask_token"] = torch.zeros(1, 1, 96)
    copy = {name.replace("encoder.", "encoder_k."): tensor + 1 for name, tensor in theirs.items()}
    torch.save({"model": {**copy, **theirs, "decoder.0.weight": torch.ones(3, 3, 1, 1)}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert loaded.match.coverage == 1
    assert (loaded.backbone.arch, loaded.backbone.arch_args) == ("swin_tiny_patch4_window7_224", told)
    own = loaded.backbone.net.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("shared", [True, False])
def test_beit_and_simmim_may_share_their_table_of_positions(shared, tmp_path):
    arguments = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
    net = filled(timm.create_model("beit_base_patch16_224", num_classes=0, **arguments))
    state = {name: torch.randn(tensor.shape) for name, tensor in net.state_dict().items()}
    table = state["blocks.0.attn.relative_position_bias_table"]
    theirs = dict(state)
    for block in range(2):
        name = f"blocks.{block}.attn.relative_position_bias_table"
        state[name] = table
        theirs[name] = table
        if shared:
            del theirs[name]
    if shared:
        theirs["rel_pos_bias.relative_position_bias_table"] = table
        theirs["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    theirs["mask_token"] = torch.zeros(1, 1, 48)
    torch.save({"model": {f"encoder.{name}": tensor for name, tensor in theirs.items()}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", "beit_base_patch16_224", arch_args=arguments)
    assert loaded.match.coverage == 1
    assert all(torch.equal(loaded.backbone.net.state_dict()[name], tensor) for name, tensor in state.items())
