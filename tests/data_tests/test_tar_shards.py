"""Tar shards are read in place; whatever is in them, nothing is unpacked, and what is not read is counted."""

import io
import os
import struct
import tarfile

import numpy as np
import pytest

from odcft.data.duplicates import identical_files
from odcft.data.sources import find_images
from odcft.errors import OdcftError


def add(tar, name, content=b"x", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)


@pytest.fixture
def shards(tmp_path):
    """Two shards of three samples each."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as tar:
            for i in (2, 0, 1):
                add(tar, f"./{i}.jpg", f"{shard}{i}".encode() * 9)
                add(tar, f"./{i}.cls", b" 7\n" if i else b"cat")
                add(tar, f"./{i}.json", b"{}")
    return tmp_path


def test_samples_are_sorted_and_have_labels(shards):
    images = find_images(shards)
    assert images.names == [f"{shard:03d}.tar/{i}.jpg" for shard in range(2) for i in range(3)]
    assert [images.read(i) for i in range(6)] == [f"{shard}{i}".encode() * 9 for shard in range(2) for i in range(3)]
    assert images.class_labels() == ["cat", "7", "7"] * 2
    assert images.skipped == {".json": 6}
    assert images.sizes().tolist() == [18] * 6
    rest = images.without({0, 4})
    assert rest.names == [images.names[i] for i in (1, 2, 3, 5)]
    assert [rest.read(i) for i in range(4)] == [images.read(i) for i in (1, 2, 3, 5)]
    assert rest.class_labels() == ["7", "7", "cat", "7"]


def test_one_shard_or_a_pattern(shards):
    assert find_images(shards / "001.tar").names == [f"001.tar/{i}.jpg" for i in range(3)]
    assert find_images(str(shards / "00*.tar")).names == find_images(shards).names
    (shards / "deep").mkdir()
    (shards / "001.tar").rename(shards / "deep/001.tar")
    assert find_images(shards).names[3] == "deep/001.tar/0.jpg"
    assert find_images(str(shards / "**/*.tar")).names == find_images(shards).names
    with pytest.raises(OdcftError, match="does not exist, and matches nothing"):
        find_images(str(shards / "*.zip"))


def test_without_labels_folders_inside_the_archive_are_classes(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "set/b/1.png")
        add(tar, "set/a/1.png")
    assert find_images(tmp_path / "x.tar").class_labels() == ["set/a", "set/b"]


def test_copies_are_found_across_shards(shards):
    with tarfile.open(shards / "002.tar", "w") as tar:
        add(tar, "again.jpg", b"12" * 9)
    assert identical_files(find_images(shards)) == [[5, 6]]


def test_what_is_not_a_plain_file_is_counted(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "good.jpg")
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(tar, "device.jpg", b"", type=tarfile.CHRTYPE)
        add(tar, "pipe.jpg", b"", type=tarfile.FIFOTYPE)
        add(tar, "../outside.jpg")
        add(tar, "a/../../outside.jpg")
        add(tar, "/absolute.jpg", b"y")
        add(tar, "._good.jpg")
        add(tar, ".hidden/x.jpg")
        add(tar, "good.jpg", b"later")
        add(tar, "clip.mp4")
        add(tar, "README")
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, "n" * 300 + ".jpg", b"long")
        add(tar, "caf\udce9.jpg", b"bytes")
    images = find_images(tmp_path / "x.tar")
    assert images.names == [f"x.tar/{n}.jpg" for n in ("absolute", "caf\udce9", "good", "n" * 300)]
    assert [images.read(i) for i in range(4)] == [b"y", b"bytes", b"later", b"long"]
    assert images.skipped == {
        "link in an archive": 2,
        "device in an archive": 2,
        "member with a name that leads outside": 2,
        "hidden image": 2,
        "image that a later one of the same name replaces": 1,
        ".mp4": 1,
        "file without an extension": 1,
    }
    assert "2 links in an archive" in images.skipped_summary()


def header(name, size, kind=b"0", **fields):
    """A header with any size, which tarfile would not write."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records):
    body = b"".join(records)
    return header("pax", len(body), b"x") + body.ljust(-(-len(body) // 512) * 512, b"\0")


def record(key, value):
    line = b" %s=%s\n" % (key, value)
    length = len(line) + len(str(len(line) + 2))
    return b"%d%s" % (length, line)


GOOD = header("good.jpg", 1) + b"x".ljust(512, b"\0")
END = bytes(1024)
NEGATIVE = b"\xff" + struct.pack(">q", -1024).rjust(11, b"\xff")
HOSTILE = {
    "empty": b"",
    "text": b"not a tar archive at all\n" * 100,
    "cut in the content": (header("good.jpg", 5000) + b"x" * 5000)[:2000],
    "cut in a header": GOOD + GOOD[:300],
    "a damaged header": GOOD + b"\1" * 512 + GOOD + END,
    "a huge size": header("huge.jpg", b"\x80" + struct.pack(">q", 1 << 60).rjust(11, b"\0")) + END,
    "a negative size": GOOD + header("negative.jpg", NEGATIVE) + GOOD + END,
    "a negative pax header": GOOD + header("negative", NEGATIVE, b"x") + GOOD + END,
    "a negative size in a pax header": GOOD + pax([record(b"size", b"-4096")]) + GOOD + END,
    "a huge size in a pax header": GOOD + pax([record(b"size", b"9" * 400)]) + GOOD + END,
    "a huge pax header": header("pax", 1 << 33, b"x") + END,
    "a huge name": header("name", 1 << 21, b"L") + b"n" * (1 << 21) + GOOD + END,
    "many headers in a row": header("name", 0, b"L") * 3000 + GOOD + END,
    "a sparse map without end": pax([record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.minor", b"0")])
    + header("s.jpg", 2 << 20)
    + b"9999999\n" * (1 << 18)
    + END,
    "two archives in one": GOOD + END + GOOD + END,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_in_a_sentence(tmp_path, case):
    (tmp_path / "x.tar").write_bytes(HOSTILE[case])
    with pytest.raises(OdcftError, match=r"x\.tar (is|holds|cannot)") as told:
        find_images(tmp_path / "x.tar")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


def test_an_archive_without_an_end_mark_is_read_and_said(tmp_path):
    (tmp_path / "x.tar").write_bytes(GOOD)
    assert find_images(tmp_path / "x.tar").skipped == {"archive without an end mark": 1}


def test_sparse_files_are_counted(tmp_path):
    body = header("s.jpg", 512, b"S")
    (tmp_path / "x.tar").write_bytes(body + b"x" * 512 + GOOD + END)
    images = find_images(tmp_path / "x.tar")
    assert images.names == ["x.tar/good.jpg"]
    assert images.skipped == {"sparse file in an archive": 1}


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_compressed_archives_are_refused_with_what_to_do(tmp_path, mode, ending):
    with tarfile.open(tmp_path / f"x.{ending}", f"w:{mode}") as tar:
        add(tar, "a.jpg")
    for data in (tmp_path / f"x.{ending}", tmp_path):
        with pytest.raises(OdcftError, match=r"is compressed, so images .*\. Decompress it"):
            find_images(data)


def test_flipped_and_cut_archives_never_show_a_traceback(shards):
    whole, draw = (shards / "000.tar").read_bytes(), np.random.default_rng(0)
    for trial in range(80):
        content = bytearray(whole if trial % 3 else whole[: draw.integers(len(whole))])
        for position in draw.integers(0, max(1, min(len(content), 4096)), 3):
            if content:
                content[position] ^= 1 << draw.integers(8)
        (shards / "001.tar").write_bytes(content)
        try:
            images = find_images(shards / "001.tar")
        except OdcftError:
            continue
        assert all(isinstance(images.read(i), bytes) for i in range(len(images)))


def test_a_shard_that_becomes_shorter_is_said(shards):
    images = find_images(shards / "000.tar")
    images.read(0)
    os.truncate(shards / "000.tar", 512)
    with pytest.raises(OdcftError, match=r"000\.tar has become shorter"):
        images.read(0)


def test_shards_of_two_kinds_are_refused(shards):
    (shards / "x.parquet").touch()
    with pytest.raises(OdcftError, match=r"holds or matches \.parquet, \.tar\. Give shards of one kind"):
        find_images(shards)


def test_shards_without_images_are_refused_with_what_they_hold(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.mp4")
    with pytest.raises(OdcftError, match=r"holds no images \(but 1 \.mp4\)"):
        find_images(tmp_path / "x.tar")
