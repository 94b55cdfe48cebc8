"""The lock: one run at a time in a folder."""

import errno
import fcntl
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
from folders import tree

from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.run import output_checks
from odcft.run.lock import _holder, locked


def test_lock_names_the_process_and_is_removed_afterwards(tmp_path):
    with locked(tmp_path / "run", print):
        text = (tmp_path / "run" / "lock").read_text()
        assert text == f"process {os.getpid()} on {socket.gethostname()}"
        (tmp_path / "run" / "run.json").write_text("{}")
    assert list(tree(tmp_path / "run")) == ["run.json"]


@pytest.mark.parametrize("stale", ["", "process 1 on a machine with a very, very long name that is longer than ours"])
def test_lock_that_a_killed_run_left_is_taken_over(tmp_path, stale):
    (tmp_path / "lock").write_text(stale)
    with locked(tmp_path, print):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("case", ["thesis", "link", "folder", "pipe"])
def test_something_else_called_lock_is_left_alone(tmp_path, outside, case):
    lock = tmp_path / "run" / "lock"
    lock.parent.mkdir()
    if case == "thesis":
        lock.write_text("my password")
    elif case == "link":
        lock.symlink_to(outside / "precious")
    elif case == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    message = "cannot be written" if case in ("link", "folder") else "lock is not a lock that odcft wrote"
    with pytest.raises(OdcftError, match=message), locked(lock.parent, print):
        raise AssertionError("not refused")
    assert os.path.lexists(lock)
    assert case != "thesis" or lock.read_text() == "my password"
    assert (outside / "precious").read_text() == "mine"


def test_lock_with_a_second_hard_link_is_replaced(tmp_path):
    """As in a copy by hard links (cp -al) of a run that was killed."""
    (tmp_path / "kept").write_text("process 1 on vm")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "kept", tmp_path / "run" / "lock")
    with locked(tmp_path / "run", print):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()}")
        assert (tmp_path / "run" / "lock").stat().st_nlink == 1
    assert (tmp_path / "kept").read_text() == "process 1 on vm"


def hold(folder, held):
    with locked(folder, print):
        held.set()
        time.sleep(100)


def holding(folder):
    """Another process that holds a folder's lock."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(folder, held), daemon=True)
    other.start()
    assert held.wait(30)
    return other


def test_lock_keeps_others_out_even_with_a_second_hard_link(tmp_path):
    other = holding(tmp_path / "run")
    try:
        os.link(tmp_path / "run" / "lock", tmp_path / "kept")
        for _ in range(2):
            message = rf"Another run is writing to .*run \(process {other.pid} on "
            with pytest.raises(OdcftError, match=message), locked(tmp_path / "run", print):
                raise AssertionError("not refused")
    finally:
        other.kill()
        other.join()
    with locked(tmp_path / "run", print):
        pass
    assert (tmp_path / "kept").read_text().startswith(f"process {other.pid}")


def test_lock_that_its_holder_removed_meanwhile_is_created_again(tmp_path, monkeypatch):
    """Between our opening it and locking it, the last run ends; then a third begins."""
    real, calls = fcntl.lockf, []

    def lockf(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        if len(calls) == 2:
            (tmp_path / "lock").unlink()
            (tmp_path / "another").write_text("")  # another inode
            (tmp_path / "another").replace(tmp_path / "lock")
        return real(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path, print):
        assert len(calls) == 3
        assert calls[0] == fcntl.LOCK_EX | fcntl.LOCK_NB
        assert (tmp_path / "lock").read_text().startswith("process")


@pytest.mark.parametrize(("number", "held"), [(errno.EACCES, True), (errno.EAGAIN, True), (errno.ENOLCK, False)])
def test_file_system_that_cannot_lock_is_reported(tmp_path, monkeypatch, number, held):
    def lockf(file, how):
        raise OSError(number, os.strerror(number))

    said = []
    monkeypatch.setattr(fcntl, "lockf", lockf)
    if held:
        with pytest.raises(OdcftError, match="Another run is writing"), locked(tmp_path, said.append):
            raise AssertionError("not refused")
        return
    with locked(tmp_path, said.append):
        assert (tmp_path / "lock").exists()
    assert "cannot be locked (No locks available): make sure that no other run writes to it" in said[0]


def test_full_disk_does_not_prevent_locking(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    real = os.fdopen

    def fdopen(*args, **how):
        file = real(*args, **how)

        class Full:
            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, text):
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    monkeypatch.setattr(os, "fdopen", fdopen)
    monkeypatch.setattr(fcntl, "lockf", lambda file, how: None)
    with locked(tmp_path / "run", print):
        pass


def test_lock_on_a_disk_that_cannot_be_written_names_the_folder(tmp_path, monkeypatch):
    def mkdir(path, *args, **how):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    sentence = r"run cannot be written: Read-only file system. Choose another --out"
    with pytest.raises(OdcftError, match=sentence), locked(tmp_path / "run", print):
        raise AssertionError("not refused")


def test_other_ranks_leave_the_lock_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "gather_dict", lambda mine: mine)
    with locked(tmp_path / "run", print):
        assert not (tmp_path / "run").exists()
    output_checks.refuse_unwritable(tmp_path / "nowhere" / "file")
    monkeypatch.setattr(dist, "gather_dict", lambda mine: {0: "the first rank's reason"})
    with pytest.raises(OdcftError, match="the first rank's reason"), locked(tmp_path / "run", print):
        raise AssertionError("not refused")
    with pytest.raises(OdcftError, match="the first rank's reason"):
        output_checks.refuse_unwritable(tmp_path / "file")


def test_who_holds_a_lock_may_be_unknown(tmp_path):
    assert _holder(tmp_path / "lock") == ""


def test_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "new", print):
        assert (tmp_path / "new" / "lock").exists()
    assert not (tmp_path / "new").exists()
