import pytest
import torch

from odcft.backbone.backbone_parts import Part
from odcft.backbone.left_out_tensors import Group, left_out_groups
from odcft.backbone.tensor_matching import Match


def match(where="the file itself", dropped=(), others=()):
    return Match({"w": torch.zeros(1)}, where, 1, [], list(dropped), [], {}, list(others))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("module.queue", "queue"),
        ("memory_bank.features", "queue"),
        ("module.fc.0.weight", "head"),
        ("head.weight", "head"),
        ("classifier.6.bias", "head"),
        ("module.head.projector.0.weight", "projector"),
        ("dino_head.mlp.0.weight", "projector"),
        ("neck.fc0.weight", "projector"),
        ("online_predictor.net.0.weight", "predictor"),
        ("decoder_blocks.0.norm1.weight", "decoder"),
        ("mask_token", "mask token"),
        ("momentum_encoder.conv1.weight", "copies"),
        ("n_averaged", "counters"),
        ("something", "other"),
    ],
)
def test_names_tell_the_group(name, group):
    (found,) = left_out_groups(match(dropped=[name]), [Part("the file itself", True)])
    assert (found.name, found.members) == (group, [name])
    assert found.why


def test_what_lies_in_another_complete_backbone_is_a_copy():
    found = match(
        "state_dict/a.", dropped=["b.conv.weight", "b.fc.weight", "bn.weight"], others=["", "optimizer/state"]
    )
    groups = left_out_groups(found, [Part("state_dict/a.", True), Part("state_dict/b.", False)])
    assert [(group.name, group.members) for group in groups] == [
        ("copies", ["b.conv.weight", "b.fc.weight"]),
        ("other", ["bn.weight", "the file itself"]),
        ("optimizer", ["optimizer/state"]),
    ]


def test_nothing_left_out_is_no_group():
    assert left_out_groups(match(), [Part("the file itself", True)]) == []
    assert isinstance(left_out_groups(match(others=["x"]), [])[0], Group)
