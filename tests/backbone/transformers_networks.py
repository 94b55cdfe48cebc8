"""Small networks of Hugging Face's transformers with random weights, one or more of each family."""

import pytest
import torch

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
REGNET = {"embedding_size": 32, "hidden_sizes": [24, 56, 152, 368], "depths": [1, 1, 4, 7], "groups_width": 8}
MOBILEVIT = {"neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "hidden_sizes": [64, 80, 96], "expand_ratio": 2.0}
DINOV2 = {name: value for name, value in SIZES.items() if name != "intermediate_size"}


def pooled(output):
    return output.pooler_output.flatten(1)


def first_token(output):
    return output.last_hidden_state[:, 0]


def mean_token(output):
    return output.last_hidden_state.mean(1)


def two_tokens(output):  # timm's distilled networks give the mean of both classifiers' tokens
    return output.last_hidden_state[:, :2].mean(1)


# Configuration, model, their sizes, and which of transformers' outputs timm's pooled features are.
NETWORKS = {
    "vit": ("ViTConfig", "ViTModel", SIZES, first_token),
    "vit_of_another_epsilon": (
        *("ViTConfig", "ViTModel"),
        {**SIZES, "layer_norm_eps": 1e-5, "qkv_bias": False, "hidden_act": "relu"},
        first_token,
    ),
    "vit_classifier": ("ViTConfig", "ViTForImageClassification", SIZES, first_token),
    "deit": ("DeiTConfig", "DeiTModel", SIZES, two_tokens),
    "mae": ("ViTMAEConfig", "ViTMAEModel", {**SIZES, "mask_ratio": 0.0}, first_token),
    "mae_with_decoder": ("ViTMAEConfig", "ViTMAEForPreTraining", {**SIZES, "mask_ratio": 0.0}, first_token),
    "msn": ("ViTMSNConfig", "ViTMSNModel", SIZES, first_token),
    "ijepa": ("IJepaConfig", "IJepaModel", SIZES, mean_token),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**DINOV2, "mlp_ratio": 2}, pooled),
    "dinov2_swiglu": ("Dinov2Config", "Dinov2Model", {**DINOV2, "use_swiglu_ffn": True}, pooled),
    "dinov2_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", DINOV2, pooled),
    "dinov2_registers_swiglu": (
        *("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
        {**DINOV2, "use_swiglu_ffn": True, "num_register_tokens": 3},
        pooled,
    ),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {**SIZES, "num_register_tokens": 4}, pooled),
    "dinov3_gated": (
        *("DINOv3ViTConfig", "DINOv3ViTModel"),
        {**SIZES, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
        pooled,
    ),
    "dinov3_convnext": ("DINOv3ConvNextConfig", "DINOv3ConvNextModel", STAGES, pooled),
    "convnext": ("ConvNextConfig", "ConvNextModel", STAGES, pooled),
    "convnext_tanh": ("ConvNextConfig", "ConvNextModel", {**STAGES, "hidden_act": "gelu_pytorch_tanh"}, pooled),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2Model", STAGES, pooled),
    "swin": ("SwinConfig", "SwinModel", SWIN, pooled),
    "swin_classifier": ("SwinConfig", "SwinForImageClassification", SWIN, pooled),
    "swinv2": ("Swinv2Config", "Swinv2Model", {**SWIN, "pretrained_window_sizes": [2, 2]}, pooled),
    "beit": ("BeitConfig", "BeitModel", {**SIZES, "use_relative_position_bias": True}, pooled),
    "beit_shared": ("BeitConfig", "BeitModel", {**SIZES, "use_shared_relative_position_bias": True}, pooled),
    "beit_without_scale": (
        *("BeitConfig", "BeitModel"),
        {**SIZES, "use_relative_position_bias": True, "layer_scale_init_value": 0.0},
        pooled,
    ),
    "beit_absolute": (
        *("BeitConfig", "BeitModel"),
        {**SIZES, "use_absolute_position_embeddings": True, "use_mean_pooling": False},
        first_token,
    ),
    "data2vec": (
        *("Data2VecVisionConfig", "Data2VecVisionForImageClassification"),
        {**SIZES, "use_relative_position_bias": True},
        pooled,
    ),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", SIZES, pooled),
    "clip_gelu": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**SIZES, "hidden_act": "gelu"}, pooled),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", SIZES, pooled),
    "siglip_mean": ("SiglipVisionConfig", "SiglipVisionModel", {**SIZES, "vision_use_head": False}, mean_token),
    "regnet_y": ("RegNetConfig", "RegNetModel", {**REGNET, "layer_type": "y"}, pooled),
    "regnet_x": ("RegNetConfig", "RegNetForImageClassification", {**REGNET, "layer_type": "x"}, pooled),
    "mobilevit": ("MobileViTConfig", "MobileViTModel", MOBILEVIT, pooled),
    "resnet": (
        *("ResNetConfig", "ResNetModel"),
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
        pooled,
    ),
}
INNER = ("vit", "swin", "regnet", "data2vec_vision", "vision_model")  # attributes that hold a model's backbone


def make(config, model, sizes):
    """A network of transformers with random weights: no norm at one, no bias and no token at zero."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and (tensor.ndim < 2 or "token" in name or "position" in name or "grn" in name):
            low = 0.5 if "running_var" in name or ("norm" in name and name.endswith("weight")) else -0.5
            tensor.uniform_(low, low + 1)
    return net


def write(folder, network):
    net = make(*NETWORKS[network][:3])
    net.save_pretrained(folder)
    return net


# Variants of a family that a quick one stands for.
VARIANTS = {
    "mae_with_decoder",
    "regnet_x",
    "vit_classifier",
    "dinov2_registers_swiglu",
    "convnext_tanh",
    "swin_classifier",
}


def some_of(slow=frozenset(VARIANTS)):
    """The networks as parameters of a test; these are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in NETWORKS]
