"""Weights in several files are put together, and an index cannot lead out of its folder."""

import json

import pytest
import timm
import torch
from backbone_helpers import equal, resnet_state
from safetensors.torch import save_file

from odcft.backbone import weight_files
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write(folder, parts, names=SHARDS, index="model.safetensors.index.json", save=save_file):
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip(names, parts, strict=True):
        save(tensors, folder / name)
    places = {key: name for name, tensors in zip(names, parts, strict=True) for key in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (folder / "config.json").write_text('{"architecture": "test_resnet"}')
    return folder


@pytest.fixture
def halves():
    state = resnet_state()
    names = list(state)
    return [{name: state[name] for name in names[start::2]} for start in (0, 1)]


@pytest.mark.parametrize("pickled", [False, True])
def test_all_parts_are_read(pickled, tmp_path, halves):
    if pickled:
        names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
        write(tmp_path, halves, names, "pytorch_model.bin.index.json", torch.save)
    else:
        write(tmp_path, halves)
    loaded = load_backbone(tmp_path)
    assert loaded.match.coverage == 1
    assert equal(loaded.backbone, {**halves[0], **halves[1]})


def test_query_key_and_value_may_lie_in_different_parts(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    parts = [{}, {}]
    for number, (name, tensor) in enumerate(state.items()):
        parts[number % 2][name.replace("blocks.", "encoder.layer.").replace("norm.", "layernorm.", 1)] = tensor
    for part in parts:
        for name in [name for name in part if ".attn.qkv." in name]:
            pieces = part.pop(name).chunk(3)
            for place, (kind, piece) in enumerate(zip(("query", "key", "value"), pieces, strict=True)):
                parts[place % 2][name.replace("attn.qkv", f"attention.attention.{kind}")] = piece.clone()
    write(tmp_path, parts)
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    told = load_backbone(tmp_path, allow_partial=True).match.tensors
    assert torch.equal(told["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b"])
def test_an_index_names_files_of_its_own_folder_only(name, tmp_path, halves):
    folder = write(tmp_path / "f", halves)
    save_file(halves[0], tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(OdcftError, match="is not a file of this folder") as error:
        load_backbone(folder)
    assert "\n" not in str(error.value)


def test_a_part_that_links_out_of_the_folder_is_refused(tmp_path, halves):
    folder = write(tmp_path / "f", halves)
    (folder / SHARDS[0]).rename(tmp_path / "outside")
    (folder / SHARDS[0]).symlink_to(tmp_path / "outside")
    with pytest.raises(OdcftError, match="link to a file outside of the folder"):
        load_backbone(folder)


def test_the_hubs_cache_links_to_its_own_blobs(tmp_path, halves):
    folder = write(tmp_path / "models--a--b" / "snapshots" / "abc", halves)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, name in enumerate(SHARDS):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        (folder / name).rename(blob)
        (folder / name).symlink_to(blob)
    assert load_backbone(folder).match.coverage == 1


def test_a_missing_part_is_named(tmp_path, halves):
    folder = write(tmp_path, halves)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(OdcftError, match=f"{SHARDS[1]}.*does not exist. Copy or download it again"):
        load_backbone(folder)


def test_a_tensor_in_two_parts_is_refused(tmp_path, halves):
    halves[1]["conv1.0.weight"] = halves[0]["conv1.0.weight"].clone()
    with pytest.raises(OdcftError, match=r"holds 'conv1.0.weight', which another part"):
        load_backbone(write(tmp_path, halves))


@pytest.mark.parametrize("places", [None, [], {}, {"x": 3}, "x"])
def test_a_damaged_index_is_refused(places, tmp_path, halves):
    folder = write(tmp_path, halves)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(OdcftError, match="is damaged: it has no weight_map"):
        load_backbone(folder)


def test_an_index_of_thousands_of_files_is_refused(tmp_path, halves):
    folder = write(tmp_path, halves)
    places = {str(number): str(number) for number in range(weight_files.MAX_PARTS + 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(OdcftError, match="lists 1,001 files"):
        load_backbone(folder)
