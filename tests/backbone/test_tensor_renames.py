"""Tensors under other people's names, or in other pieces, reach the network they belong to."""

import pytest
import timm
import torch
from backbone_helpers import equal
from safetensors.torch import save_file

from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


def as_huggingface(state):
    """A timm transformer's tensors under the names of Hugging Face's transformers."""
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            layer, leaf = name.replace("blocks.", "encoder.layer.").split(".attn.qkv.")
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"vit.{layer}.attention.attention.{part}.{leaf}", piece.clone()
            continue
        for ours, theirs in (
            ("blocks.", "encoder.layer."),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ):
            name = name.replace(ours, theirs)
        yield f"vit.{'layernorm' + name[4:] if name.startswith('norm.') else name}", tensor


def as_mmpretrain(state):
    for name, tensor in state.items():
        for ours, theirs in (
            ("blocks.", "layers."),
            (".norm1.", ".ln1."),
            (".norm2.", ".ln2."),
            ("mlp.fc1", "ffn.layers.0.0"),
            ("mlp.fc2", "ffn.layers.1"),
            ("patch_embed.proj.", "patch_embed.projection."),
        ):
            name = name.replace(ours, theirs)
        yield f"backbone.{'ln1' + name[4:] if name.startswith('norm.') else name}", tensor


@pytest.mark.parametrize("named", [as_huggingface, as_mmpretrain])
def test_transformers_under_other_names(named, tmp_path):
    torch.manual_seed(2)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    torch.save({"state_dict": dict(named(state)), "meta": {"epoch": 3}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert loaded.backbone.arch == "vit_tiny_patch16_224"
    assert equal(loaded.backbone, state)


def test_a_folder_of_transformers_gives_its_mean(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(dict(as_huggingface(state)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    backbone = load_backbone(tmp_path).backbone
    assert equal(backbone, state)
    assert backbone.input.mean == (0.1, 0.2, 0.3)


def test_pieces_of_a_transformer_that_do_not_fit_together_are_refused(tmp_path):
    """Shapes are checked before tensors are put together."""
    pieces = {f"encoder.layer.0.attention.attention.{part}.weight": torch.zeros(2, 2) for part in ("query", "key")}
    pieces["encoder.layer.0.attention.attention.value.weight"] = torch.zeros(3)
    registers = {"register_tokens": torch.zeros(1), "pos_embed": torch.zeros(4), "cls_token": torch.zeros(2, 1, 9)}
    for tree in (pieces, registers, {**registers, "pos_embed": torch.zeros(1, 0, 3), "arch": "vit_tiny_patch16_224"}):
        torch.save(tree, tmp_path / "c.pth")
        with pytest.raises(OdcftError, match=r"fits no backbone|has only"):
            load_backbone(tmp_path / "c.pth")


def test_registers_as_dinov2_writes_them(tmp_path):
    net = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28)
    state = dict(net.state_dict())
    embedding = torch.randn(1, 5, 384)
    theirs = {**state, "pos_embed": embedding, "register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1)}
    torch.save(theirs, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert (backbone.arch, backbone.size) == ("vit_small_patch14_reg4_dinov2", 28)
    told = backbone.net.state_dict()
    assert torch.equal(told["pos_embed"], embedding[:, 1:])
    assert torch.equal(told["cls_token"], state["cls_token"] + embedding[:, :1])
    assert torch.equal(told["reg_token"], theirs["register_tokens"])
