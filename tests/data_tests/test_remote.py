"""Images behind URLs, through fsspec on its local and its memory file system; nothing touches the network."""

import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odcft.data import image_files
from odcft.data.duplicates import identical_files
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.files import file_sha256
from odcft.run.run_json import checksums

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["file", "memory"])
def remote(request, tmp_path, make_images):
    """The URL of a folder, and the same folder here."""
    data = make_images(tmp_path / "set", 6)
    (data / "x.psd").touch()
    (data / "a/.hidden.png").touch()
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/x.tar", "w") as tar:
        tar.add(data, ".")
    images = find_images(data)
    contents = [{"bytes": images.read(i), "path": images.names[i]} for i in range(6)]
    pq.write_table(pa.table({"image": contents, "label": list("ababab")}), tmp_path / "x.parquet", row_group_size=2)
    (tmp_path / "l.csv").write_text("file,label\nset/b/001.png,x\nset/a/000.png,y\nset/gone.png,y\n")
    if request.param == "file":
        yield f"file://{tmp_path}", tmp_path
        return
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/bucket/", recursive=True)
    yield "memory://bucket", tmp_path
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("what", ["set", "set/", "x.parquet", "shards", "shards/x.tar", "shards/*.tar"])
def test_a_url_holds_the_same_images_as_the_folder_here(remote, what):
    url, here = remote
    images, local = find_images(f"{url}/{what}"), find_images(here / "set")
    assert [images.read(i) for i in range(6)] == [local.read(i) for i in range(6)]
    assert identical_files(images) == identical_files(local)
    if "x" not in what and "shards" not in what:
        assert images.names == local.names
        assert images.skipped == {".psd": 1, "hidden image": 1} == local.skipped
        assert images.path(0) == f"{url}/set/a/000.png"
        assert checksums(images)["a/000.png"] == file_sha256(here / "set/a/000.png")


def test_a_list_at_a_url_names_files_beside_it(remote):
    url, here = remote
    images, local = find_images(f"{url}/l.csv"), find_images(here / "l.csv")
    assert images.names == local.names
    assert images.labels == local.labels == ["x", "y", "y"]
    assert images.read(1) == local.read(1)
    with pytest.raises(OSError, match="gone"):
        images.read(2)
    assert images.sizes().tolist() == local.sizes().tolist()


def test_a_list_at_a_url_cannot_name_files_of_this_machine(remote):
    url, _ = remote
    with fsspec.open(f"{url}/bad.txt", "w") as file:
        file.write("/etc/passwd\n")
    with pytest.raises(OdcftError, match=r"lists /etc/passwd, which is not relative to it\. Make all paths relative"):
        find_images(f"{url}/bad.txt")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"memory://nowhere does not exist\. Check the address"),
        ("memory://nowhere/x.tar", "does not exist"),
        ("memory://nowhere/*.tar", "matches nothing"),
        ("memory://nowhere/l.csv", "does not exist"),
        ("nonsense://x", r"not an address that fsspec knows"),
        ("memory://nowhere/x.tar.gz", "is compressed"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(url, message):
    with pytest.raises(OdcftError, match=message) as told:
        find_images(url)
    assert "\n" not in str(told.value)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(OdcftError, match=r"s3://bucket/set: Install s3fs to access S3, the library for s3://\."):
        find_images("s3://bucket/set")


def test_without_fsspec_a_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['fsspec'] = sys.modules['fsspec.core'] = None\n"
        "from odcft.data.stores.remote import read_file\n"
        "from odcft.errors import OdcftError\n"
        "try: read_file('s3://bucket/x', 9)\n"
        "except OdcftError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 's3://bucket/x: addresses need fsspec. Install it: pip install "odcft[remote]".\n'


def test_too_large_a_file_is_refused(monkeypatch):
    with fsspec.open("memory://large/x.png", "wb") as file:
        file.write(b"x" * 100)
    monkeypatch.setattr(image_files, "MAX_BYTES", 99)
    with pytest.raises(OdcftError, match="100 bytes are more than the 99"):
        find_images("memory://large").read(0)


@pytest.mark.parametrize("path", ["C:\\images", "/a://b", "./s3://x", "a b://c", "x:/y"])
def test_paths_of_this_machine_are_not_urls(path):
    assert not image_files.is_url(path)


def test_chained_urls_are_urls():
    assert image_files.is_url("simplecache::s3://bucket/x")


def test_a_pipe_of_this_machine_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.png")
    images = find_images(f"file://{tmp_path}")
    with pytest.raises(OdcftError, match="a pipe, not a file"):
        images.read(0)
