import argparse
import collections
import datetime
import pickle  # noqa: TID251 - to write what others wrote
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from odcft.backbone.checkpoint_files import read
from odcft.backbone.inspection import describe
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


def equal(backbone, path_or_state):
    return all(torch.equal(tensor, path_or_state[name]) for name, tensor in backbone.net.state_dict().items())


@pytest.fixture
def state():
    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=7).state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder_q.", "model.net."])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_any_usual_wrapping_loads_every_tensor(tmp_path, state, prefix, wrap):
    path = tmp_path / "c.pth.tar"
    inner = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrap: inner, "epoch": 4} if wrap else inner, path)
    loaded = load_backbone(path)
    assert loaded.backbone.arch == "test_resnet"
    assert len(loaded.match.tensors) == loaded.match.expected
    assert equal(loaded.backbone, state)
    assert {name.removeprefix(prefix) for name in loaded.match.dropped} == {"fc.weight", "fc.bias"}


def test_query_encoder_is_kept_and_key_encoder_left_out(tmp_path, state):
    other = {name: tensor + 1 for name, tensor in state.items()}
    both = {f"module.encoder_k.{n}": t for n, t in other.items()} | {
        f"module.encoder_q.{n}": t for n, t in state.items()
    }
    torch.save({"state_dict": both}, tmp_path / "moco.pth.tar")
    loaded = load_backbone(tmp_path / "moco.pth.tar")
    assert loaded.match.where == "state_dict/module.encoder_q."
    assert equal(loaded.backbone, state)
    assert describe(loaded)[0]["family"] == "moco"


def test_argparse_namespace_beside_the_weights_does_no_harm(tmp_path, state):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1), "arch": "test_resnet"}, tmp_path / "c.pth")
    assert equal(load_backbone(tmp_path / "c.pth").backbone, state)


def test_safetensors_and_timm_folder(tmp_path, state):
    save_file(state, tmp_path / "c.safetensors")
    assert equal(load_backbone(tmp_path / "c.safetensors").backbone, state)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "test_resnet", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}')
    backbone = load_backbone(folder).backbone
    assert equal(backbone, state)
    assert backbone.input.mean == (0.1, 0.2, 0.3)


def test_normalisation_is_part_of_the_backbone():
    backbone = load_backbone("scratch:test_resnet").backbone
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    with torch.no_grad():
        assert torch.allclose(backbone(images), backbone.net((images - mean) / std))


@pytest.mark.parametrize(
    "arch", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "test_mambaout"]
)
def test_features_are_as_wide_as_said(arch):
    backbone = load_backbone(f"scratch:{arch}").backbone
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, backbone.size, backbone.size)).shape == (2, backbone.width)


def test_too_little_of_a_backbone_is_refused_unless_it_is_allowed(tmp_path, state):
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


def test_what_is_left_of_a_replaced_class_is_said_where_it_can_matter(tmp_path, state):
    """Settings, numbers and optimizers beside the weights are in nearly every file, and say nothing of a network."""
    plain = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "when": datetime.datetime(2020, 1, 1)}
    torch.save({"state_dict": state, **plain, "path": Path("x"), "hist": collections.Counter("a")}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert not loaded.notes
    torch.save({"state_dict": state, "args": argparse.Namespace(), "net": torch.nn.Linear(1, 1)}, tmp_path / "c.pth")
    (note,) = load_backbone(tmp_path / "c.pth").notes
    assert "classes were not loaded" in note
    assert "Linear" in note
    assert "Namespace" not in note


def test_what_stands_beside_the_backbone_has_a_name(tmp_path, state):
    whole = {f"encoder_q.{name}": tensor for name, tensor in state.items()}
    torch.save({"teacher": whole, "extra": torch.zeros(2)}, tmp_path / "c.pth")
    _, lines = describe(load_backbone(tmp_path / "c.pth"))
    (beside,) = (line for line in lines if "beside it" in line)
    assert beside.split("beside it")[1].strip() == "the file itself"


def test_whose_a_plain_vision_transformer_is_is_not_guessed(tmp_path):
    """DINO's and MAE's released backbones have the tensors that anybody's headless ViT has."""
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


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(3, 3, dtype=torch.complex64),
        torch.zeros(3, 3).to_sparse(),
        torch.empty(3, 3, device="meta"),
        torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.quint8),
    ],
    ids=["complex", "sparse", "meta", "quantized"],
)
def test_tensors_that_no_network_holds_are_left_out_and_counted(tmp_path, state, odd):
    torch.save({**state, "extra.weight": odd}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert equal(loaded.backbone, state)
    assert loaded.notes == ["sparse, quantized and complex tensors were left out: extra.weight"]


def test_a_state_dict_of_transformers_with_odd_pieces_is_answered(tmp_path):
    """What is put together from pieces first looks whether they fit."""
    pieces = {f"encoder.layer.0.attention.attention.{part}.weight": torch.zeros(2, 2) for part in ("query", "key")}
    pieces["encoder.layer.0.attention.attention.value.weight"] = torch.zeros(3)
    registers = {"register_tokens": torch.zeros(1), "pos_embed": torch.zeros(4), "cls_token": torch.zeros(2, 1, 9)}
    for tree in (pieces, registers, {**registers, "pos_embed": torch.zeros(1, 0, 3), "arch": "vit_tiny_patch16_224"}):
        torch.save(tree, tmp_path / "c.pth")
        with pytest.raises(OdcftError, match=r"fits no backbone|has only"):
            load_backbone(tmp_path / "c.pth")


def test_a_position_embedding_of_nothing_is_answered(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    for length in (0, 1, 2, 70_000):
        state["pos_embed"] = torch.zeros(1, length, 64)
        torch.save(state, tmp_path / "c.pth")
        assert load_backbone(tmp_path / "c.pth", "test_vit").match.missing == (["pos_embed"] if length != 2 else [])


def test_a_network_pickled_whole_gives_its_tensors(tmp_path):
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", num_classes=7)
    torch.save({"model": network, "epoch": 3}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert equal(loaded.backbone, network.state_dict())
    assert any("classes were not loaded" in note for note in loaded.notes)


def test_arrays_pickled_under_any_name_load(tmp_path, state):
    tree = {"model": {f"backbone.{name}": tensor.numpy() for name, tensor in state.items()}, "__author__": "me"}
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(tree))
    assert equal(load_backbone(tmp_path / "c.pkl").backbone, state)


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
        "tf_efficientnet_lite0",
        "poolformer_s12",
        "levit_128s",
        "resnest14d",
    ],
)
def test_timms_networks_are_told_by_their_tensors(arch, tmp_path):
    """No word on the architecture: a head of 3 classes, a wrapper's prefix, and another network's name for the file."""
    state = timm.create_model(arch, num_classes=3).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "resnet50.pth")
    loaded = load_backbone(tmp_path / "resnet50.pth")
    told, own = loaded.backbone.net.state_dict(), timm.create_model(arch, num_classes=0).state_dict()
    assert {name: t.shape for name, t in told.items()} == {name: t.shape for name, t in own.items()}
    assert all(torch.equal(told[name], state[name]) for name in loaded.match.tensors)
    assert loaded.match.share == 1


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
    assert backbone.kwargs == kwargs
    assert backbone.size == kwargs.get("img_size", 224)
    assert backbone.input.color == {1: "gray", 2: "sobel", 3: "rgb"}[kwargs.get("in_chans", 3)]
    assert equal(backbone, state)
    assert torch.isfinite(backbone(torch.rand(2, 3, backbone.size, backbone.size))).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"just some text", "is not a checkpoint"),
        (b"PK\x03\x04 cut short", "is not a checkpoint"),
        (b"\x80\x02}q\x00.", "holds no named tensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    with pytest.raises(OdcftError, match=message):
        read(path)


def test_cut_file_is_refused(tmp_path, state):
    path = tmp_path / "c.pth"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OdcftError, match="is not a checkpoint"):
        read(path)
    save_file(state, tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(OdcftError, match="damaged safetensors"):
        read(tmp_path / "c.safetensors")


def test_tensors_that_fit_nothing_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match="fits no backbone"):
        load_backbone(tmp_path / "c.pth")
    torch.save({"epoch": 3}, tmp_path / "d.pth")
    with pytest.raises(OdcftError, match="holds no named tensors"):
        load_backbone(tmp_path / "d.pth")


def test_unknown_architecture_is_refused_with_the_nearest():
    with pytest.raises(OdcftError, match="did you mean resnet50"):
        load_backbone("scratch:resnet_50")


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


def test_a_resnet_for_small_images_keeps_its_first_convolution(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    state["conv1.weight"] = torch.randn(64, 3, 3, 3)
    torch.save(state, tmp_path / "c.pth")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    assert backbone.kwargs == {"small_stem": True}
    assert torch.equal(backbone.net.conv1.weight, state["conv1.weight"])
    with torch.no_grad():
        assert backbone.net.layer1(backbone.net.maxpool(backbone.net.conv1(torch.rand(1, 3, 32, 32)))).shape[-1] == 32


def test_heads_of_moco_v3_do_not_depend_on_who_names_the_network(tmp_path):
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    torch.save({"state_dict": {f"module.base_encoder.{name}": t for name, t in state.items()}}, tmp_path / "c.pth")
    for arch in (None, "vit_small_patch16_224"):
        assert load_backbone(tmp_path / "c.pth", arch).backbone.kwargs == {"num_heads": 12}


def test_another_first_convolution_is_refused_by_name(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    state["conv1.weight"] = torch.randn(64, 3, 5, 5)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=r"nearly a resnet18.*first convolution.*--allow-partial"):
        load_backbone(tmp_path / "c.pth")
