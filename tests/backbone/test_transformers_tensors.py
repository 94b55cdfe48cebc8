"""Each family's table of names gives timm's names and goes back, tensor by tensor and bit for bit."""

import pytest
import torch

from odcft.backbone.non_timm_networks import build
from odcft.backbone.transformers_tensors import TABLES, add_class_position, renamed, to_timm, to_transformers

SMALL = {"depth": 12, "embed_dim": 24, "num_heads": 3}
STAGES = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
# By table: timm's network, its arguments, and whether it holds the biases of query and value apart.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", SMALL, False),
    "dinov2": ("vit_small_patch14_dinov2", SMALL, False),
    "dinov2 swiglu": ("vit_giant_patch14_dinov2", SMALL, False),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", SMALL, True),
    "dinov3 gated": ("vit_small_plus_patch16_dinov3_qkvb", SMALL, True),
    "beit": ("beit_base_patch16_224", {**SMALL, "use_abs_pos_emb": True}, True),
    "clip": ("vit_base_patch16_siglip_224", SMALL, False),
    "swin": ("swinv2_tiny_window8_256", {"embed_dim": 12, "depths": [2, 2, 2, 2]}, True),
    "convnext": ("convnextv2_tiny", STAGES, False),
    "dinov3 convnext": ("convnext_tiny", STAGES, False),
    "regnet x": ("regnetx_002", {}, False),
    "regnet y": ("regnety_002", {}, False),
    "mobilevit": ("mobilevit_xxs", {}, False),
    "resnet": ("resnet18", {}, False),
}


@pytest.mark.parametrize("table", TABLES)
def test_names_and_tensors_come_back(table):
    arch, arguments, separate_biases = FAMILIES[table]
    torch.manual_seed(0)
    ours = {name: torch.randn(tensor.shape) for name, tensor in build(arch, **arguments).state_dict().items()}
    theirs = to_transformers(ours, table)
    again = to_timm(theirs, table, separate_biases)
    assert set(again) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(again[name].reshape(tensor.shape), tensor), name
    storages = {tensor.untyped_storage().data_ptr() for tensor in theirs.values()}
    assert len(storages) == len(theirs)  # safetensors refuses tensors that share memory


def test_the_class_token_gets_its_position_embedding_back():
    ours = {"cls_token": torch.randn(1, 1, 8), "pos_embed": torch.randn(1, 4, 8), "reg_token": torch.randn(1, 2, 8)}
    theirs = to_transformers(ours, "dinov2", class_position=True)
    assert theirs["embeddings.position_embeddings"].shape == (1, 5, 8)
    again = add_class_position(to_timm(theirs, "dinov2"))
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("table", "theirs", "ours"),
    [
        ("vit", "encoder.layer.11.layernorm_before.weight", "blocks.11.norm1.weight"),
        ("vit", "pooler.dense.weight", "pooler.dense.weight"),
        ("swin", "encoder.layers.2.downsample.norm.bias", "layers.3.downsample.norm.bias"),
        ("resnet", "encoder.stages.0.layers.10.layer.2.convolution.weight", "layer1.10.conv3.weight"),
        ("regnet y", "encoder.stages.0.layers.10.layer.3.normalization.bias", "s1.b11.conv3.bn.bias"),
        ("regnet y", "encoder.stages.0.layers.10.layer.2.attention.2.bias", "s1.b11.se.fc2.bias"),
        ("dinov3", "model.layer.3.layer_scale1.lambda1", "blocks.3.gamma_1"),  # of a model in memory
    ],
)
def test_names(table, theirs, ours):
    assert renamed(theirs, table) == ours
