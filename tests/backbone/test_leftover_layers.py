"""A network with more layers, or more in its layers, does not pass for the plain one whose tensors it has."""

import pytest
import timm
import torch
from backbone_helpers import contents

from odcft.backbone.architecture_recognition import recognise
from odcft.backbone.non_timm_networks import shapes
from odcft.errors import OdcftError


def refusal(state, arch=None):
    with pytest.raises(OdcftError) as refused:
        recognise(contents(state), arch)
    return str(refused.value)


@pytest.mark.parametrize("prefix", ["", "model.", "module.encoder."])
def test_a_deeper_transformer_is_no_shallower_one(prefix):
    deeper = timm.create_model("test_vit", depth=8, num_classes=5).state_dict()
    told = refusal({prefix + name: tensor for name, tensor in deeper.items()})
    assert f"is nearly a test_vit, but that has no place for {prefix}blocks.6.norm1.weight" in told
    assert "--arch NAME." in told
    assert "no place for" in refusal(deeper, "test_vit")


def test_a_deeper_resnet_is_no_shallower_one():
    deeper = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [2, 2, 2, 3], num_classes=5).state_dict()
    assert "nearly a resnet18, but that has no place for layer4.2.conv1.weight" in refusal(deeper)


@pytest.mark.parametrize("extra", ["attn.lora_a", "ls1.gamma", "adapter.0.weight"])
def test_tensors_in_a_layer_that_the_network_lacks_are_refused_or_said(extra):
    state = {**shapes("test_vit"), **{f"blocks.{n}.{extra}": torch.ones(4) for n in range(6)}}
    told = refusal(state)
    assert f"nearly a test_vit, but that has no place for blocks.0.{extra}" in told
    assert "to leave such tensors out, pass --arch test_vit" in told
    name, _, found = recognise(contents(state), "test_vit")
    assert name == "test_vit"
    assert found.notes == [f"test_vit has no place for tensors in its layers, so features may differ: blocks.0.{extra}"]


def test_what_stands_beside_the_layers_or_follows_from_sizes_is_no_concern():
    state = {
        **shapes("test_vit"),
        "blocks.0.attn.relative_position_index": torch.zeros(3, 3),
        "blocks.0.attn.total_ops": torch.zeros(1),
        "head.weight": torch.ones(5, 64),
        "head.mlp.0.weight": torch.ones(5, 64),
        "head.mlp.2.weight": torch.ones(5, 64),
        **{f"head.4.{leaf}": torch.ones(5) for leaf in ("weight", "bias", "running_mean", "num_batches_tracked")},
        **{f"decoder_blocks.{n}.norm1.{leaf}": torch.ones(8) for n in range(3) for leaf in ("weight", "bias", "scale")},
        **{f"momentum.{name}": tensor for name, tensor in shapes("test_vit").items()},
    }
    name, _, found = recognise(contents(state))
    assert (name, found.coverage, found.notes) == ("test_vit", 1, [])


def test_another_copy_in_a_list_of_networks_is_no_layer():
    state = {f"nets.{n}.{name}": tensor for n in range(2) for name, tensor in shapes("test_vit").items()}
    assert recognise(contents(state))[2].where == "nets.0."


@pytest.mark.slow
def test_a_network_that_only_its_shapes_tell_is_found_behind_a_shallower_one():
    """maxvit_nano_rw_256 has the names of the first blocks, and maxvit_tiny_rw_224 tables of another size."""
    assert recognise(contents(dict(shapes("maxvit_tiny_rw_256"))))[0] == "maxvit_tiny_rw_256"
