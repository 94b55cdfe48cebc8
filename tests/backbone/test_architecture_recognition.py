"""Which architecture a checkpoint holds: each rule on its own, on names and shapes alone (the meta device)."""

import zlib

import pytest
import torch
from backbone_helpers import contents, matched

from odcft.backbone import architecture_recognition
from odcft.backbone.architecture_recognition import (
    COMMON_ARCHITECTURES,
    fingerprint,
    nearest_name,
    recognise,
    without_input_channels,
)
from odcft.backbone.checkpoint_metadata import Metadata
from odcft.backbone.non_timm_networks import NETWORKS, shapes
from odcft.errors import OdcftError


def of_shapes(**tensors):
    return {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}


# ---------------------------------------------------------------- the index


def test_fingerprints_are_of_name_and_shape():
    assert fingerprint("conv1.weight", (64, 3, 7, 7)) == zlib.crc32(b"conv1.weight:64x3x7x7")
    assert without_input_channels((64, 3, 7, 7)) == (64, 7, 7)
    assert list(architecture_recognition._suffixes("a.b.c")) == ["a.b.c", "b.c", "c"]


def test_the_index_is_timms():
    index = architecture_recognition._index()
    assert index["resnet50"][0] == len(shapes("resnet50"))
    assert fingerprint("conv1.weight", (64, 7, 7)) == index["resnet50"][1]
    assert all(len(entry) > 2 for entry in index.values())


@pytest.fixture
def index(monkeypatch):
    """A function that replaces the index: name, number of tensors, and the tensors it has fingerprints of."""

    def put(**entries):
        made = {name: [count, *(fingerprint(*one) for one in ones)] for name, (count, *ones) in entries.items()}
        monkeypatch.setattr(architecture_recognition, "_index", lambda: made)

    return put


def test_networks_match_when_all_their_fingerprints_are_there(index):
    index(
        two=(10, ("a", (2, 2)), ("b", (3,))),
        one=(20, ("a", (2, 2))),
        none=(30, ("a", (2, 2)), ("c", (3,))),
    )
    there = {("a", (2, 2)), ("b", (3,))}
    assert architecture_recognition._matching_timm_names(there) == ["one", "two"]  # that with more tensors first
    assert architecture_recognition._matching_timm_names({("a", (2, 2))}) == ["one"]
    assert architecture_recognition._matching_timm_names(set()) == []


def test_among_networks_of_one_size_common_then_shorter_names_come_first(index):
    names = ["zz_net", "b_net_long", "a_net", "vgg16", "resnet50"]
    index(**dict.fromkeys(names, (10, ("a", (2, 2)))))
    wanted = ["resnet50", "vgg16", "a_net", "zz_net", "b_net_long"]
    assert architecture_recognition._matching_timm_names({("a", (2, 2))}) == wanted


@pytest.mark.parametrize(
    ("shape", "told"), [((64, 1, 7, 7), True), ((64, 7, 7, 7), True), ((64, 8, 7, 7), False), ((64, 7, 7), False)]
)
def test_a_first_convolution_matches_whatever_its_channels(shape, told, index):
    index(net=(10, ("conv1.weight", (64, 7, 7))) if len(shape) == 4 else (10, ("conv1.weight", (64, 7))))
    assert architecture_recognition._matching_timm_names({("conv1.weight", shape)}) == (["net"] if told else [])


def test_names_are_found_under_any_prefix_and_through_the_renames():
    there = architecture_recognition._named_shapes(
        contents(of_shapes(**{"x.module.conv1.weight": (2, 2), "y": (1,)}), {})
    )
    assert {("x.module.conv1.weight", (2, 2)), ("conv1.weight", (2, 2)), ("x.conv1.weight", (2, 2))} <= there
    assert ("y", (1,)) in there
    there = architecture_recognition._named_shapes(contents({}, of_shapes(res_conv1_w=(2, 2))))
    assert ("conv1.weight", (2, 2)) not in there
    assert ("res_conv1_w", (2, 2)) in there


# ---------------------------------------------------------------- candidates


def candidates(file, arch=None):
    return list(architecture_recognition._candidates(file, arch))


def fallbacks(file):
    return [name for name, _ in architecture_recognition._fallbacks(file)]


def test_the_users_architecture_comes_before_the_files():
    told = Metadata("test_vit", {"img_size": 32})
    assert candidates(contents({}, metadata=told)) == [("test_vit", {"img_size": 32})]
    assert candidates(contents({}, metadata=told), "test_vit") == [("test_vit", {"img_size": 32})]
    assert candidates(contents({}, metadata=told), "resnet18") == [("resnet18", {})]
    assert candidates(contents({}), "resnet18") == [("resnet18", {})]


def test_a_hint_counts_unless_the_tensors_contradict_it(index):
    """It counts if its tensors are there or the index does not know it; and every name comes once."""
    index(one=(10, ("a", (2, 2))), resnet18=(10, ("a", (2, 2))), resnet34=(10, ("b", (2, 2))))
    hints = ["resnet34", "nosuch", "test_vit", "resnet18", "resnet18"]
    found = candidates(contents(of_shapes(a=(2, 2)), hints=hints))
    assert found == [("test_vit", {}), ("resnet18", {}), ("one", {})]


def few(count):
    return of_shapes(**{f"a{number}": (2,) for number in range(count)})


def test_common_networks_are_tried_where_nothing_matches_and_there_are_enough_tensors(index):
    index(resnet50=(10, ("a", (2, 2))))
    hints = ["resnet50", "test_vit", "nosuch"]
    assert candidates(contents(few(10), hints=hints)) == [("test_vit", {})]
    others = [name for name in COMMON_ARCHITECTURES if name != "resnet50"]
    assert fallbacks(contents(few(10), hints=hints)) == ["resnet50", "test_vit", *others]
    assert fallbacks(contents(few(9), hints=hints)) == []
    assert fallbacks(contents(few(5), few(5))) == list(COMMON_ARCHITECTURES)
    index(one=(10, ("a0", (2,))))
    assert candidates(contents(few(10))) == [("one", {})]


@pytest.mark.parametrize("name", NETWORKS)
def test_our_own_networks_are_recognised_by_their_second_and_last_weights(name):
    there = {(key, tuple(tensor.shape)) for key, tensor in shapes(name).items()}
    weights = [(key, tuple(tensor.shape)) for key, tensor in shapes(name).items() if tensor.ndim > 1]
    assert architecture_recognition._looks_like(there, name)
    assert architecture_recognition._looks_like(there - {weights[0]}, name)  # the first depends on the input
    assert not architecture_recognition._looks_like(there - {weights[1]}, name)
    assert not architecture_recognition._looks_like(there - {weights[-1]}, name)
    vectors = {(key, shape) for key, shape in there if len(shape) > 1}
    assert architecture_recognition._looks_like(vectors, name)


def test_a_trunk_ends_where_the_convolutions_do(index):
    index()
    state = shapes("alexnet_rotnet_fc")
    assert [name for name, _ in candidates(contents(state))] == ["alexnet_rotnet_fc", "alexnet_rotnet"]
    for mark in ("model_state_dict", "classy_state_dict"):
        assert [name for name, _ in candidates(contents(state, names=[mark]))] == ["alexnet_rotnet"]


# ---------------------------------------------------------------- the best match


def test_a_complete_network_beats_a_partial_one_then_the_larger_one_wins():
    rank = architecture_recognition._rank
    assert rank(matched(count=10, expected=10)) == (True, 10, 1.0)
    assert rank(matched(count=95, expected=100)) == (False, 95, 0.95)
    assert rank(matched(count=90, expected=100)) == (False, 0, 0.9)
    assert rank(matched(count=10, expected=10)) > rank(matched(count=99, expected=100))
    assert rank(matched(count=95, expected=100)) > rank(matched(count=19, expected=20))
    assert rank(matched(count=9, expected=10)) > rank(matched(count=80, expected=100))


@pytest.fixture
def fits(monkeypatch):
    """A function that sets the candidates and how well each fits, and returns the list of those that were tried."""

    def put(**found):
        tried = []

        def fitted(file, arch, kwargs, given):
            tried.append((arch, kwargs, given))
            if isinstance(found[arch], Exception):
                raise found[arch]
            count, expected, *args = found[arch]
            return (args[0] if args else kwargs), matched(count=count, expected=expected)

        monkeypatch.setattr(architecture_recognition, "match_adjusted", fitted)
        monkeypatch.setattr(
            architecture_recognition,
            "_candidates",
            lambda file, arch: iter([(arch, {})] if arch else [(n, {}) for n in found]),
        )
        return tried

    return put


def test_the_first_complete_network_of_timms_is_taken(fits):
    tried = fits(part=(5, 10), resnet18=(8, 8), resnet50=(9, 9))
    name, kwargs, found = recognise(contents({}))
    assert (name, kwargs, found.expected) == ("resnet18", {}, 8)
    assert [name for name, _, _ in tried] == ["part", "resnet18"]
    tried = fits(alexnet=(8, 8), resnet50=(9, 9), resnet18=(20, 20))  # ours may be a part of a larger one
    assert recognise(contents({}))[0] == "resnet50"
    assert [name for name, _, _ in tried] == ["alexnet", "resnet50"]


def test_the_best_partial_network_is_taken_and_among_equals_the_one_with_fewer_arguments(fits):
    fits(a=(1, 10), b=(3, 10), c=(2, 10))
    assert recognise(contents({}))[0] == "b"
    fits(a=(3, 10, {"x": 1}), b=(3, 10), c=(3, 10))
    assert recognise(contents({}))[0] == "b"
    fits(a=(3, 10), b=(3, 10, {"x": 1}))
    assert recognise(contents({}))[0] == "a"


@pytest.mark.parametrize("found", [{}, {"a": (0, 10)}])
def test_tensors_that_fit_no_network_are_refused(found, fits):
    fits(**found)
    with pytest.raises(OdcftError, match=r"somewhere.pth fits no backbone"):
        recognise(contents({}))


def test_no_more_networks_than_the_limit_are_compared(fits, monkeypatch):
    monkeypatch.setattr(architecture_recognition, "MAX_COMPARED", 2)
    tried = fits(a=(1, 10), b=(2, 10), c=(10, 10))
    assert recognise(contents({}))[0] == "b"
    assert len(tried) == 2


def test_the_users_arguments_go_to_every_candidate_and_those_that_refuse_them_are_skipped(fits):
    wrong = OdcftError("takes no such thing")
    tried = fits(a=wrong, b=(3, 10), c=wrong)
    assert recognise(contents({}), arch_args={"in_chans": 1})[:2] == ("b", {"in_chans": 1})
    assert tried == [(name, {"in_chans": 1}, {"in_chans": 1}) for name in "abc"]
    fits(resnet18=wrong)  # unless it is the one that is meant
    with pytest.raises(OdcftError, match="no such thing"):
        recognise(contents({}), "resnet18", {"x": 1})
    with pytest.raises(OdcftError, match="no such thing"):
        recognise(contents({}, metadata=Metadata("resnet18")))
    fits(a=wrong)
    with pytest.raises(OdcftError, match="fits no backbone"):
        recognise(contents({}))


def test_an_unknown_architecture_is_refused_with_the_nearest_name():
    with pytest.raises(OdcftError, match=r"--arch resnet_50: timm has no such network \(did you mean resnet50\?\)"):
        recognise(contents({}), "resnet_50")
    assert nearest_name("completely different words") == ""
    assert nearest_name("alexnet_deepclustr") == " (did you mean alexnet_deepcluster?)"
    assert nearest_name("resnet50" + "x" * 10**6) == ""


def test_the_users_number_of_heads_is_not_overruled(fits, monkeypatch):
    fits(vit_small_patch16_224=(10, 10))
    monkeypatch.setattr(
        architecture_recognition, "with_hidden_arguments", lambda *about: {"num_heads": 12, "in_chans": 1}
    )
    assert recognise(contents({}), arch_args={"num_heads": 3})[1] == {"num_heads": 3, "in_chans": 1}
