"""Weights from the hub: cached ones are used; without a connection there is one sentence of error, within seconds."""

import json
import threading
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from odcft.backbone import hub_download
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


@pytest.fixture
def no_network(monkeypatch):
    """No host name resolves, and every attempt is counted."""
    asked = []

    def nobody(*where, **how):
        asked.append(where)
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    monkeypatch.setattr("socket.create_connection", nobody)
    return asked


def cached(folder, monkeypatch, name="resnet18.a1_in1k"):
    """Write the cache that the hub's client leaves for a network it fetched."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    torch.manual_seed(3)
    state = timm.create_model(name.split(".")[0]).state_dict()
    repository = folder / f"models--timm--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"architecture": name.split(".")[0]}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return state


@pytest.mark.parametrize("ckpt", ["timm:resnet18.a1_in1k", "timm:vit_tiny_patch16_224", "torchvision:resnet18"])
def test_without_a_connection_there_is_one_sentence_within_seconds(ckpt, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(OdcftError, match=r"could not be fetched .the hub does not answer") as refusal:
        load_backbone(ckpt)
    assert time.monotonic() - began < 10
    assert "\n" not in str(refusal.value)
    assert len(no_network) <= 2
    assert constants.HF_HUB_OFFLINE is False


def test_cached_weights_load_without_a_connection(no_network, tmp_path, monkeypatch):
    state = cached(tmp_path, monkeypatch)
    told = load_backbone("timm:resnet18.a1_in1k").backbone.net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in told.items())


def test_in_offline_mode_the_hub_is_not_asked(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(tmp_path, monkeypatch)
    assert load_backbone("timm:resnet18.a1_in1k").backbone.arch == "resnet18.a1_in1k"
    with pytest.raises(OdcftError, match="not on this machine"):
        load_backbone("timm:resnet18.a3_in1k")
    assert not no_network
    assert constants.HF_HUB_OFFLINE is True


@pytest.mark.parametrize("ckpt", ["timm:resnet18.a3_in1k", "timm:cs3se_edgenet_x.c2ns_in1k", "torchvision:resnet18"])
def test_weights_that_only_a_file_names_are_never_fetched(ckpt, no_network, tmp_path, monkeypatch):
    state = cached(tmp_path, monkeypatch)
    told = load_backbone("timm:resnet18.a1_in1k", fetch=False).backbone.net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in told.items())
    with pytest.raises(OdcftError, match="is not on this machine"):
        load_backbone(ckpt, fetch=False)
    assert not no_network


def test_a_silent_name_server_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub_download, "TIMEOUT_SECONDS", 0.2)
    forever = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **how: forever.wait(20))
    began = time.monotonic()
    with hub_download.offline_if_unreachable() as answers:
        assert answers is False
        assert constants.HF_HUB_OFFLINE is True
    assert time.monotonic() - began < 5
    forever.set()


def test_a_hub_that_answers_is_asked(monkeypatch):
    monkeypatch.setattr(hub_download, "_is_reachable", lambda address: address == constants.ENDPOINT)
    with hub_download.offline_if_unreachable() as answers:
        assert answers is True
        assert constants.HF_HUB_OFFLINE is False
    with pytest.raises(KeyError), hub_download.offline_if_unreachable():
        raise KeyError
    assert constants.HF_HUB_OFFLINE is False
