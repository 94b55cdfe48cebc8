"""Parquet files of encoded images: which column, which rows, which labels; and damaged files."""

import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odcft.data.duplicates import identical_files
from odcft.data.sources import find_images
from odcft.data.stores import parquet, tables
from odcft.errors import OdcftError

CONTENTS = [f"image {i}".encode() for i in range(10)]


def structs(contents=CONTENTS):
    return pa.array([{"bytes": one, "path": f"{i}.jpg"} for i, one in enumerate(contents)])


def features(**named):
    about = {"info": {"features": named}}
    return {b"huggingface": json.dumps(about).encode()}


def write(path, metadata=None, /, row_group_size=3, **columns):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize(
    "column",
    [structs(), pa.array(CONTENTS), pa.array(CONTENTS, pa.large_binary()), pa.array(CONTENTS, pa.binary(7))][:3],
)
def test_rows_keep_their_order_in_every_type(tmp_path, column):
    images = find_images(write(tmp_path / "x.parquet", image=column, other=list(range(10))))
    assert images.names == [f"x.parquet/{i}" for i in range(10)]
    draw = np.random.default_rng(0).permutation(30) % 10
    assert [images.read(i) for i in draw] == [CONTENTS[i] for i in draw]
    rest = images.without({0, 5})
    assert [rest.read(i) for i in range(8)] == [CONTENTS[i] for i in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert rest.without({0}).read(0) == CONTENTS[2]
    assert images.sizes() is None


def test_several_files_are_one_set_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.parquet", image=pa.array(CONTENTS[4:]))
    write(tmp_path / "a.parquet", image=pa.array(CONTENTS[:4]))
    (tmp_path / "README.md").touch()
    for data in (tmp_path, str(tmp_path / "*.parquet")):
        images = find_images(data)
        assert [images.read(i) for i in range(10)] == CONTENTS
        assert images.names[3:5] == ["a.parquet/3", "b.parquet/0"]
    assert find_images(tmp_path).skipped == {".md": 1}
    assert identical_files(images) == []


CLASS = {"_type": "ClassLabel", "names": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("labels", "metadata", "expected"),
    [
        ({"label": [0, 1, None, -1, 7]}, features(label=CLASS), ["cat", "dog", "", "", ""]),
        ({"label": [0, 1, None, -1, 7]}, None, ["0", "1", "", "-1", "7"]),
        ({"Class": ["a", " b", None, "", "e"]}, None, ["a", "b", "", "", "e"]),
        ({"labels": [[0, 1], [1], [], None, [0]]}, features(labels=[CLASS]), ["cat;dog", "dog", "", "", "cat"]),
        ({"kind": [0, 1, 0, 1, 0]}, features(kind=CLASS), ["cat", "dog", "cat", "dog", "cat"]),
        ({"other": [0, 1, 0, 1, 0]}, None, [""] * 5),
    ],
)
def test_labels_come_from_a_column_and_its_classes(tmp_path, labels, metadata, expected):
    images = find_images(write(tmp_path / "x.parquet", metadata, image=structs(CONTENTS[:5]), **labels))
    assert images.class_labels() == expected
    assert images.without({0}).class_labels() == expected[1:]


def test_labels_that_are_unclear_are_refused_only_when_they_are_needed(tmp_path):
    two = {"fine": [0, 1], "coarse": [1, 0]}
    path = write(tmp_path / "x.parquet", features(fine=CLASS, coarse=CLASS), image=structs(CONTENTS[:2]), **two)
    images = find_images(path)
    with pytest.raises(OdcftError, match=r"several columns of labels: fine, coarse\. Name the right one `label`"):
        images.class_labels()
    images = find_images(write(tmp_path / "y.parquet", image=structs(CONTENTS[:1]), label=[{"a": 1}]))
    with pytest.raises(OdcftError, match="a label is dict, not a number or a name"):
        images.class_labels()


def test_the_image_column_is_chosen_by_type_and_name(tmp_path):
    data, other = pa.array(CONTENTS[:2]), pa.array([b"a", b"b"])
    assert find_images(write(tmp_path / "1.parquet", image=["a", "b"], x=data)).read(1) == CONTENTS[1]
    assert find_images(write(tmp_path / "2.parquet", mask=other, Image=data)).read(1) == CONTENTS[1]
    described = features(photo={"_type": "Image"}, mask={"_type": "Value"})
    assert find_images(write(tmp_path / "3.parquet", described, mask=other, photo=data)).read(1) == CONTENTS[1]
    with pytest.raises(OdcftError, match=r"several columns that may be the images: left, right\. Name the right"):
        find_images(write(tmp_path / "4.parquet", left=other, right=data))
    with pytest.raises(OdcftError, match=r"no column of encoded images; its columns are: path \(string\), n \(int64\)"):
        find_images(write(tmp_path / "5.parquet", path=["a"], n=[1]))


def test_rows_without_bytes_are_unreadable(tmp_path):
    rows = pa.array([{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "/etc/passwd"}, None])
    images = find_images(write(tmp_path / "x.parquet", image=rows))
    assert images.read(0) == b"x"
    for row, message in ((1, r"no bytes, only a path \(/etc/passwd\)"), (2, "no bytes")):
        with pytest.raises(OdcftError, match=message):
            images.read(row)


def test_files_that_do_not_match_are_refused(tmp_path):
    write(tmp_path / "a.parquet", image=pa.array(CONTENTS))
    write(tmp_path / "b.parquet", picture=pa.array(CONTENTS))
    with pytest.raises(OdcftError, match=r"b\.parquet does not match a\.parquet"):
        find_images(tmp_path)


def test_splits_are_not_mixed(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002-abc", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.parquet", image=pa.array(CONTENTS))
    with pytest.raises(
        OdcftError, match=r"several splits: test, train\. Give one of them, for example '.*/data/train-\*'"
    ):
        find_images(tmp_path)
    assert len(find_images(str(tmp_path / "data/train-*"))) == 20


def test_few_row_groups_are_kept(tmp_path, monkeypatch):
    images = find_images(write(tmp_path / "x.parquet", image=pa.array(CONTENTS), row_group_size=2))
    asked = []
    monkeypatch.setattr(images.store, "read_chunk", lambda *a: asked.append(a[1]) or parquet.read_row_group(*a))
    monkeypatch.setattr(tables, "KEPT_BYTES", 60)
    for row in (0, 1, 2, 3, 0, 1, 4, 5, 8, 9, 0):
        assert images.read(row) == CONTENTS[row]
    assert asked == [0, 1, 2, 4, 0]


def test_an_empty_file_holds_no_images(tmp_path):
    with pytest.raises(OdcftError, match="is empty"):
        find_images(write(tmp_path / "x.parquet", image=pa.array([], pa.binary())))


def test_damaged_files_never_show_a_traceback(tmp_path):
    whole = write(tmp_path / "x.parquet", features(label=CLASS), image=structs(), label=[0, 1] * 5).read_bytes()
    draw, refused = np.random.default_rng(0), []
    for trial in range(150):
        content = bytearray(whole if trial % 4 else whole[: draw.integers(len(whole))])
        for position in draw.integers(0, max(1, len(content)), 2):
            if content:
                content[position] ^= 1 << draw.integers(8)
        path = tmp_path / f"{trial}.parquet"
        path.write_bytes(content)
        try:
            images = find_images(path)
            for row in range(len(images)):
                with suppress(OdcftError):
                    images.read(row)
            images.class_labels()
        except OdcftError as error:
            refused.append(str(error))
    assert len(refused) > 40
    assert "\n" not in "".join(refused)


def test_more_rows_than_bytes_are_refused(tmp_path):
    path = write(tmp_path / "x.parquet", image=pa.array([None] * 1_000_000, pa.binary()), row_group_size=1_000_000)
    with pytest.raises(OdcftError, match="is damaged: it claims 1,000,000 rows in"):
        find_images(path)


def test_one_value_repeated_by_reference_is_not_expanded_beyond_reason(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from odcft.data.stores import parquet

    pq.write_table(pa.table({"image": [b"x" * 100_000] * 300}), tmp_path / "x.parquet", use_dictionary=True)
    assert (tmp_path / "x.parquet").stat().st_size < 200_000
    monkeypatch.setattr(parquet, "MAX_BYTES", 1_000_000)
    images = find_images(tmp_path / "x.parquet")
    with pytest.raises(OdcftError, match="a row group of more than 500,000 bytes"):
        images.read(0)
