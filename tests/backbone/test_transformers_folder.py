"""A folder of Hugging Face's transformers becomes a network of timm's that gives the same features, or is refused."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_networks import INNER, NETWORKS, SIZES, some_of, write

from odcft.backbone.load import load_backbone
from odcft.backbone.timm_folder import write_timm
from odcft.backbone.transformers_folder import find_twin
from odcft.backbone.transformers_twins import FAMILIES
from odcft.errors import OdcftError


@pytest.mark.parametrize("network", some_of())
def test_features_are_those_of_transformers(network, tmp_path):
    net, features = write(tmp_path, network), NETWORKS[network][3]
    loaded = load_backbone(tmp_path)
    backbone = loaded.backbone
    assert loaded.match.coverage == 1
    side = backbone.size if backbone.fixed_size else 64
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, side, side)
    inner = next((getattr(net, name) for name in INNER if hasattr(net, name)), net)
    with torch.no_grad():
        theirs, ours = features(inner(pixel_values=pixels)), backbone.net(pixels)
    # Where epsilons differ (1e-12 and 1e-6), a note says so.
    exact = not any("layer_norm_eps" in note for note in loaded.notes)
    assert (ours - theirs).abs().max() <= (1e-6 if exact else 2e-5) * theirs.abs().max()
    assert ours.std() > 0.01
    if network != "resnet":
        assert loaded.family == "transformers"


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


@pytest.mark.parametrize(
    ("config", "arch", "arguments"),
    [
        ({"model_type": "vit", **BASE, "patch_size": 32}, "vit_base_patch32_224", {}),
        ({"model_type": "vit", **BASE, "image_size": 384}, "vit_base_patch16_224", {"img_size": 384}),
        ({"model_type": "dinov2", **SMALL, "image_size": 518, "patch_size": 14}, "vit_small_patch14_dinov2", {}),
        (
            {"model_type": "dinov3_vit", **BASE, "image_size": 224, "num_register_tokens": 4},
            "vit_base_patch16_dinov3_qkvb",
            {"img_size": 224, "global_pool": "token"},
        ),
        ({"model_type": "clip", "vision_config": {"dropout": 0.0}}, "vit_base_patch32_clip_quickgelu_224", {}),
        (
            {
                "model_type": "siglip",
                "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14},
            },
            "vit_base_patch16_siglip_224",
            {
                **{"img_size": 224, "patch_size": 14, "embed_dim": 1152, "depth": 12, "num_heads": 12},
                **{"mlp_ratio": 4304 / 1152, "act_layer": "gelu_tanh"},
            },
        ),
        (
            {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
            "swin_tiny_patch4_window7_224",
            {"img_size": 224},
        ),
        (
            {"model_type": "convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 27, 3]},
            "convnext_small",
            {},
        ),
    ],
)
def test_the_usual_sizes_have_the_names_that_timm_gives_them(config, arch, arguments):
    twin = find_twin(Path("folder"), config, {})
    assert (twin.arch, twin.arguments) == (arch, arguments)


@pytest.mark.parametrize(
    ("network", "change", "told"),
    [
        ("vit", {"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001, but timm's .* has 1e-05"),
        ("vit", {"hidden_act": "sigmoid"}, "hidden_act='sigmoid', but odcft knows no such activation"),
        ("vit", {"hidden_size": 64}, "num_attention_heads=3, but hidden_size=64 is not a multiple of it"),
        ("vit", {"hidden_size": 60}, "describes a .* whose .* has the shape"),
        ("vit", {"hidden_size": "48"}, "hidden_size='48' should be a valid integer"),
        ("vit", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 should be less than or equal to 128"),
        ("vit", {"num_hidden_layers": 1}, "no place for the tensor blocks.1"),
        ("vit", {"image_size": [32, 64]}, "square images"),
        ("swin", {"hidden_act": "relu"}, "hidden_act='relu', but timm's .* always has gelu"),
        ("swin", {"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12, but timm's .* has 1e-05"),
        ("swin", {"use_absolute_embeddings": True}, "no absolute position embedding"),
        ("swin", {"num_heads": [2]}, "another length"),
        ("dinov3", {"rope_theta": 50.0}, "rope_theta=50.0, but timm's DINOv3 has 100"),
        ("dinov3", {"rope_parameters": {"rope_theta": 50.0}}, "rope_theta=50.0"),
        ("dinov3", {"query_bias": False}, "query_bias=False"),
        ("beit", {"use_shared_relative_position_bias": True}, "shared or not, not both"),
        ("convnext", {"depths": [1, 1]}, "another length"),
        ("mobilevit", {"hidden_sizes": [1, 2, 3]}, "timm's MobileViTs have others"),
        ("mobilevit", {"output_stride": 16}, "output_stride=16, but timm's mobilevit_xxs has 32"),
        ("regnet_y", {"downsample_in_first_stage": False}, "downsample_in_first_stage"),
        pytest.param("regnet_y", {"depths": [1, 1, 4, 6]}, "timm has no RegNet of the", marks=pytest.mark.slow),
        ("resnet", {"downsample_in_bottleneck": True}, "timm's ResNets downsample in their 3 x 3 convolution"),
    ],
)
def test_what_timms_network_cannot_do_is_refused(network, change, told, tmp_path):
    write(tmp_path, network)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(OdcftError, match=told):
        load_backbone(tmp_path)


def test_a_bias_of_the_keys_is_refused_unless_it_is_zero(tmp_path):
    write(tmp_path, "dinov3")
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for number, layer in ((0.0, 0), (0.0, 1), (0.1, 1)):
        tensors[f"layer.{layer}.attention.k_proj.bias"] = torch.full((48,), number)
    with pytest.raises(OdcftError, match=r"no place for the tensor blocks\.1\.attn\.k\.bias"):
        find_twin(tmp_path, config, tensors)
    tensors["layer.1.attention.k_proj.bias"].zero_()
    assert find_twin(tmp_path, config, tensors) is not None


def test_a_whole_clip_gives_its_images_half(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    net = transformers.CLIPModel(transformers.CLIPConfig(vision_config=SIZES, text_config={**text, "vocab_size": 50}))
    net.save_pretrained(tmp_path)
    loaded, pixels = load_backbone(tmp_path), torch.randn(2, 3, 32, 32)
    assert loaded.match.coverage == 1
    with torch.no_grad():
        theirs = net.eval().vision_model(pixel_values=pixels).pooler_output
        assert torch.allclose(loaded.backbone.net(pixels), theirs, atol=1e-5)


def test_the_preprocessor_says_what_the_network_sees(tmp_path):
    write(tmp_path, "mobilevit")
    told = {"do_flip_channel_order": True, "do_normalize": False, "size": {"shortest_edge": 288}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**told, "crop_size": {"height": 256, "width": 256}}))
    input = load_backbone(tmp_path).backbone.input
    assert (input.color, input.size, input.interpolation) == ("bgr", 256, "bicubic")
    assert (input.mean, input.std, input.crop_fraction) == ((0, 0, 0), (1, 1, 1), 256 / 288)


def test_without_a_preprocessor_a_note_says_whose_mean_it_is(tmp_path):
    write(tmp_path, "vit")
    loaded = load_backbone(tmp_path)
    assert any("without a preprocessor_config.json" in note and "data.mean" in note for note in loaded.notes)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "size": 99}'
    )
    loaded = load_backbone(tmp_path)
    assert not any("preprocessor" in note for note in loaded.notes)
    assert (loaded.backbone.input.mean, loaded.backbone.size) == ((0.1, 0.2, 0.3), 32)  # a network of one size only


def test_a_family_without_a_table_is_known_by_its_tensors_and_a_note_says_so(tmp_path):
    import timm

    net = timm.create_model("test_resnet", num_classes=0)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bit", "hidden_act": "relu"}))
    loaded = load_backbone(tmp_path)
    assert loaded.family == "transformers"
    assert loaded.backbone.arch == "test_resnet"
    assert any(
        note.startswith("config.json says model_type='bit', which odcft has no table for") for note in loaded.notes
    )


@pytest.mark.parametrize("network", ["dinov3", "beit_shared", "swinv2", "convnext", "siglip"])
def test_an_exported_twin_loads_in_timm(network, tmp_path):
    write(tmp_path / "theirs", network)
    write_timm(load_backbone(tmp_path / "theirs").backbone, tmp_path / "ours")  # which compares features


def test_missing_tensors_start_random_only_if_allowed(tmp_path):
    write(tmp_path, "swin")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "blocks.1." in name]:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(OdcftError, match=r"has only .* tensors of swin.*--allow-partial"):
        load_backbone(tmp_path)
    assert load_backbone(tmp_path, allow_partial=True).match.missing


ODD = [None, True, 0, -1, 3, 64, 16384, 10**30, 0.5, float("nan"), "", "gelu", [], [1], [128] * 8, [2, 2, 2], {}]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["clip_gelu", "dinov3", "swinv2", "beit"])
def test_any_value_in_a_config_is_answered(network, tmp_path):
    write(tmp_path, network)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    for field in [*FAMILIES[config["model_type"]][0].model_fields, "model_type", "vision_config"]:
        for value in ODD:
            with suppress(OdcftError):
                find_twin(tmp_path, {**config, field: value}, tensors)
