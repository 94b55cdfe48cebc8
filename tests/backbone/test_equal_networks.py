"""Networks with the same tensors that compute something else are told apart by the file, or asked for."""

import pytest
import timm
import torch
from backbone_helpers import contents

from odcft.backbone.architecture_recognition import recognise
from odcft.backbone.equal_networks import choose_equal, without_anti_aliasing
from odcft.backbone.non_timm_networks import shapes
from odcft.backbone.structure_index import twins
from odcft.errors import OdcftError


def named(arch, **kwargs):
    """A file of this network under timm's own names."""
    return contents(dict(shapes(arch, **kwargs)))


def with_hint(arch, hint):
    return contents(dict(shapes(arch)), hints=[hint])


@pytest.mark.parametrize(
    ("arch", "others", "why"),
    [
        ("efficientnet_lite0", "efficientnet_lite0 and tf_efficientnet_lite0", "pad as TensorFlow does"),
        ("mobilenetv3_small_075", "mobilenetv3_small_075 and tf_mobilenetv3_small_075", "pad as TensorFlow does"),
    ],
)
def test_names_do_not_hide_that_several_fit(arch, others, why):
    for name in (arch, f"tf_{arch}"):
        with pytest.raises(OdcftError, match=rf"fits {others}, which differ in what no tensor shows: .*{why}.*--arch"):
            recognise(named(name))
        assert recognise(named(name), f"tf_{arch}")[0] == f"tf_{arch}"
        assert recognise(with_hint(name, f"tf_{arch}"))[0] == f"tf_{arch}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "among"),
    [
        ("vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"),
        ("vit_base_patch16_siglip_gap_224", "vit_base_patch16_gap_224"),
        ("vit_small_patch16_lingbot", "vit_small_patch16_dinov3_qkvb"),
        ("swinv2_base_window12to16_192to256", "swinv2_base_window8_256"),
        ("swinv2_cr_tiny_384", "swinv2_cr_tiny_224"),
        ("nest_tiny_jx", "nest_tiny"),
        ("tf_mixnet_s", "mixnet_s"),
        ("tf_efficientnetv2_s", "efficientnetv2_s"),
        ("maxvit_rmlp_small_rw_256", "maxvit_rmlp_small_rw_224"),
    ],
)
def test_networks_that_leave_no_trace_are_all_named(arch, among):
    with pytest.raises(OdcftError) as refused:
        recognise(named(arch))
    assert {arch, among} <= set(str(refused.value).replace(",", " ").split())
    assert recognise(named(arch), arch)[0] == arch


@pytest.mark.slow
def test_a_network_of_another_size_and_other_heads_is_not_taken_for_one_of_less():
    """vit_base_patch16_gap_224 has 16 heads, its twin for 256 pixels 12, and only the embedding's length tells."""
    assert recognise(named("vit_base_patch16_siglip_gap_256"))[0] == "vit_base_patch16_siglip_gap_256"


def windows(arch, drop=()):
    """The tables that Microsoft's and timm's older files hold beside the weights of a SwinV2."""
    net = timm.create_model(arch, num_classes=0)
    tables = {
        f"layers.{stage}.blocks.0.attn.relative_coords_table": layer.blocks[0].attn.relative_coords_table
        for stage, layer in enumerate(net.layers)
        if stage not in drop
    }
    return {**shapes(arch), **tables}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["swinv2_tiny_window8_256", "swinv2_tiny_window16_256"])
def test_the_tables_of_swin_v2_tell_its_windows(arch):
    assert recognise(contents(windows(arch)))[:2] == (arch, {})


@pytest.mark.slow
def test_the_tables_of_swin_v2_tell_the_windows_it_had_before():
    equal = ["swinv2_base_window8_256", *twins("swinv2_base_window8_256")]
    assert len(equal) == 5
    for arch in equal:
        assert choose_equal(contents(windows(arch)), equal, {}) == (arch, [])
        with pytest.raises(OdcftError, match="windows of other sizes"):
            choose_equal(contents(windows(arch, drop=(2,))), equal, {})


@pytest.mark.parametrize("number", [0, torch.nan, torch.inf, 1e30, -1])
@pytest.mark.parametrize("shape", [(1, 15, 15, 2), (3,)])
def test_odd_tables_tell_nothing(number, shape):
    table = torch.full(shape, number)
    odd = {f"layers.{stage}.blocks.0.attn.relative_coords_table": table for stage in range(4)}
    with pytest.raises(OdcftError, match="--arch"):
        choose_equal(contents(odd), ["swinv2_tiny_window8_256", "swinv2_tiny_window16_256"], {})


def test_blurred_strides_are_rare_and_must_be_asked_for():
    assert recognise(named("resnet18"))[0] == "resnet18"
    assert recognise(named("resnet18"))[2].notes == []  # nearly every file has these tensors
    assert recognise(with_hint("resnet18", "resnetblur18"))[0] == "resnetblur18"
    name, _, found = recognise(named("resnet34d"))
    assert name == "resnet34d"
    assert found.notes == ["the same tensors also fit resnetaa34d: if that is the right network, pass --arch NAME"]
    assert without_anti_aliasing("mobilenetv4_conv_blur_medium") == "mobilenetv4_conv_medium"


def test_the_users_activation_decides():
    equal = ["vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"]
    assert choose_equal(contents({}), equal, {"act_layer": "quick_gelu"}) == (equal[0], [])
