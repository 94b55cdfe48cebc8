"""The order of layers in a file that is sorted by name."""

import pytest
import torch

from odcft.backbone.layer_order import canonical_order, in_network_order, is_numbered, natural


def of(**shapes):
    return {name.replace("__", "."): torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_numbers_are_sorted_as_numbers():
    assert sorted(["a.10.b", "a.9.b", "a.b", "a2"], key=natural) == ["a.9.b", "a.10.b", "a.b", "a2"]


def test_tensors_of_a_layer_come_as_torch_writes_them():
    names = ["a.10.bias", "a.10.running_var", "a.10.weight", "a.9.bias", "a.9.weight", "b.y", "b.x"]
    tensors = dict.fromkeys(names, torch.empty(1))
    kept = ["a.10.weight", "a.10.bias", "a.10.running_var", "a.9.weight", "a.9.bias", "b.y", "b.x"]
    assert list(canonical_order(tensors, sort=False)) == kept
    assert list(canonical_order(tensors, sort=True)) == [*kept[3:5], *kept[:3], "b.x", "b.y"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["p1", "p2"], True),
        (["0.weight", "0.bias", "1.weight"], True),
        (["a.weight", "b.weight"], False),
        (["x", "y"], False),
    ],
)
def test_only_numbers_and_torchs_words_tell_an_order(names, told):
    assert is_numbered(names) == told


NETWORK = of(
    conv1__weight=(8, 3, 3, 3),
    bn1__weight=(8,),
    bn1__bias=(8,),
    conv2__weight=(9, 8, 3, 3),
    bn2__weight=(8,),
    bn2__bias=(8,),
)


def renamed(**words):
    return {f"{words[name.split('.')[0]]}.{name.split('.')[1]}": NETWORK[name] for name in NETWORK}


def test_layers_are_told_by_shapes_and_equal_ones_by_numbers():
    names = {"conv1": "z", "bn1": "n1", "conv2": "a", "bn2": "n2"}
    row, unclear = in_network_order(dict(sorted(renamed(**names).items())), NETWORK)
    assert row == ["z.weight", "n1.weight", "n1.bias", "a.weight", "n2.weight", "n2.bias"]
    assert unclear == []


def test_equal_layers_that_nothing_tells_apart_are_named():
    names = {"conv1": "z", "bn1": "x", "conv2": "a", "bn2": "y"}
    assert in_network_order(renamed(**names), NETWORK) == ([], ["x", "y"])


def test_another_tree_fits_not():
    other = {**renamed(conv1="z", bn1="n1", conv2="a", bn2="n2"), "n1.more": torch.empty(8)}
    assert in_network_order(other, NETWORK) == ([], [])
