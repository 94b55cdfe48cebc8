"""A backbone is written as the family of transformers that computes the same, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers_networks import NETWORKS, some_of, write

from odcft.backbone.load import load_backbone
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import Adapter, Input
from odcft.backbone.timm_folder import write_timm
from odcft.backbone.transformers_configs import describe
from odcft.backbone.transformers_export import loading_code, write_transformers
from odcft.errors import OdcftError

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}


def random_backbone(arch, **arguments):
    """A backbone whose norms are not one and whose biases, tokens and scales are not zero."""
    torch.manual_seed(0)
    backbone = Backbone(arch, **arguments).eval()
    for name, tensor in backbone.net.state_dict().items():
        if tensor.is_floating_point() and (tensor.ndim < 2 or "token" in name or "pos_" in name):
            scales = "var" in name or ("norm" in name and name.endswith("weight"))
            tensor.uniform_(0.5 if scales else -0.5, 1.5 if scales else 0.5)
    return backbone


def difference(backbone, folder):
    """How far the features of transformers' AutoModel are from ours, relative to the largest, in double precision."""
    transformers = pytest.importorskip("transformers")
    description = describe(backbone)
    net = transformers.AutoModel.from_pretrained(folder, **description.arguments).eval().double()
    pixels = torch.randn(2, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        outputs = net(pixel_values=pixels)
        theirs = eval(description.features, {}, dict(outputs.items()))  # as the model card says
        ours = backbone.net.double()(pixels)
    backbone.net.float()
    assert ours.std() > 0.001
    return float((ours - theirs).abs().max() / ours.abs().max())


QUICK = {"mae", "msn", "data2vec", "dinov2_registers", "dinov3", "dinov3_convnext", "swin", "beit_absolute"}


@pytest.mark.parametrize("network", some_of(slow=NETWORKS.keys() - QUICK))
def test_a_folder_of_transformers_goes_back(network, tmp_path):
    """Also by way of a timm folder, as fine-tuning writes it."""
    write(tmp_path / "theirs", network)
    write_timm(load_backbone(tmp_path / "theirs").backbone, tmp_path / "timm")
    backbone = load_backbone(tmp_path / "timm").backbone
    write_transformers(backbone, tmp_path / "back")
    assert difference(backbone, tmp_path / "back") < 1e-7  # timm computes some positions in single precision
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert again["model_type"] == first["model_type"]
    # Where only the epsilon or a token differs, the tensors are the same, to the bit and to the name.
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    ours = {name.removeprefix("vision_model."): tensor for name, tensor in ours.items()}
    prefixes = ("", "vit.", "swin.", "regnet.", "data2vec_vision.", "vision_model.")
    prefix = next(prefix for prefix in prefixes if all(prefix + name in theirs for name in ours if "token" not in name))
    for name, tensor in ours.items():
        if "registers" not in network and "mask_token" not in name:
            assert torch.equal(tensor, theirs[prefix + name]), name


TIMM = {
    "vit": ("vit_small_patch16_224.dino", SMALL, "vit"),
    "vit without biases": ("vit_tiny_patch16_224", {**SMALL, "qkv_bias": False, "act_layer": "silu"}, "vit"),
    "deit": ("deit_tiny_patch16_224", SMALL, "vit"),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL, "deit"),
    "deit 3": ("deit3_small_patch16_224", SMALL, "dinov2"),
    "dinov2": ("vit_small_patch14_dinov2", {**SMALL, "patch_size": 14, "img_size": 56}, "dinov2"),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", SMALL, "dinov2_with_registers"),
    "dinov2 swiglu": ("vit_giant_patch14_dinov2", SMALL, "dinov2"),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {**SMALL, "global_pool": "token"}, "dinov3_vit"),
    "ijepa": ("vit_huge_patch14_gap_224", SMALL, "ijepa"),
    "beit": ("beit_base_patch16_224", SMALL, "beit"),
    "clip": ("vit_base_patch32_clip_quickgelu_224", SMALL, "clip_vision_model"),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, "siglip_vision_model"),
    "siglip mean": ("vit_base_patch16_siglip_gap_224", SMALL, "siglip_vision_model"),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 12}, "swin"),
    "swin v2, windows larger than images": (
        *("swinv2_tiny_window8_256", {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 12, "img_size": 32}),
        "swinv2",
    ),
    "convnext": ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, "convnext"),
    "convnext of convolutions": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, "convnext"),
    "convnext v2": ("convnextv2_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, "convnextv2"),
}
WHOLE = {
    name: (name, {}, model_type)
    for name, model_type in {
        "vit_small_patch16_224.dino": "vit",
        "vit_small_patch14_dinov2": "dinov2",
        "resnet18": "resnet",
        "resnet50": "resnet",
        "convnext_tiny": "convnext",
        "swin_tiny_patch4_window7_224": "swin",
        "regnetx_002": "regnet",
        "regnety_016": "regnet",
        "mobilevit_s": "mobilevit",
    }.items()
}


@pytest.mark.parametrize("network", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in WHOLE)])
def test_a_network_of_timms_is_the_family_that_computes_the_same(network, tmp_path):
    arch, arguments, model_type = {**TIMM, **WHOLE}[network]
    backbone = random_backbone(arch, **arguments)
    write_transformers(backbone, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    again = load_backbone(tmp_path / "out").backbone.net.state_dict()
    for name, tensor in backbone.net.state_dict().items():
        if name == "pos_embed" and again[name].shape != tensor.shape:  # the class token got one of zeros
            assert not again[name][:, 0].any()
            tensor = torch.cat([again[name][:, :1], tensor], dim=1)
        assert torch.equal(again[name].reshape(tensor.shape), tensor), name
    assert difference(backbone, tmp_path / "out") < 1e-7


@pytest.mark.parametrize(
    ("arch", "arguments", "why"),
    [
        ("efficientnet_b0", {}, "a network of the class EfficientNet"),
        ("resnext50_32x4d", {}, r"its layer1\.0\.conv1\.weight differs from that of resnet"),
        ("resnet26d", {}, "its layers are of another kind"),
        ("test_resnet", {}, "a ResNet of the depths 1, 1, 1, 1"),
        ("resnet18", {"last_stride": 1}, r"its layer4\.0\.conv1's stride differs"),
        ("resnet18", {"small_stem": True}, r"its conv1\.weight differs"),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}, r"vit has no fc_norm\.weight"),
        ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, r"vit has no blocks\.0\.attn\.q_norm\.weight"),
        ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2}, "vit has no reg_token"),
        ("vit_tiny_patch16_224", {**SMALL, "pre_norm": True}, "layer_norm_eps=1e-06, but timm's"),
        ("vit_small_patch14_dinov2", {**SMALL, "mlp_ratio": 2.5}, "its MLP has 120 units"),
        ("vit_small_patch16_dinov3", SMALL, "averages its patches.*--arch-args global_pool=token"),
        ("eva02_tiny_patch14_224", {}, "position embedding is not that of DINOv3"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64}, "the size of their windows: 7, 4, 2"),
        ("swin_s3_tiny_224", {}, "the size of their windows: 7, 14"),
        ("convnext_atto_ols", {}, "differs|has no"),
        ("convnext_tiny", {"depths": [1] * 4, "dims": [8] * 4, "act_layer": "hard_swish"}, ""),
        ("regnetz_b16", {}, "another kind|of the class"),
        ("alexnet", {}, "of the class NamedLayers"),
    ],
)
def test_other_networks_are_refused(arch, arguments, why, tmp_path):
    backbone = Backbone(arch, random=False, **arguments)
    if not why:  # it has a twin after all
        return write_transformers(random_backbone(arch, **arguments), tmp_path / "out")
    with pytest.raises(OdcftError, match=rf"(?s){arch} does \(.*{why}.*It writes ViT .* Use --format timm"):
        write_transformers(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_family_it_came_from_is_preferred_only_if_it_fits(tmp_path):
    backbone = random_backbone("vit_tiny_patch16_224", **SMALL)
    for model_type, written in (("vit_msn", "vit_msn"), ("swin", "vit"), ("nonsense", "vit"), ("", "vit")):
        backbone.model_type = model_type
        assert describe(backbone).model_type == written
    backbone.model_type = "vit_mae"
    assert describe(backbone).config["mask_ratio"] == 0  # AutoModel would leave out patches otherwise


@pytest.mark.parametrize(
    "input",
    [
        Input("rgb", 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_fraction=0.9, interpolation="bicubic"),
        Input("rgb", 32, (10, 20, 30), (40, 50, 60), range=255, crop_fraction=1, interpolation="lanczos"),
    ],
)
def test_the_preprocessor_prepares_images_as_ours(input, tmp_path):
    backbone = random_backbone("vit_tiny_patch16_224", **SMALL)
    backbone.adapter = Adapter(input)
    write_transformers(backbone, tmp_path / "out")
    again = load_backbone(tmp_path / "out").backbone
    assert again.input.view == input.view
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.allclose(again.adapter(pixels), backbone.adapter(pixels), atol=1e-5)
    config = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert config["crop_size"] == {"height": 32, "width": 32}
    assert config["size"] == {"shortest_edge": 32 if input.crop_fraction == 1 else 35}


def test_colours_that_transformers_does_not_make_are_refused(tmp_path):
    backbone = random_backbone("vit_tiny_patch16_224", **SMALL)
    backbone.adapter = Adapter(Input("bgr", 32, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(OdcftError, match=r"takes bgr, but transformers' image processors give RGB.*--format timm"):
        write_transformers(backbone, tmp_path / "out")


def test_mobilevit_takes_bgr_in_transformers_too(tmp_path):
    backbone = random_backbone("mobilevit_xxs")
    backbone.adapter = Adapter(Input("bgr", 64, (0, 0, 0), (1, 1, 1), crop_fraction=0.9))
    write_transformers(backbone, tmp_path / "out")
    assert load_backbone(tmp_path / "out").backbone.input == backbone.input


def test_a_resized_network_keeps_its_new_size(tmp_path):
    backbone = random_backbone("vit_small_patch14_dinov2", **{**SMALL, "patch_size": 14, "img_size": 70})
    backbone.resize(42)
    write_transformers(backbone, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == 42
    assert load_backbone(tmp_path / "out").backbone.size == 42
    assert difference(backbone, tmp_path / "out") < 1e-7


def test_the_card_says_which_output_the_features_are(tmp_path):
    backbone = random_backbone("vit_tiny_patch16_224", **SMALL)
    write_transformers(backbone, tmp_path / "out", {"checkpoint": "mine.pth"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card
    assert "net(pixel_values).last_hidden_state[:, 0]" in card
    assert "mine.pth" in card
    code = loading_code(random_backbone("beit_base_patch16_224", **SMALL), 'a "quoted" place')
    assert r'from_pretrained("a \"quoted\" place")' in code
    assert code.endswith("features: net(pixel_values).pooler_output")


def test_all_families_that_are_read_are_written():
    from odcft.backbone.transformers_configs import CLASSES
    from odcft.backbone.transformers_twins import FAMILIES

    assert set(FAMILIES) - set(CLASSES) == {"clip", "siglip"}  # only their images' half
    assert set(CLASSES) <= set(FAMILIES)
    written = {json_type for _, _, json_type in (*TIMM.values(), *WHOLE.values())}
    came_from = {"vit_mae", "vit_msn", "dinov3_convnext", "data2vec-vision"}  # of NETWORKS
    assert written | came_from == set(CLASSES)
    assert NETWORKS.keys() >= {"mae", "msn", "dinov3_convnext", "data2vec"}
