"""Backbones under unknown names: found to the bit by the shapes, order and grouping of their tensors, or refused."""

import random
import re
from itertools import pairwise

import pytest
import timm
import torch
from backbone_helpers import contents

from odcft.backbone.architecture_recognition import recognise
from odcft.backbone.non_timm_networks import shapes
from odcft.errors import OdcftError

# Small networks, one or a few of each of timm's families.
QUICK = ("resnet18", "test_vit", "regnetx_002", "mobilevit_xxs")
SLOW = (
    *("test_resnet", "resnet10t", "resnet26", "resnext50_32x4d", "wide_resnet50_2", "resnetv2_18", "res2net50_14w_8s"),
    *("test_convnext", "convnext_atto", "convnextv2_atto", "test_efficientnet", "efficientnet_lite0", "tinynet_e"),
    *("mobilenetv2_050", "mobilenetv3_small_050", "lcnet_035", "mnasnet_small", "semnasnet_075", "fbnetc_100"),
    *("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("vit_tiny_r_s16_p8_224", "test_vit_relpos", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"),
    *("swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "beit_base_patch16_224"),
    *("regnety_002", "densenet121", "dla46x_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "ghostnet_050"),
    *("efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "fastvit_t8", "gcvit_xxtiny", "hardcorenas_b"),
    *("hgnetv2_b0", "hrnet_w18_small", "inception_next_atto", "levit_128s", "test_coatnet", "test_maxvit"),
    *("poolformer_s12", "resmlp_12_224", "gmlp_ti16_224", "mixer_s32_224", "mobilevitv2_050", "pit_ti_224"),
    *("pvt_v2_b0", "repghostnet_050", "repvit_m1", "resnest14d", "rexnet_100", "skresnet18", "legacy_seresnet18"),
    *("starnet_s050", "tiny_vit_5m_224", "ese_vovnet19b_dw", "xcit_nano_12_p16_224", "cait_xxs24_224", "coat_tiny"),
    *("convit_tiny", "crossvit_tiny_240", "cs3darknet_s", "visformer_tiny", "nf_regnet_b0", "volo_d1_224", "vgg11_bn"),
    *("convmixer_768_32", "twins_svt_small", "test_mambaout", "test_byobnet", "swiftformer_xs", "mvitv2_tiny"),
)


def random_weights(arch, seed=0, **kwargs):
    """A state dict of random numbers that no two tensors share."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, own in shapes(arch, **kwargs).items():
        values = torch.randn(own.shape, generator=draw)
        if name.endswith("running_var"):
            values = values.abs()
        state[name] = values if own.is_floating_point() else (100 * values.abs()).to(own.dtype)
    return state


def by_position(state):
    """Names of `nn.Sequential(*children())`: the place of each module in its parent; torch's words at the end stay."""
    places = {}
    renamed = {}
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        new = []
        for depth, word in enumerate(path):
            siblings = places.setdefault(tuple(path[:depth]), {})
            new.append(str(siblings.setdefault(word, len(siblings))))
        renamed[".".join([*new, leaf])] = tensor
    return renamed


def by_random_words(state, seed=1):
    """Every word replaced by another, but numbers, which stay."""
    draw, words = random.Random(seed), {}

    def other(word):
        if word.isdecimal():
            return word
        return words.setdefault(word, "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)))

    return {".".join(other(word) for word in name.split(".")): tensor for name, tensor in state.items()}


def under_a_deep_prefix(state):
    return {f"learner.module.parts.0.{name}": tensor for name, tensor in by_random_words(state, 2).items()}


def flat(state):
    return {f"param_{number}": tensor for number, tensor in enumerate(state.values())}


def with_company(state):
    """A queue before, a projector and a momentum copy of both after a network under random words."""
    own = by_random_words(state, 3)
    draw = torch.Generator().manual_seed(9)

    def projector(prefix):
        sizes = {"0.weight": (512, 777), "0.bias": (512,), "2.weight": (128, 512), "2.bias": (128,)}
        return {f"{prefix}.{name}": torch.randn(size, generator=draw) for name, size in sizes.items()}

    copy = {f"zeta.{name}": tensor + 1 for name, tensor in own.items()}
    return {
        "queue": torch.randn(128, 4096, generator=draw),
        "queue_ptr": torch.zeros(1, dtype=torch.int64),
        **{f"alpha.{name}": tensor for name, tensor in own.items()},
        **projector("beta"),
        **copy,
        **projector("eta"),
    }


RENAMINGS = (by_position, by_random_words, under_a_deep_prefix, flat, with_company)


def outcome(arch, state, renamed, container="torch"):
    """What becomes of a file: "exact", "named" (refused, the network is among those named), "refused" or "wrong"."""
    try:
        found_arch, kwargs, found = recognise(contents(renamed, container=container))
    except OdcftError as error:
        return "named" if arch in re.findall(r"\w+", str(error)) else "refused"
    if found.coverage < 0.9:  # load_backbone refuses it
        return "named" if arch in re.findall(r"\w+", f"{found_arch} {found.nearest}") else "refused"
    exact = set(found.tensors) == set(state) and all(torch.equal(found.tensors[name], state[name]) for name in state)
    return "exact" if exact and shapes(found_arch, **kwargs).keys() == state.keys() else "wrong"


@pytest.mark.parametrize("rename", RENAMINGS)
@pytest.mark.parametrize("arch", QUICK)
def test_names_do_not_matter(arch, rename):
    state = random_weights(arch)
    assert outcome(arch, state, rename(state)) == "exact"


@pytest.mark.parametrize(("rename", "result"), [(by_position, "exact"), (flat, "exact"), (with_company, "named")])
def test_in_a_sorted_file_numbers_tell_the_order_or_it_is_refused(rename, result):
    state = random_weights("resnet18")
    assert outcome("resnet18", state, dict(sorted(rename(state).items())), "safetensors") == result


def test_a_note_says_that_names_were_unknown():
    state = random_weights("test_vit")
    notes = recognise(contents(by_random_words(state)))[2].notes
    assert "recognised by the shapes and order of its tensors, names unknown" in notes[0]
    assert "so it is that of test_vit" in notes[1]
    assert recognise(contents(state))[2].notes == []


# In a sorted file random words tell nothing (below), so only what keeps numbers is tried there.
CASES = [*((rename, "torch") for rename in RENAMINGS), (by_position, "safetensors"), (flat, "safetensors")]
PARTS = 10  # of the networks, for several test processes


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_network_of_timms_is_mistaken_for_another(part):
    """Prints a line for each network and case that is not exact (pytest -s)."""
    unnamed = []
    for arch in (*QUICK, *SLOW)[part::PARTS]:
        state = random_weights(arch)
        for rename, container in CASES:
            renamed = rename(state) if container == "torch" else dict(sorted(rename(state).items()))
            result = outcome(arch, state, renamed, container)
            if result != "exact":
                print(arch, rename.__name__, container, result)
            unnamed += [(arch, rename.__name__, container, result)] if result not in ("exact", "named") else []
    assert not unnamed


def test_the_networks_tried_are_of_many_families():
    families = {timm.get_pretrained_cfg(arch).architecture.split("_")[0] for arch in (*QUICK, *SLOW)}
    assert len((*QUICK, *SLOW)) >= 60
    assert len(families) >= 25


# ---------------------------------------------------------------- what else is found


def exact(state, found):
    return set(found.tensors) == set(state) and all(torch.equal(found.tensors[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [
        ("resnet18", {"in_chans": 2}),
        ("resnet18", {"small_stem": True}),
        ("test_vit", {"img_size": 96}),
        ("test_vit", {"img_size": 64, "in_chans": 1}),
        ("vit_tiny_patch16_224", {"img_size": 240}),  # not one of flexivit, nor the one for 384 pixels
    ],
)
def test_arguments_are_inferred_without_names_too(arch, kwargs):
    state = random_weights(arch, **kwargs)
    name, told, found = recognise(contents(by_random_words(state)))
    assert (name, told) == (arch, kwargs)
    assert exact(state, found)


def test_files_without_batch_counters_are_found():
    state = {name: t for name, t in random_weights("resnet18").items() if not name.endswith("num_batches_tracked")}
    name, _, found = recognise(contents(by_random_words(state)))
    assert name == "resnet18"
    assert exact(state, found)
    assert found.coverage == 1


def test_a_classifier_and_tokens_between_the_layers_are_left_out():
    state = random_weights("test_vit")
    words = by_random_words(state)
    tensors = list(words.items())
    middle = len(tensors) // 2
    place = next(
        n for n in range(middle, len(tensors)) if tensors[n][0].split(".")[1] != tensors[n - 1][0].split(".")[1]
    )
    between = {
        **dict(tensors[:1]),
        "mask": torch.ones(1, 64),
        **dict(tensors[1:place]),
        "head.a": torch.ones(10, 64),
        "head.b": torch.ones(10),
        **dict(tensors[place:]),
    }
    name, _, found = recognise(contents(between))
    assert name == "test_vit"
    assert exact(state, found)
    assert found.dropped == ["mask", "head.a", "head.b"]


def test_of_several_copies_the_path_tells_the_better():
    state = random_weights("test_vit")
    words = by_random_words(state)
    both = {
        **{f"student.{name}": tensor + 1 for name, tensor in words.items()},
        **{f"teacher.{name}": tensor for name, tensor in words.items()},
    }
    found = recognise(contents(both))[2]
    assert found.where == "teacher."
    assert exact(state, found)


def test_equal_networks_are_all_named():
    state = random_weights("efficientnet_lite0")
    with pytest.raises(OdcftError, match=r"efficientnet_lite0, tf_efficientnet_lite0\. Pass --arch"):
        recognise(contents(by_random_words(state)))


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "tf_efficientnet_lite0"])
def test_among_equal_networks_the_user_or_the_file_decides(arch):
    renamed = by_random_words(state := random_weights("efficientnet_lite0"))
    name, _, found = recognise(contents(renamed), arch)
    assert name == arch
    assert exact(state, found)
    assert recognise(contents(renamed, hints=[arch]))[0] == arch


def test_blurred_twins_of_a_plain_network_are_named_in_a_note():
    notes = recognise(contents(by_random_words(random_weights("resnet18"))))[2].notes
    assert "the same tensors also fit resnetblur18: if that is the right network, pass --arch NAME" in notes


@pytest.mark.parametrize(("rename", "result"), [(by_position, "exact"), (lambda state: state, "exact")])
def test_layers_in_chunks_are_found_in_a_sorted_file(rename, result):
    state = random_weights("test_vit")
    chunks = {re.sub(r"^blocks\.(\d)", lambda m: f"b.{int(m[1]) // 2}.{m[1]}", n): t for n, t in state.items()}
    assert outcome("test_vit", state, dict(sorted(rename(chunks).items())), "safetensors") == result
    assert outcome("test_vit", state, by_random_words(chunks)) == "exact"


# ---------------------------------------------------------------- wrong on purpose


def refusal(renamed, container="torch"):
    """The text of the refusal, or what was nearly found."""
    try:
        name, _, found = recognise(contents(renamed, container=container))
    except OdcftError as error:
        return str(error)
    assert found.coverage < 0.9, f"taken for {name}"
    return found.nearest


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize("rename", [by_position, by_random_words, flat])
@pytest.mark.parametrize("arch", ["resnet18", "test_vit"])
def test_a_tensor_too_few_is_refused_with_what_is_nearest(arch, rename):
    state = random_weights(arch)
    weights = [name for name, tensor in state.items() if tensor.ndim > 1]
    for lacking in (weights[3], list(state)[-2]):
        assert arch in refusal(rename(without(state, lacking)))


def test_a_shape_that_is_off_is_refused():
    state = random_weights("resnet18")
    state["layer3.0.conv2.weight"] = torch.ones(256, 255, 3, 3)
    told = refusal(by_random_words(state))
    assert "resnet18, which needs 1 other tensors, such as layer3" in told


def test_swapped_layers_of_different_shapes_are_refused():
    state = random_weights("resnet18")
    swapped = ("layer2.0.conv1", "layer2.0.conv2")
    names = [re.sub("|".join(swapped), lambda found: swapped[found[0] == swapped[0]], name) for name in state]
    told = refusal(by_random_words({name: state[name] for name in names}))
    assert "resnet18, with the same shapes in another order or grouping" in told


@pytest.mark.slow
@pytest.mark.parametrize("rename", [by_position, by_random_words, flat])
def test_a_deeper_network_is_not_taken_for_a_shallower(rename):
    for depth in (13, 14, 18):
        deeper = timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=0)
        assert "vit_tiny_patch16_224" in refusal(rename(deeper.state_dict()))
    layers = timm.models.resnet.BasicBlock, [2, 2, 2, 3]
    deeper = timm.models.resnet.ResNet(*layers, num_classes=0).state_dict()
    assert "resnet18" in refusal(rename(deeper))
    assert "resnet18" in refusal(
        rename({re.sub(r"layer(\d)\.(\d)", r"l\1b\2", name): tensor for name, tensor in deeper.items()})
    )


def test_a_negative_variance_shows_that_the_order_is_another():
    state = random_weights("resnet18")
    swapped = {
        name: state[name.replace("running_var", "running_mean")] if name.endswith("running_var") else state[name]
        for name in state
    }
    assert "resnet18" in refusal(by_random_words(swapped))


def test_a_sorted_file_whose_words_say_nothing_is_refused():
    renamed = dict(sorted(by_random_words(random_weights("resnet18")).items()))
    assert "nothing tells the order" in refusal(renamed, "safetensors")


@pytest.mark.slow
def test_other_kinds_of_networks_are_refused():
    sizes = (3, 64, 128, 256)
    unet = {}
    for depth, (here, there) in enumerate(pairwise(sizes)):
        for side, (a, b) in {"down": (here, there), "up": (2 * there, there)}.items():
            for number, (i, o) in enumerate(((a, b), (b, b))):
                unet[f"{side}.{depth}.{number}.weight"] = torch.ones(o, i, 3, 3)
                unet[f"{side}.{depth}.{number}.bias"] = torch.ones(o)
    layers = {"ln": (64,), "qkv": (192, 64), "proj": (64, 64), "up": (256, 64), "down": (64, 256)}
    language = {"wte": torch.ones(5000, 64), "wpe": torch.ones(128, 64)}
    for block in range(4):
        for name, shape in layers.items():
            language |= {f"h.{block}.{name}.w": torch.ones(shape), f"h.{block}.{name}.b": torch.ones(shape[0])}
    for other in (unet, language):
        for renamed, container in ((other, "torch"), (dict(sorted(other.items())), "safetensors")):
            told = refusal(renamed, container)
            assert re.search(r"No network comes close|come closest to \w+, which needs \d+ other tensors", told)
