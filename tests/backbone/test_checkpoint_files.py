"""Checkpoint files of every container and wrapping load, and other files are refused."""

import argparse
import pickle  # noqa: TID251 - to write what others wrote

import pytest
import timm
import torch
from backbone_helpers import equal, resnet_state
from safetensors.torch import save_file

from odcft.backbone.checkpoint_files import read
from odcft.backbone.inspection import describe
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


@pytest.fixture
def state():
    return resnet_state()


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
def test_tensors_that_no_network_holds_are_left_out_and_named(tmp_path, state, odd):
    torch.save({**state, "extra.weight": odd}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert equal(loaded.backbone, state)
    assert loaded.notes == ["sparse, quantized and complex tensors were left out: extra.weight"]


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
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"just some text", "is not a checkpoint"),
        (b"PK\x03\x04 cut short", "is not a checkpoint"),
        (b"\x80\x02}q\x00.", "holds no named tensors"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
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


def test_files_without_a_backbone_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "c.pth")
    with pytest.raises(OdcftError, match="fits no backbone"):
        load_backbone(tmp_path / "c.pth")
    torch.save({"epoch": 3}, tmp_path / "d.pth")
    with pytest.raises(OdcftError, match="holds no named tensors"):
        load_backbone(tmp_path / "d.pth")
