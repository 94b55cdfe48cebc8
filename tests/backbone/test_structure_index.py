"""Networks that have a file's shapes."""

import pytest
import torch

from odcft.backbone.non_timm_networks import shapes
from odcft.backbone.structure_index import general_shape, nearby_networks, shape_hashes, summary, twins


@pytest.mark.parametrize(
    ("shape", "told"),
    [((64, 3, 7, 7), (64, 7, 7)), ((64, 64, 1, 1), (64, 64)), ((64, 64), (64, 64)), ((64, 8, 3, 3), (64, 8, 3, 3))],
)
def test_what_the_input_changes_is_left_out_of_a_shape(shape, told):
    assert general_shape(torch.empty(shape, device="meta")) == told


def test_counters_and_tokens_have_no_hash():
    assert shape_hashes([torch.tensor(3), torch.empty(1, 197, 8), torch.empty(8)]) == shape_hashes([torch.empty(8)])


def test_the_index_has_the_summaries_of_networks():
    for name in ("resnet18", "test_vit"):
        count, first, second = summary(shapes(name))
        assert nearby_networks([], {name: (count, first, second)}) == ([], [])
        assert nearby_networks([shapes(name)])[0][0] == name


def test_networks_are_found_in_any_order_under_a_prefix_and_by_a_half():
    own = shapes("resnet18")
    backwards = {f"z.{name}": own[name] for name in sorted(own)}
    assert "resnet18" in nearby_networks([{"a": torch.empty(5, 5), **backwards, "z.head": torch.empty(9, 9)}])[0]
    damaged = {name: tensor for name, tensor in own.items() if name != "layer1.0.conv1.weight"}
    complete, half = nearby_networks([damaged])
    assert "resnet18" in half
    assert "resnet18" not in complete


def test_twins_have_the_same_tensors():
    assert "resnetblur18" in twins("resnet18")
    assert twins("vit_small_patch16_224") == []  # deit's is the same network
