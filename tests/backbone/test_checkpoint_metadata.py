"""Whatever a file says about itself, it loads as a backbone or is refused in one sentence; nothing in it runs."""

import json
import math
import os
import pickle  # noqa: TID251 - to write what others wrote
import subprocess
from functools import cache

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from odcft.backbone.checkpoint_metadata import Arguments, check_arguments, from_preprocessor_config, parse_arguments
from odcft.backbone.inspection import describe
from odcft.backbone.load import load_backbone
from odcft.backbone.non_timm_networks import NETWORKS, count_elements
from odcft.errors import OdcftError
from odcft.recipe import load_recipe, make_recipe, parse_yaml

WORDS = {
    "architecture": "test_resnet",
    "model_args": {"in_chans": 3},
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "input_size": [3, 64, 64], "crop_pct": 0.9},
    "odcft": {"input": {"color": "rgb", "size": 64, "mean": [0.5] * 3, "std": [0.2] * 3, "channels": 3}},
    "num_classes": 10,
}


@cache
def state():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0).state_dict()


def folder_of(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.safetensors").exists():
        save_file(state(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answer(ckpt, **asked):
    """Load a checkpoint: a backbone that works and can be described, or a refusal of one line."""
    loaded = refusal = None
    try:
        loaded = load_backbone(ckpt, **asked)
    except OdcftError as error:
        refusal = str(error)
    if loaded is None:
        assert "\n" not in refusal
        assert len(refusal) < 1500
        return refusal
    backbone = loaded.backbone
    values, drawing = describe(loaded)
    json.dumps(values)
    assert not any("\n" in line or "\x1b" in line for line in drawing.lines())
    assert backbone.input.channels in (1, 2, 3, 4)
    assert 8 <= backbone.size <= 4096
    assert all(map(math.isfinite, (*backbone.input.mean, *backbone.input.std)))
    assert min(backbone.input.std) > 0
    side = backbone.size if backbone.fixed_size else min(64, backbone.size)
    with torch.no_grad():
        assert torch.isfinite(backbone(torch.rand(1, 3, side, side))).all()
    return loaded


# ---------------------------------------------------------------- hostile metadata

HOSTILE_ARGS = {
    "checkpoint_path": "evil.pth",
    "pretrained": True,
    "pretrained_cfg": {"file": "evil.pth", "custom_load": True},
    "pretrained_cfg_overlay": {"file": "evil.pth"},
    "cache_dir": "/tmp",
    "scriptable": True,
    "features_only": True,
    "pruned": True,
    "block": "os.system",
    "norm_layer": "evil",
    "num_classes": 10**9,
    "in_chans": 10**9,
    "img_size": 10**9,
    "embed_dim": [10**9],
    "drop_rate": float("nan"),
    "global_pool": "",
    "kernel_size": {"a": 1},
    "\x1b[2J\n": 1,
    "last_stride": 3,
    "small_stem": "yes",
    "output_stride": 7,
    "base_width": 10**6,
}


class Touches:
    def __reduce__(self):
        return subprocess.check_call, (["touch", "HACKED"],)


@pytest.mark.parametrize("place", ["folder", "safetensors", "pretext", "torchvision"])
@pytest.mark.parametrize("name", HOSTILE_ARGS)
def test_an_argument_that_is_not_allowed_is_ignored_and_named(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Touches()))
    args, shown = {name: HOSTILE_ARGS[name]}, {**WORDS["odcft"]["input"]}
    if place == "folder":
        path = folder_of(tmp_path / "c", {**WORDS, "model_args": args})
    elif place == "safetensors":
        path = tmp_path / "c.safetensors"
        told = {"architecture": "test_resnet", "arch_args": json.dumps(args), "input": json.dumps(shown)}
        save_file(state(), path, metadata=told)
    elif place == "torchvision":
        path, tensors = tmp_path / "c.pth", state().copy()
        told = {"architecture": "test_resnet", "arch_args": json.dumps(args), "input": json.dumps(shown)}
        tensors._metadata = {"odcft": told}
        torch.save(tensors, path)
    else:
        path = tmp_path / "c.pth"
        told = {"arch": "test_resnet", "arch_args": args, "input": "rgb", "size": 64, "mean": [0.5] * 3}
        torch.save({**told, "std": [0.2] * 3, "state_dict": state()}, path)
    loaded = load_backbone(path)
    assert not (tmp_path / "HACKED").exists()
    assert loaded.backbone.arch_args == {}
    assert all(torch.equal(loaded.backbone.net.state_dict()[key], tensor) for key, tensor in state().items())
    if name == "num_classes":  # every timm folder has it, and a backbone no classes
        assert not loaded.notes
    else:
        (note,) = loaded.notes
        assert "ignored in the file" in note
        assert (name if name.isprintable() else "x1b") in note
        assert note.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/resnet18.a1_in1k",
        "hf_hub:timm/resnet18",
        "local-dir:/etc",
        "resnet18.no_such_tag",
        "resnet18.a/../../etc",
        "../../etc/passwd",
        "nosuch",
        "",
        "\x1b[2J",
        "r" * 100_000,
        3,
        None,
        ["test_resnet"],
        {"a": 1},
    ],
)
def test_an_unknown_architecture_is_not_searched_for(name, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the network was asked"))
    result = answer(folder_of(tmp_path / "c", {**WORDS, "architecture": name}))
    if name == "resnet18.no_such_tag":
        assert "resnet18" in result  # that network is known, and these are not its tensors
    else:
        assert result.backbone.arch == "test_resnet"
    hint = tmp_path / "hint.pth"
    torch.save({"arch": name, "model": name, "state_dict": state()}, hint)
    assert answer(hint).backbone.arch == "test_resnet"


WRONG_INPUTS = [
    {"std": [0, 0, 0]},
    {"std": [0.2, 0.2, 1e-300]},
    {"std": [0.2, 0.2, float("nan")]},
    {"mean": [float("inf"), 0, 0]},
    {"mean": "black"},
    {"mean": [0.5]},
    {"mean": [0.5] * 1000},
    {"size": 0},
    {"size": 7},
    {"size": 10**9},
    {"size": "64"},
    {"size": True},
    {"color": "infrared"},
    {"color": "gray"},
    {"color": None},
    {"channels": 0},
    {"channels": 10**9},
    {"channels": 4},
    {"range": [0, 0]},
    {"range": [0, float("nan")]},
    {"range": 255},
    {"crop_fraction": 0},
    {"crop_fraction": 1.5},
    {"interpolation": "psychic"},
    {"intensity": [3, 3]},
    {"intensity": [0, float("inf")]},
    {"intensity": [5, 1]},
]


@pytest.mark.parametrize("wrong", WRONG_INPUTS, ids=str)
def test_an_impossible_input_is_ignored_and_named(wrong, tmp_path):
    shown = {**WORDS["odcft"]["input"], **wrong}
    loaded = answer(folder_of(tmp_path / "c", {**WORDS, "odcft": {"input": shown}}))
    assert "ignored in the file" in loaded.notes[0]
    assert next(iter(wrong)) in loaded.notes[0] or wrong == {"color": "gray"}  # one number each, there
    assert loaded.backbone.input.mean == (0.5, 0.5, 0.5)  # timm's words stand


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mean": [0.5]}, "mean"),
        ({"mean": [0.5], "std": [0.2]}, "mean"),
        ({"std": [0, 0, 0]}, "std"),
        ({"std": None}, "std"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": "all"}, "crop_pct"),
        ({"interpolation": "random"}, "interpolation"),
        ({"input_size": [3, 64, 32]}, "input_size"),
        ({"input_size": [3, 10**9, 10**9]}, "input_size"),
        ({"input_size": 64}, "input_size"),
    ],
    ids=str,
)
def test_impossible_fields_of_timms_cfg_are_ignored_and_named(wrong, named, tmp_path):
    config = {"architecture": "test_resnet", "pretrained_cfg": {**WORDS["pretrained_cfg"], **wrong}}
    loaded = answer(folder_of(tmp_path / "c", config))
    assert named in loaded.notes[0]


def test_valid_metadata_is_followed(tmp_path):
    loaded = answer(folder_of(tmp_path / "c", WORDS))
    assert not loaded.notes
    assert (loaded.backbone.input.mean, loaded.backbone.size) == ((0.5, 0.5, 0.5), 64)
    own = answer(folder_of(tmp_path / "c", {key: value for key, value in WORDS.items() if key != "odcft"}))
    assert (own.backbone.input.mean, own.backbone.size, own.backbone.input.crop_fraction) == ((0.5,) * 3, 64, 0.9)


def test_a_size_that_the_network_does_not_take_is_ignored(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    net = timm.create_model("test_vit", num_classes=0)
    save_file(net.state_dict(), folder / "model.safetensors")
    shown = {**WORDS["odcft"]["input"], "size": 96}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "odcft": {"input": shown}}))
    loaded = answer(folder)
    assert loaded.backbone.size == 160
    assert "input.size=96" in loaded.notes[0]


def test_no_network_is_built_that_the_file_cannot_fill(tmp_path):
    torch.save({"arch": "vit_giant_patch14_224", "state_dict": {"cls_token": torch.zeros(1, 1, 1408)}}, tmp_path / "c")
    assert "too few" in answer(tmp_path / "c", arch="vit_giant_patch14_224", allow_partial=True)
    config = {"architecture": "test_vit", "model_args": {"embed_dim": 16384, "depth": 128, "num_heads": 1}}
    assert "fits no backbone" in answer(folder_of(tmp_path / "folder", config))
    assert count_elements("test_resnet") == sum(tensor.numel() for tensor in state().values())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "null", "", "{", "\ud800"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_config_that_is_not_a_json_object_gets_one_sentence(file, text, tmp_path):
    folder = folder_of(tmp_path / "c", {})
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "is damaged: it is not a JSON object" in answer(folder)


def test_a_config_of_many_megabytes_is_not_read(tmp_path):
    folder = folder_of(tmp_path / "c", {})
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    assert "too large for a description" in answer(folder)


# ---------------------------------------------------------------- random metadata

NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12),
    st.sampled_from([0, 1, 2, 3, 8, 16, 64, 224, 2**31, 2**63, 10**30]),
    st.floats(),
    st.sampled_from([0.5, 1e-300, 1e300]),
)
NAMES = st.sampled_from(
    [
        *Arguments.model_fields,
        *("mean", "std", "size", "color", "channels", "range", "crop_fraction", "interpolation", "intensity"),
        *(
            "input_size",
            "crop_pct",
            "input",
            "architecture",
            "model_args",
            "pretrained_cfg",
            "odcft",
            "checkpoint_path",
        ),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["test_resnet", "test_vit", "resnet18", "alexnet", "rgb", "gray", "bicubic", "hf-hub:a/b", "avg"]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, TEXTS), inner, max_size=4)),
    max_leaves=8,
)
FIELDS = st.dictionaries(NAMES, JSON, max_size=5)
INPUTS = st.builds(lambda told, odd: {**told, **odd}, st.just(WORDS["odcft"]["input"]), FIELDS)
ARCHS = st.one_of(st.just("test_resnet"), JSON)
# The same ones every time, so that a red test stays red; ODCFT_EXAMPLES=500 tries more of them.
FUZZ = settings(
    max_examples=int(os.environ.get("ODCFT_EXAMPLES", "12")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@FUZZ
@given(ARCHS, st.one_of(FIELDS, JSON), st.one_of(FIELDS, JSON), st.one_of(INPUTS, JSON), JSON)
def test_any_config_of_a_folder_is_answered(tmp_path_factory, arch, args, cfg, shown, rest):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    config = {"architecture": arch, "model_args": args, "pretrained_cfg": cfg, "num_classes": rest}
    answer(folder_of(folder, {**config, "odcft": {"input": shown}}))


@FUZZ
@given(JSON)
def test_any_json_as_a_config_is_answered(tmp_path_factory, config):
    answer(folder_of(tmp_path_factory.getbasetemp() / "fuzz", config))


@FUZZ
@given(JSON, JSON)
def test_any_preprocessor_is_answered(tmp_path_factory, mean, std):
    folder = folder_of(tmp_path_factory.getbasetemp() / "transformers", {"model_type": "resnet"})
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    answer(folder)


@pytest.mark.parametrize(
    ("config", "cfg"),
    [
        ({"size": 224}, {"input_size": [3, 224, 224], "crop_pct": 1.0}),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, {"input_size": [3, 224, 224], "crop_pct": 0.875}),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.95, "resample": 3},
            {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"},
        ),
        (
            {"size": {"height": 96, "width": 96}, "do_center_crop": False, "crop_size": 32},
            {"input_size": [3, 96, 96], "crop_pct": 1.0},
        ),
        ({"size": 224, "do_resize": False}, {}),
        ({"do_normalize": False}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        (
            {"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False},
            {"mean": [0.5] * 3, "std": [0.2] * 3},
        ),
        (
            {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ),
    ],
)
def test_what_a_preprocessor_says_in_timms_words(config, cfg):
    assert from_preprocessor_config(config).cfg.keys() == cfg.keys()
    for name, value in from_preprocessor_config(config).cfg.items():
        assert value == (pytest.approx(cfg[name]) if name in ("mean", "std") else cfg[name])


@FUZZ
@given(JSON, JSON, JSON, JSON)
def test_any_view_in_a_preprocessor_is_answered(size, crop, factor, resample):
    told = {"size": size, "crop_size": crop, "rescale_factor": factor, "resample": resample, "crop_pct": size}
    from_preprocessor_config({**told, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})


@FUZZ
@given(
    st.one_of(st.just("test_resnet"), st.text(max_size=20)),
    st.one_of(FIELDS, JSON).map(json.dumps) | st.text(),
    st.one_of(INPUTS, JSON).map(json.dumps) | st.text(),
)
def test_any_metadata_of_a_safetensors_file_is_answered(tmp_path_factory, arch, args, shown):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file(state(), path, metadata={"architecture": arch, "arch_args": args, "input": shown})
    answer(path)


@FUZZ
@given(ARCHS, JSON, st.one_of(st.sampled_from(["rgb", "gray", "lab_l"]), TEXTS), JSON, JSON, JSON)
def test_any_metadata_of_a_pretext_checkpoint_is_answered(tmp_path_factory, arch, args, color, size, mean, std):
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    told = {"arch": arch, "arch_args": args, "input": color, "size": size, "mean": mean, "std": std}
    torch.save({**told, "state_dict": state()}, path)
    answer(path)


@FUZZ
@given(st.dictionaries(st.sampled_from(["arch", "model", "backbone", "architecture", "meta", "args"]), JSON))
def test_any_hints_are_answered(tmp_path_factory, hints):
    path = tmp_path_factory.getbasetemp() / "hints.pth"
    torch.save({**hints, "state_dict": state()}, path)
    answer(path)


# ---------------------------------------------------------------- the user's --arch-args


def test_arguments_are_read_and_used(tmp_path):
    assert parse_arguments("patch_size=8, img_size=64") == {"patch_size": 8, "img_size": 64}
    assert parse_arguments("depths=[1,2],small_stem=true") == {"depths": [1, 2], "small_stem": True}
    assert parse_arguments("img_size=[64,64]") == {"img_size": 64}
    backbone = load_backbone(
        "scratch:vit_tiny_patch16_224", arch_args=parse_arguments("patch_size=8,img_size=64")
    ).backbone
    assert backbone.net.patch_embed.proj.weight.shape[-1] == 8
    assert backbone.size == 64
    small = load_backbone("scratch:resnet18", arch_args={"small_stem": True}).backbone
    assert small.net.conv1.weight.shape[-1] == 3
    # What no guess finds out: the number of heads changes no tensor.
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "c.pth")
    six = load_backbone(tmp_path / "c.pth", "vit_tiny_patch16_224", arch_args={"num_heads": 6}).backbone
    assert six.net.blocks[0].attn.num_heads == 6
    assert load_backbone(tmp_path / "c.pth", arch_args={"num_heads": 6}).backbone.arch_args == {"num_heads": 6}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patch_sise=8", "patch_sise: no such argument. Did you mean patch_size?"),
        ("checkpoint_path=x.pth", "checkpoint_path: no such argument"),
        ("patch_size", "write name=value"),
        ("=8", "write name=value"),
        ("patch_size=", "patch_size"),
        ("patch_size=large", "patch_size='large' should be a valid integer"),
        ("patch_size=0", "patch_size=0 should be greater than or equal to 1"),
        ("img_size=[64,32]", "square images"),
        ("drop_rate=.nan", "drop_rate=nan"),
        ("patch_size=" + "[" * 5000, "not valid YAML"),
    ],
)
def test_impossible_arguments_are_refused_by_name(text, said):
    with pytest.raises(OdcftError) as refusal:
        parse_arguments(text)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ckpt", "args"),
    [
        ("scratch:resnet18", {"patch_size": 8}),
        ("scratch:vit_tiny_patch16_224", {"small_stem": True}),
        ("scratch:vit_tiny_patch16_224", {"last_stride": 1}),
        ("scratch:resnet18d", {"small_stem": True}),
        ("scratch:alexnet_deepcluster", {"patch_size": 8}),
        ("scratch:vit_tiny_patch16_224", {"num_heads": 5}),
        ("torchvision:resnet18", {"small_stem": True}),
    ],
)
def test_a_network_that_does_not_take_an_argument_says_so(ckpt, args):
    with pytest.raises(OdcftError) as refusal:
        load_backbone(ckpt, arch_args=args)
    assert next(iter(args)) in str(refusal.value) or "channels" in str(refusal.value)


def test_every_argument_has_a_bound():
    for name in Arguments.model_fields:
        for value in (10**9, -(10**9), [10**9], "x" * 1000, float("nan"), None):
            with pytest.raises(OdcftError):
                check_arguments({name: value})


@pytest.mark.parametrize("arch", NETWORKS)
def test_our_own_networks_take_their_channels_and_nothing_else(arch):
    assert load_backbone(f"scratch:{arch}", arch_args={"in_chans": NETWORKS[arch][1].channels}).backbone.arch
    with pytest.raises(OdcftError, match="takes no last_stride"):
        load_backbone(f"scratch:{arch}", arch_args={"last_stride": 1})


# ---------------------------------------------------------------- recipes

BOMBS = {
    "anchors": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "an anchor inside itself": "a: &a [*a]",
    "brackets": "[" * 5000,
    "braces": "{a: " * 5000,
    "dashes": "- " * 5000,
    "a number of 5,000 digits": "a: " + "9" * 5000,
    "minutes": "a: " + "1:" * 100_000 + "1",
    "a day that is none": "a: 2001-13-41",
    "a number that is none": "a: !!int x",
    "code": "a: !!python/object/apply:os.system ['touch HACKED']",
    "a control character": "a: \x00",
    "a long word": "a: " + "x" * 100_000,
    "two megabytes": "# " + "x" * 2_000_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_recipe_that_asks_for_endless_work_gets_one_sentence(bomb, tmp_path):
    for call in (
        lambda: parse_yaml(BOMBS[bomb], "here"),
        lambda: load_recipe("small", [f"optim.lr={BOMBS[bomb]}"]),
        lambda: load_recipe(tmp_path / "r.yaml"),
    ):
        (tmp_path / "r.yaml").write_text(BOMBS[bomb])
        with pytest.raises(OdcftError) as refusal:
            call()
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 500


@FUZZ
@given(JSON)
def test_any_recipe_is_answered(fields):
    refusals = []
    for asked in (fields, *({group: fields} for group in ("data", "backbone", "optim", "augment", "codc"))):
        try:
            make_recipe(asked)
        except OdcftError as error:
            refusals.append(str(error))
    assert not any("\n" in refusal or len(refusal) > 1000 for refusal in refusals)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("field", ["optim.lr", "augment.brightness", "augment.crop_ratio", "data.mean", "data.std"])
def test_a_setting_that_is_not_finite_is_refused(field, value):
    whole = f"[{value}, {value}]" if "crop_ratio" in field else f"[{value}]" if field.startswith("data.") else value
    with pytest.raises(OdcftError, match="is not valid: "):
        load_recipe("small", [f"{field}={whole}"])


@pytest.mark.parametrize("text", ["optim: 3", "optim:", "optim: [1]"])
def test_a_group_that_is_not_a_mapping_is_refused_even_with_a_setting_in_it(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    for settings_given in ([], ["optim.lr=0.1"]):
        with pytest.raises(OdcftError, match="optim"):
            load_recipe(tmp_path / "r.yaml", settings_given)
