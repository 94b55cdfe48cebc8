"""Folders that `datasets` saves: written here as it writes them, without it."""

import json

import numpy as np
import pyarrow as pa
import pytest

from odcft.data.sources import find_images
from odcft.data.stores import arrow_datasets
from odcft.errors import OdcftError

CONTENTS = [f"image {i}".encode() for i in range(10)]


def save(folder, contents=CONTENTS, labels=(), files=2, batch=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    table = pa.table({"image": [{"bytes": one, "path": None} for one in contents], "label": list(labels) or [0] * 10})
    for i, name in enumerate(names):
        part = table.slice(i * len(contents) // files, len(contents) // files)
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(part, max_chunksize=batch)
    label = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}, "label": label}}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_a_saved_dataset_is_read_in_its_order(tmp_path):
    images = find_images(save(tmp_path / "set", labels=[0, 1] * 5))
    assert images.names == [f"data-0000{f}-of-00002.arrow/{i}" for f in range(2) for i in range(5)]
    assert [images.read(i) for i in (9, 0, 5, 4, 3)] == [CONTENTS[i] for i in (9, 0, 5, 4, 3)]
    assert images.class_labels() == ["cat", "dog"] * 5
    assert images.without({0}).read(0) == CONTENTS[1]


def test_of_several_splits_one_must_be_given(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / "set" / split)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(OdcftError, match=r"with the splits train, test\. Give one of them, for example .*/set/train\."):
        find_images(tmp_path / "set")
    assert len(find_images(tmp_path / "set" / "train")) == 10
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(find_images(tmp_path / "set")) == 10


STATES = {
    "not JSON": "x",
    "no files": "{}",
    "none": '{"_data_files": []}',
    "outside": '{"_data_files": [{"filename": "../x.arrow"}]}',
    "absolute": '{"_data_files": [{"filename": "/etc/passwd"}]}',
    "not there": '{"_data_files": [{"filename": "x.arrow"}]}',
    "not a name": '{"_data_files": [{"filename": 7}, 8]}',
    "indices": '{"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_indices_data_files": [{}]}',
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_is_not_right_is_refused(tmp_path, case):
    save(tmp_path)
    (tmp_path / "state.json").write_text(STATES[case])
    with pytest.raises(OdcftError) as told:
        find_images(tmp_path)
    assert "\n" not in str(told.value)


def test_a_dataset_dict_that_is_not_right_is_refused(tmp_path):
    for content in ("[]", "{}", '{"splits": 3}', '{"splits": ["../x", "nowhere", 4]}'):
        (tmp_path / "dataset_dict.json").write_text(content)
        with pytest.raises(OdcftError, match=r"no split that is there|not a JSON object"):
            find_images(tmp_path)


def test_damaged_streams_never_show_a_traceback(tmp_path):
    save(tmp_path, files=1)
    path, draw, refused = tmp_path / "data-00000-of-00001.arrow", np.random.default_rng(0), []
    whole = path.read_bytes()
    for trial in range(100):
        content = bytearray(whole if trial % 4 else whole[: draw.integers(len(whole))])
        for position in draw.integers(0, max(1, len(content)), 2):
            if content:
                content[position] ^= 1 << draw.integers(8)
        path.unlink()  # streams that are mapped must not change
        path.write_bytes(content)
        arrow_datasets._batches.cache_clear()
        try:
            images = find_images(tmp_path)
            for row in range(len(images)):
                images.read(row)
        except OdcftError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert "\n" not in "".join(refused)
