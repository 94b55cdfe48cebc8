"""Which arguments a network was built with: each rule on its own, on names and shapes alone (the meta device)."""

import pytest
import torch
from backbone_helpers import contents, matched

from odcft.backbone import arch_arguments
from odcft.backbone.non_timm_networks import shapes
from odcft.errors import OdcftError

# ---------------------------------------------------------------- what fits with other arguments


def fitted(arch, state, kwargs=None, given=None):
    kwargs, found = arch_arguments.match_adjusted(contents(state), arch, kwargs or {}, given or {})
    return kwargs, len(found.tensors) - found.expected


def changed(arch, name, shape, **kwargs):
    return {**shapes(arch, **kwargs), name: torch.empty(shape, device="meta")}


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_are_found(channels):
    assert fitted("resnet18", shapes("resnet18", in_chans=channels)) == ({"in_chans": channels}, 0)
    assert fitted("resnet18", shapes("resnet18", in_chans=channels), {"in_chans": channels}) == (
        {"in_chans": channels},
        0,
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1.weight", (64, 8, 7, 7)),  # many: no image
        ("conv1.weight", (64, 0, 7, 7)),
        ("conv1.weight", (32, 1, 7, 7)),
        ("conv1.weight", (64, 1, 5, 5)),
        ("conv1.weight", (64, 1, 7)),
        ("layer1.0.conv1.weight", (64, 1, 3, 3)),  # not the first
        ("layer1.0.conv1.weight", (64, 7, 3, 3)),
    ],
)
def test_other_shapes_are_not_taken_for_another_number_of_channels(name, shape):
    kwargs, lacks = fitted("resnet18", changed("resnet18", name, shape))
    assert (kwargs, lacks) == ({}, -1)


@pytest.mark.parametrize(("channels", "kwargs"), [(3, {"small_stem": True}), (1, {"small_stem": True, "in_chans": 1})])
def test_a_resnet_for_small_images_is_found(channels, kwargs):
    assert fitted("resnet18", changed("resnet18", "conv1.weight", (64, channels, 3, 3))) == (kwargs, 0)
    assert fitted("resnet18", changed("resnet18", "conv1.weight", (64, channels, 5, 5))) == ({}, -1)
    assert fitted("resnet18", changed("resnet18", "conv1.weight", (32, channels, 3, 3))) == ({}, -1)
    state = changed("resnet18", "layer1.0.conv1.weight", (9, 9, 3, 3))
    assert fitted("resnet18", state) == ({}, -1)


def test_only_resnets_have_another_stem():
    state = changed("densenet121", "features.conv0.weight", (64, 3, 3, 3))
    assert fitted("densenet121", state) == ({}, -1)


@pytest.mark.parametrize(("side", "size"), [(1, 16), (4, 64), (12, 192), (256, 4096), (257, None)])
def test_another_size_is_found_by_the_position_embedding(side, size):
    """test_vit: one class token, patches of 16 pixels."""
    state = changed("test_vit", "pos_embed", (1, 1 + side * side, 64))
    assert fitted("test_vit", state) == (({"img_size": size}, 0) if size else ({}, -1))


@pytest.mark.parametrize("length", [0, 1, 18, 16])
def test_an_embedding_that_is_not_square_gives_no_size(length):
    assert fitted("test_vit", changed("test_vit", "pos_embed", (1, length, 64))) == ({}, -1)
    assert fitted("test_vit", changed("test_vit", "pos_embed", (1, 17, 32))) == ({}, -1)
    assert fitted("test_vit", changed("test_vit", "pos_embed", (17, 64))) == ({}, -1)


def test_sizes_below_8_and_above_4096_pixels_are_not_accepted():
    kwargs = {"patch_size": 4, "img_size": 32}
    for side, size in ((2, 8), (1, None)):
        state = changed("test_vit", "pos_embed", (1, 1 + side * side, 64), **kwargs)
        told = {**kwargs, "img_size": size} if size else kwargs
        assert fitted("test_vit", state, kwargs) == (told, 0 if size else -1)
    odd = {"patch_size": 17, "img_size": 34}
    state = changed("test_vit", "pos_embed", (1, 1 + 241 * 241, 64), **odd)  # 4,097 pixels
    assert fitted("test_vit", state, odd) == (odd, -1)


def test_the_users_arguments_are_never_adjusted():
    state = shapes("resnet18", in_chans=1)
    assert fitted("resnet18", state, {"in_chans": 3}, {"in_chans": 3}) == ({"in_chans": 3}, -1)
    state = shapes("test_vit", in_chans=1, img_size=32)
    assert fitted("test_vit", state, {"img_size": 64}, {"img_size": 64})[0] == {"img_size": 64, "in_chans": 1}


def test_a_network_that_refuses_the_adjustment_stays_as_it_is(monkeypatch):
    real = arch_arguments.shapes

    def refusing(arch, **kwargs):
        if "in_chans" in kwargs:
            raise OdcftError("takes no in_chans")
        return real(arch, **kwargs)

    monkeypatch.setattr(arch_arguments, "shapes", refusing)
    assert fitted("resnet18", real("resnet18", in_chans=1)) == ({}, -1)


def test_a_network_without_patches_has_no_size_to_find(monkeypatch):
    own = {"pos_embed": torch.empty(1, 17, 8, device="meta"), "w": torch.empty(2, device="meta")}
    monkeypatch.setattr(arch_arguments, "shapes", lambda arch, **kwargs: own)
    assert fitted("any", {**own, "pos_embed": torch.empty(1, 65, 8, device="meta")}) == ({}, -1)


# ---------------------------------------------------------------- arguments that change no shape


@pytest.mark.parametrize(
    ("arch", "kwargs", "where", "container", "told"),
    [
        ("vit_small_patch16_224", {"in_chans": 1}, "x/base_encoder.", "torch", {"in_chans": 1, "num_heads": 12}),
        ("vit_small_patch16_224", {}, "x/encoder.", "torch", {}),
        ("vit_base_patch16_224", {}, "x/base_encoder.", "torch", {}),
        ("resnet50", {"in_chans": 1}, "x/_feature_blocks.", "torch", {"in_chans": 1, "last_stride": 1}),
        ("resnet50", {"in_chans": 1}, "blobs", "pickle", {"in_chans": 1, "last_stride": 1}),
        ("resnet50", {"in_chans": 1}, "x", "torch", {"in_chans": 1}),
        ("resnet50", {"in_chans": 2}, "blobs", "pickle", {"in_chans": 2}),
        ("resnet50", {}, "blobs", "pickle", {}),
        ("resnet18", {"in_chans": 1}, "blobs", "pickle", {"in_chans": 1}),
    ],
)
def test_arguments_that_only_the_writing_code_reveals(arch, kwargs, where, container, told):
    assert arch_arguments.with_hidden_arguments(contents({}, container=container), arch, kwargs, matched(where)) == told
