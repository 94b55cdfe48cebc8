"""Which part of a checkpoint fits a network: each rule on its own, on tensors of a few numbers."""

from pathlib import Path

import pytest
import torch

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_matching import Match, constant, fits, match, not_finite, preference, prefixes, renamings

NETWORK = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4), "b.num_batches_tracked": torch.tensor(0)}


def contents(**state_dicts):
    return Contents(
        Path("c"), "torch", {path.replace("__", "/").removeprefix("_"): t for path, t in state_dicts.items()}
    )


def network(fill, **more):
    """A state dict of the network whose tensors are filled with one number."""
    return {name: torch.full_like(tensor, fill) for name, tensor in NETWORK.items()} | more


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def values(found):
    return {int(tensor.flatten()[0]) for tensor in found.tensors.values()}


def test_share_is_the_share_of_the_networks_tensors():
    def made(count, expected):
        return Match(dict.fromkeys(map(str, range(count)), torch.zeros(1)), "", expected, [], [], [], {}, [])

    assert made(3, 4).coverage == 0.75
    assert made(0, 0).coverage == 0
    assert made(1, 1).coverage == 1


def test_renamings_that_give_the_same_names_come_once():
    assert list(renamings({"w": 1})) == [{"w": "w"}]
    first, second = renamings({"module.w": 1, "v": 2})
    assert first == {"module.w": "module.w", "v": "v"}
    assert second == {"w": "module.w", "v": "v"}
    (_, both) = renamings({"module.w": 1, "w": 2})
    assert both == {"w": "module.w"}  # the first of two keys that come to the same name


def test_a_plain_state_dict_is_the_file_itself():
    found = match(contents(_=network(1)), NETWORK)
    assert (found.where, found.expected, found.coverage) == ("the file itself", 3, 1)
    assert found.missing == found.dropped == found.unexpected == found.others == []
    assert found.misfits == {}
    assert values(found) == {1}


def test_where_is_the_path_and_the_prefix_as_the_file_has_it():
    assert match(contents(state_dict=network(1)), NETWORK).where == "state_dict"
    found = match(contents(_=prefixed("x.y.", network(1))), NETWORK)
    assert (found.where, found.coverage) == ("x.y.", 1)
    found = match(contents(model=prefixed("module.net.", network(1))), NETWORK)
    assert (found.where, found.coverage) == ("model/module.net.", 1)
    wrapped = {"net.module." + name: tensor for name, tensor in network(1).items()}
    assert match(contents(_=wrapped), NETWORK).where == "net.module."


def test_where_is_renamed_if_the_names_themselves_are():
    """If a rename changes the names themselves, the file has no prefix to show."""
    own = {"conv1.weight": torch.zeros(2, 2), "conv1.bias": torch.zeros(2)}
    found = match(contents(blobs={"conv1_w": torch.ones(2, 2), "conv1_b": torch.ones(2)}), own)
    assert (found.where, found.coverage) == ("blobs", 1)
    own = {"conv1.weight": torch.zeros(2, 2), "conv2.weight": torch.zeros(3, 3)}
    theirs = {"net.features.0.weight": torch.ones(2, 2), "net.features.4.weight": torch.ones(3, 3)}
    found = match(contents(_=theirs), own)
    assert (found.where, found.coverage) == ("net.", 1)


def test_without_a_fitting_tensor_the_match_is_empty():
    found = match(contents(_={"x": torch.zeros(7)}), NETWORK)
    assert (found.tensors, found.where, found.expected) == ({}, "", 3)
    assert found.missing == list(NETWORK)
    assert found.dropped == found.unexpected == found.others == []
    assert match(contents(), NETWORK).coverage == 0


def test_missing_misshaped_dropped_and_other_tensors_are_listed():
    own = network(1, **{"head.weight": torch.zeros(9), "c.weight": torch.zeros(1)})
    own["a.weight"] = torch.ones(5, 5)
    found = match(contents(_=own, other={"x": torch.zeros(1)}), NETWORK)
    assert found.missing == found.unexpected == ["a.weight"]
    assert list(found.misfits) == ["a.weight"]
    assert found.misfits["a.weight"] is own["a.weight"]
    assert found.dropped == ["head.weight", "c.weight"]
    assert found.others == ["other"]
    assert (len(found.tensors), found.expected) == (2, 3)


def test_tensors_outside_the_prefix_are_dropped():
    both = prefixed("encoder_q.", network(1)) | prefixed("encoder_k.", network(2)) | {"queue": torch.zeros(5)}
    found = match(contents(_=both), NETWORK)
    assert values(found) == {1}
    assert found.dropped == [*prefixed("encoder_k.", NETWORK), "queue"]


def test_batch_counters_are_only_missing_if_the_file_has_any():
    without = {name: tensor for name, tensor in network(1).items() if "tracked" not in name}
    found = match(contents(_=without), NETWORK)
    assert (found.expected, found.missing, found.coverage) == (2, [], 1)
    elsewhere = {**without, "c.num_batches_tracked": torch.tensor(0)}
    found = match(contents(_=elsewhere), NETWORK)
    assert (found.expected, found.missing) == (3, ["b.num_batches_tracked"])
    found = match(contents(_=prefixed("x.", without) | {"y.num_batches_tracked": torch.tensor(0)}), NETWORK)
    assert (found.expected, found.missing) == (2, [])


def test_a_linear_layer_fits_a_convolution_of_its_size():
    conv = torch.zeros(4, 3, 2, 2)
    assert fits(torch.zeros(4, 3, 2, 2), conv)
    assert fits(torch.zeros(4, 12), conv)
    assert not fits(torch.zeros(4, 11), conv)
    assert not fits(torch.zeros(12, 4), conv)
    assert not fits(torch.zeros(48), conv)
    assert not fits(torch.zeros(4, 6, 2), conv)
    assert not fits(torch.zeros(4, 12), torch.zeros(4, 3, 4))
    assert not fits(torch.zeros(4, 4), torch.zeros(4, 2, 2, 2))
    linear = torch.arange(48.0).view(4, 12)
    found = match(contents(_={"c.weight": linear}), {"c.weight": conv})
    assert torch.equal(found.tensors["c.weight"], linear.view(4, 3, 2, 2))


def test_prefixes_end_at_dots():
    assert list(prefixes("a.bc.d")) == ["", "a.", "a.bc."]
    assert list(prefixes("a")) == [""]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("teacher/", "student/"),
        ("teacher/", "encoder_q/"),
        ("target_encoder.", "encoder."),
        ("encoder_q.", "encoder_k."),
        ("online.", "backbone."),
        ("backbone.", "encoder."),
        ("encoder.", "trunk."),
        ("model/", "state_dict/"),
        ("state_dict/", "else/"),
        ("else/", "student/teacher."),
        ("else/", "momentum."),
        ("else/", "optimizer/"),
        ("else/", "predictor."),
        ("else/", "target_net."),
        ("ema/", "teacher/"),
        ("model.ema.", "teacher/"),
        ("state_dict_ema/", "state_dict/"),
        ("x/ema_model.", "x/model."),
    ],
)
def test_the_better_copy_is_preferred_by_its_name(better, worse):
    assert preference(better) > preference(worse)


def test_ema_inside_a_word_is_not_an_average():
    assert preference("schema/") == preference("remastered.") == preference("/") == 0
    assert preference("student/") == -1


def test_more_tensors_beat_a_better_name_which_beats_a_plainer_renaming():
    half = {"a.weight": torch.full((2, 3), 1.0)}
    assert values(match(contents(teacher=half, student=network(2)), NETWORK)) == {2}
    assert values(match(contents(student=network(1), teacher=network(2)), NETWORK)) == {2}
    assert values(match(contents(teacher=network(2), student=network(1)), NETWORK)) == {2}
    assert values(match(contents(one=network(1), two=network(2)), NETWORK)) == {1}  # of equals the first
    mixed = prefixed("module.", network(1)) | prefixed("net.", network(2))
    assert values(match(contents(_=mixed), NETWORK)) == {1}
    # Without its wrapper a key may stand in the way of one that needs no rename.
    crossed = {"module.a.weight": torch.full((2, 3), 1.0), "a.weight": torch.full((2, 3), 2.0)}
    found = match(contents(_=crossed), {"a.weight": torch.zeros(2, 3)})
    assert (values(found), found.where) == ({1}, "module.")


# ---------------------------------------------------------------- odd numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(value, dtype):
    tensors = {"good": torch.zeros(3, dtype=dtype), "bad": torch.tensor([0.0, value], dtype=dtype)}
    tensors |= {"none": torch.zeros(0, dtype=dtype), "whole": torch.tensor([1, 2]), "yes": torch.tensor([True])}
    assert not_finite(tensors) == ["bad"]
    assert not_finite({"large": torch.tensor([1e300], dtype=torch.float64)}) == []


def test_constant_weights_are_found():
    odd = {"zero": torch.zeros(2, 2), "half": torch.full((3, 1), 0.5), "row": torch.ones(1, 2)}
    plain = {
        "bias": torch.zeros(4),
        "one": torch.zeros(1, 1),
        "cls_token": torch.zeros(1, 1, 4),
        "int": torch.ones(2, 2).int(),
    }
    plain |= {"two": torch.tensor([[0.0, 1.0]]), "nothing": torch.zeros(0, 2), "column": torch.zeros(1, 4, 1)}
    assert constant(odd | plain) == ["zero is all 0", "half is all 0.5", "row is all 1"]
