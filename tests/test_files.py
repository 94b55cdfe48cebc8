"""Files are written whole or not at all, through no link, and onto the disk; checksums."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from folders import tree
from safetensors.torch import load_file

from odcft import files
from odcft.data.images import Images
from odcft.run import output_checks, snapshot_files
from odcft.run.folder import write_image_lists
from odcft.run.lock import locked
from odcft.run.metrics import Metrics
from odcft.run.trackers import Trackers
from odcft.state import Snapshot

# ---------------------------------------------------------------- removing


def test_removing_follows_no_link(tmp_path, outside):
    before = tree(outside)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "link").symlink_to(outside)
    (tmp_path / "link").symlink_to(outside)
    for name in ("folder", "link", "nothing"):
        files.remove(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)
    assert tree(outside) == before


def test_folders_that_were_made_and_stay_empty_go_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for top in (tmp_path, Path()):
        with files.new_folder(top / "a" / "b"):
            assert (top / "a" / "b").is_dir()
        assert not (top / "a").exists()
        with files.new_folder(top / "c" / "d"):
            (top / "c" / "file").write_text("")
        assert tree(top / "c") == {"file": b""}
        (top / "c" / "file").unlink()
        with files.new_folder(top / "c"):
            pass
        assert (top / "c").exists()  # it was there before
        (top / "c").rmdir()


# ---------------------------------------------------------------- writing


WRITERS = {
    "run.json": lambda folder: files.write_text_atomically(folder / "run.json", "{}"),
    "images.csv": lambda folder: write_image_lists(Images(folder, folder, ["a"]), {}, folder),
    "quarantine.csv": lambda folder: write_image_lists(Images(folder, folder, ["a"]), {"b": "why"}, folder),
    "metrics.jsonl": lambda folder: written(Metrics(folder, Trackers(print))),
}


def written(metrics):
    metrics.write(0, {"loss": 1.0})
    metrics.close()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["link", "hard link"])
@pytest.mark.parametrize("place", ["{}", ".{}.unfinished"])
def test_files_are_created_afresh_and_never_written_through_links(tmp_path, outside, name, kind, place):
    path = tmp_path / place.format(name)
    path.symlink_to(outside / "precious") if kind == "link" else os.link(outside / "precious", path)
    WRITERS[name](tmp_path)
    assert (outside / "precious").read_text() == "mine"
    assert not (tmp_path / name).is_symlink()
    assert "mine" not in (tmp_path / name).read_text()
    assert not os.path.lexists(tmp_path / f".{name}.unfinished")


def test_what_is_not_whole_does_not_appear(tmp_path):
    (tmp_path / "a").write_text("before")
    with suppress(ZeroDivisionError), files.atomic_file(tmp_path / "a") as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == {"a": b"before"}


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    with suppress(ZeroDivisionError), files.atomic_folder(tmp_path / "a" / "b") as unfinished:
        (unfinished / "x").write_text("half")
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    (tmp_path / "a" / ".unfinished" / "x").mkdir(parents=True)
    (tmp_path / "a" / "y").write_text("stays")
    with files.atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "x").write_text("new")
        assert tree(tmp_path / "a")[".unfinished/x"] == b"new"
    assert tree(tmp_path / "a") == {"x": b"new", "y": b"stays"}


def test_everything_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files.write_text_atomically(tmp_path / "a", "x")
    assert done == [str(tmp_path / ".a.unfinished"), str(tmp_path)]
    done.clear()
    with files.atomic_folder(tmp_path / "b") as unfinished:
        (unfinished / "x").write_text("new")
    assert done == [str(tmp_path / "b" / ".unfinished" / "x"), str(tmp_path / "b")]


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_the_rights_of_the_umask(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        files.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        with files.atomic_file(tmp_path / "b.safetensors") as unfinished:
            files.save_file({"a": torch.ones(2)}, unfinished, {"x": "y"})
        with files.atomic_file(tmp_path / "c.pth") as unfinished:
            files.save_checkpoint({"a": torch.ones(2)}, unfinished)
        files.write_text_atomically(tmp_path / "d.json", "{}")
        state = Snapshot({"a": torch.ones(2)}, {"labels": torch.arange(7)}, {}, {"step": 1, "images": 7})
        assert snapshot_files.save(tmp_path, state) == ""
        with locked(tmp_path, print):
            assert rights(tmp_path / "lock") == expected
    finally:
        os.umask(before)
    assert {
        str(path): rights(path) for path in tmp_path.rglob("*") if path.is_file() and rights(path) != expected
    } == {}
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], torch.ones(2))


def test_tensors_are_not_written_through_a_link(tmp_path, outside):
    (tmp_path / "a").symlink_to(outside / "precious")
    with pytest.raises(OSError, match="symbolic"):
        files.save_file({"a": torch.ones(2)}, tmp_path / "a")
    assert (outside / "precious").read_text() == "mine"


def test_disk_that_is_full_while_tensors_are_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def odd(*args):
        raise SafetensorError("Error while serializing: the moon")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as found:
        files.save_file({}, tmp_path / "a")
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    monkeypatch.setattr(safetensors.torch, "save_file", odd)
    with pytest.raises(SafetensorError, match="moon"):
        files.save_file({}, tmp_path / "b")


def test_disk_that_is_full_while_a_checkpoint_is_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space left on device"):
        files.save_checkpoint({"a": torch.ones(10**6)}, Path("/dev/full"))

    def odd(*args):
        raise RuntimeError("the moon")

    monkeypatch.setattr(torch, "save", odd)
    with pytest.raises(RuntimeError, match="moon"):
        files.save_checkpoint({}, tmp_path / "a")


def test_nothing_stays_open(tmp_path):
    def open_now():
        return sorted(os.listdir("/proc/self/fd"))

    before = open_now()
    with locked(tmp_path / "a", print):
        files.write_text_atomically(tmp_path / "a" / "b", "x")
        files.fsync(tmp_path / "a" / "b")
        files.save_file({"a": torch.ones(2)}, tmp_path / "a" / "c")
        output_checks.refuse_unwritable(tmp_path / "d")
    assert open_now() == before


# ---------------------------------------------------------------- checksums


def test_checksums(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (1 << 22) + b"y")
    import hashlib

    expected = hashlib.sha256(b"x" * (1 << 22) + b"y").hexdigest()
    assert files.file_sha256(tmp_path / "a") == files.file_sha256(tmp_path / "a", from_disk=True) == expected
    assert files.checkpoint_sha256(str(tmp_path / "a")) == expected
    assert files.checkpoint_sha256("timm:resnet18") == "timm:resnet18"
    assert files.checkpoint_sha256(str(tmp_path)) == str(tmp_path)
    for inner in ("pytorch_model.bin", "model.safetensors", "backbone/model.safetensors"):  # the last found counts
        (tmp_path / inner).parent.mkdir(exist_ok=True)
        (tmp_path / inner).write_text(inner)
        assert files.checkpoint_sha256(str(tmp_path)) == files.file_sha256(tmp_path / inner)


def test_from_disk_means_from_disk(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *how: forgotten.append(how[1:]))
    files.file_sha256(tmp_path / "a")
    assert not forgotten
    files.file_sha256(tmp_path / "a", from_disk=True)
    assert forgotten == [(0, 0, os.POSIX_FADV_DONTNEED)]
