"""Tensors under other people's names, or in other pieces, reach the network they belong to."""

import pytest
import timm
import torch
from backbone_helpers import equal
from safetensors.torch import save_file

from odcft.backbone.load import load_backbone
from odcft.backbone.non_timm_networks import build
from odcft.backbone.transformers_tensors import to_transformers
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


BEIT = {"depth": 12, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
        {"global_pool": "token"},
        {"init_values": 0.0},
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.data2vec_vision."])
def test_a_lone_beit_of_transformers_keeps_all_its_tensors(arguments, prefix, tmp_path):
    """Its queries and values have biases, its keys have none."""
    torch.manual_seed(0)
    state = build("beit_base_patch16_224", **{**BEIT, **arguments}).state_dict()
    state = {name: torch.randn(tensor.shape) for name, tensor in state.items()}
    theirs = {prefix + name: tensor for name, tensor in to_transformers(state, "beit").items()}
    torch.save({**theirs, "classifier.weight": torch.zeros(3, 24)}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", arch="beit_base_patch16_224", arch_args=BEIT)
    assert loaded.match.coverage == 1
    assert set(loaded.backbone.net.state_dict()) == set(state)
    assert equal(loaded.backbone, state)


def test_queries_and_values_keep_their_biases_in_any_transformer(tmp_path):
    """Zeros for the biases of the keys change nothing."""
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    state = {name: torch.randn(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        if name.endswith("qkv.bias"):
            tensor[192:384] = 0
    theirs = {name: tensor for name, tensor in as_huggingface(state) if not name.endswith(".key.bias")}
    torch.save(theirs, tmp_path / "c.pth")
    assert equal(load_backbone(tmp_path / "c.pth").backbone, state)
