"""Folders and files that odcft writes: links and other people's files may be in every place, and stay as they are."""

import csv
import errno
import fcntl
import multiprocessing
import os
import shutil
import socket
import stat
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_privately

from odcft import files
from odcft.clustering import clusters_parquet
from odcft.data.sources import Images
from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.run import output_checks, snapshot_files
from odcft.run.folder import BEGUN, MEMORY_FILES, RUN_FILES, write_image_lists
from odcft.run.identity import checksums, made_from
from odcft.run.lock import _holder, locked
from odcft.run.metrics import Metrics
from odcft.run.output_checks import only_begun

STATE = "checkpoints/step-000000003"
PLACES = [  # of files and folders in a RUN
    *("recipe.yaml", "run.json", "metrics.jsonl", "images.csv", "quarantine.csv", "lock", "clusters.parquet"),
    *("report.html", "backbone/config.json", "backbone/model.safetensors", "backbone/README.md"),
    *("backbone_2/config.json", "backbone_9/model.safetensors", f"{STATE}/state.json", f"{STATE}/same.safetensors"),
    *(f"{STATE}/rank-0-of-2.safetensors", "checkpoints/damaged-step-000000002/state.json"),
    *("tensorboard/events.out.tfevents.1.vm", ".metrics.jsonl.unfinished", ".recipe.yaml.unfinished"),
    *("backbone/.unfinished/model.safetensors", "checkpoints/.step-000000004.unfinished/same.safetensors"),
    "backbone/.config.json.unfinished",
]


@pytest.fixture
def run(tmp_path):
    """A RUN with everything in it that can be."""
    for place in PLACES:
        (tmp_path / "run" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / place).write_text("process 1 on vm" if place == "lock" else place)
    return tmp_path / "run"


@pytest.fixture
def outside(tmp_path):
    """A folder of the user's that nothing may happen to."""
    (tmp_path / "outside" / "inner").mkdir(parents=True)
    (tmp_path / "outside" / "precious").write_text("mine")
    (tmp_path / "outside" / "inner" / "precious").write_text("mine, too")
    return tmp_path / "outside"


def tree(folder):
    """Everything in a folder, without following links: name to content, or what a link leads to."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def refused(run, message, resumed=True):
    """Both ways to write into a RUN say the same, and nothing has changed."""
    before = tree(run)
    if resumed:
        with pytest.raises(OdcftError, match=message):
            output_checks.refuse_strange(run, RUN_FILES, resumed=True)
    with pytest.raises(OdcftError, match=message):
        output_checks.refuse_full(run, RUN_FILES, overwrite=True)
    with pytest.raises(OdcftError, match=message):
        output_checks.clear(run, RUN_FILES)
    assert tree(run) == before


# ---------------------------------------------------------------- what is there


def test_a_run_of_ours_is_replaced_and_gone_on_with(run):
    output_checks.refuse_strange(run, RUN_FILES, resumed=True)
    output_checks.refuse_full(run, RUN_FILES, overwrite=True)
    output_checks.clear(run, RUN_FILES)
    assert list(tree(run)) == ["lock"]  # which whoever clears holds
    output_checks.clear(run / "new" / "folder", RUN_FILES)
    assert (run / "new" / "folder").is_dir()


TOP = sorted({place.split("/")[0] for place in PLACES} - {"checkpoints", "tensorboard"})
INSIDE = [
    *("checkpoints/step-000000003", f"{STATE}/state.json", f"{STATE}/same.safetensors", "backbone/model.safetensors"),
    *("checkpoints/damaged-step-000000002", "checkpoints/.step-000000004.unfinished", "backbone/.unfinished"),
    *("tensorboard/events.out.tfevents.1.vm", "backbone/.config.json.unfinished"),
]


@pytest.mark.parametrize("place", [*TOP, *INSIDE])
@pytest.mark.parametrize("target", ["precious", "inner", "nowhere"])
def test_a_link_under_a_name_of_ours_is_refused_by_name(run, outside, place, target):
    before = tree(outside)
    files.remove(run / place)
    (run / place).symlink_to(outside / target)
    refused(run, f"{run / place} is a link, and odcft writes through none.*choose another output")
    assert tree(outside) == before


# What is left of a killed process may be either.
@pytest.mark.parametrize("place", [place for place in [*TOP, *INSIDE] if not place.endswith(".unfinished")])
def test_another_kind_under_a_name_of_ours_is_refused_by_name(run, place):
    folder = (run / place).is_dir()
    files.remove(run / place)
    (run / place).write_text("mine") if folder else (run / place).mkdir()
    refused(run, f"{run / place} is a {'file' if folder else 'folder'}, where odcft writes another kind")
    files.remove(run / place)
    os.mkfifo(run / place)
    refused(run, f"{run / place} is a device, where odcft writes another kind")


@pytest.mark.parametrize("name", [".backbone.unfinished", "backbone/.unfinished", ".run.json.unfinished"])
def test_a_pipe_for_a_leftover_is_refused(run, name):
    files.remove(run / name)
    os.mkfifo(run / name)
    refused(run, "is a device")


FOREIGN = [
    *("thesis.txt", "backbone/thesis.txt", "checkpoints/thesis.txt", f"{STATE}/thesis.txt", "tensorboard/thesis.txt"),
    *(".thesis.unfinished", "thesis.unfinished", "backbone_10", "checkpoints/step-3", "checkpoints/step-000000003.old"),
    *("checkpoints/.thesis.unfinished", "checkpoints/step-00000000x", "memory.json", ".run.json"),
    *("xrun.json.unfinished", "backbone/xconfig.json.unfinished"),
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_odcft_did_not_write_is_not_overwritten_and_does_not_hinder_resuming(run, outside, name, kind):
    path = run / name
    path.symlink_to(outside) if kind == "link" else path.mkdir() if kind == "folder" else path.write_text("mine")
    refused(run, rf"holds files odcft did not write \({name}\), so --overwrite will not touch it", resumed=False)
    output_checks.refuse_strange(run, RUN_FILES, resumed=True)


@pytest.mark.parametrize("name", [".thesis.unfinished", "thesis.unfinished", "thesis.txt", "unfinished"])
def test_a_folder_that_holds_something_is_not_empty(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OdcftError, match=r"is not empty. Pass --resume to go on with it, --overwrite to replace it"):
        output_checks.refuse_full(tmp_path, RUN_FILES, overwrite=False)
    with pytest.raises(OdcftError, match=r"is not empty. Pass --overwrite"):
        output_checks.refuse_full(tmp_path, MEMORY_FILES, overwrite=False)


def test_what_a_killed_process_left_is_nothing(tmp_path):
    for name in (".metrics.jsonl.unfinished", "lock"):
        (tmp_path / name).write_text("")
    (tmp_path / ".unfinished").mkdir()
    output_checks.refuse_full(tmp_path, RUN_FILES, overwrite=False)
    assert output_checks.contents(tmp_path, RUN_FILES) == set()
    assert output_checks.contents(tmp_path, {"a": None}) == {"lock", ".metrics.jsonl.unfinished"}
    assert output_checks.contents(tmp_path / "nowhere", RUN_FILES) == set()
    assert only_begun(tmp_path)


def test_only_what_has_no_state_and_no_step_is_only_begun(tmp_path):
    for name in ("recipe.yaml", "run.json", "images.csv", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    assert only_begun(tmp_path)
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "quarantine.csv").write_text("")
    assert output_checks.contents(tmp_path, RUN_FILES) == BEGUN
    assert only_begun(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert not only_begun(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoints" / "damaged-step-000000003").mkdir(parents=True)
    assert not only_begun(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "clusters.parquet").write_text("")
    assert not only_begun(tmp_path)


def test_an_output_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OdcftError, match=r"file is a file. Choose a folder"):
        output_checks.refuse_full(tmp_path / "file", RUN_FILES, overwrite=True)
    with pytest.raises(OdcftError, match=r"run cannot be written: .*file is not a folder you may write to"):
        output_checks.refuse_full(tmp_path / "file" / "run", RUN_FILES, overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OdcftError, match="nowhere is a link that leads nowhere"):
        output_checks.refuse_full(tmp_path / "nowhere", RUN_FILES, overwrite=True)
    output_checks.refuse_full(tmp_path / "a" / "b", RUN_FILES, overwrite=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("right", [os.W_OK, os.X_OK])
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch, right):
    monkeypatch.setattr(os, "access", lambda path, asked: not asked & right)
    with pytest.raises(OdcftError, match="is not a folder you may write to"):
        output_checks.refuse_full(tmp_path / "run", RUN_FILES, overwrite=False)


def test_the_output_itself_may_be_a_link_to_a_folder(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    output_checks.refuse_full(tmp_path / "link", RUN_FILES, overwrite=True)
    with locked(tmp_path / "link", print):
        output_checks.clear(tmp_path / "link", RUN_FILES)
        files.write_whole(tmp_path / "link" / "run.json", "{}")
    assert list(tree(run)) == ["run.json"]
    assert (tmp_path / "link").is_symlink()


# ---------------------------------------------------------------- checkpoints on another disk


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_of_the_users_on_another_disk_is_used_emptied_and_kept(run, tmp_path, name):
    shutil.move(run / name, tmp_path / "scratch")
    (run / name).symlink_to(tmp_path / "scratch")
    output_checks.refuse_strange(run, RUN_FILES, resumed=True)
    output_checks.refuse_full(run, RUN_FILES, overwrite=True)
    output_checks.clear(run, RUN_FILES)
    assert (run / name).is_symlink()
    assert list((tmp_path / "scratch").iterdir()) == []
    if name == "checkpoints":
        same = {"weight": torch.ones(3)}
        for step in range(1, 5):
            state = snapshot_files.State(same, {"labels": torch.arange(7)}, {}, {"step": step, "images": 7})
            assert snapshot_files.save(run, state) == ""
        assert sorted(tree(run)) == ["checkpoints", "lock"]
        assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["step-000000003", "step-000000004"]
        assert snapshot_files.newest(run, print).name == "step-000000004"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("precious", r"is a link to .*outside, where inner is not what odcft writes. Remove the link"),
        ("nothing", "is a link that leads nowhere. Make the folder"),
        ("circle", "is a link that leads nowhere"),
        ("file", "is a link to .*precious, which is no folder"),
        ("another run", "is a link to .*other/checkpoints, which belongs to another RUN"),
        ("somebody's", "is a link to .*empty, which belongs to somebody else"),
        ("link inside", "is a link to .*states, where step-000000001 is a link, and odcft writes through none"),
        ("itself", "is a link to .*run, where"),
    ],
)
def test_other_links_for_checkpoints_are_refused(run, outside, tmp_path, monkeypatch, case, message):
    target = outside
    if case == "nothing":
        target = tmp_path / "gone"
    elif case == "circle":
        target = run / "checkpoints"
    elif case == "file":
        target = outside / "precious"
    elif case == "another run":
        target = tmp_path / "other" / "checkpoints"
        (target / "step-000000001").mkdir(parents=True)
        (tmp_path / "other" / "run.json").write_text("{}")
    elif case == "somebody's":
        target = tmp_path / "empty"
        target.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: target.stat().st_uid + 1)
        real = Path.stat
        monkeypatch.setattr(Path, "stat", lambda path, **how: other_owner(real(path, **how), path == run))
    elif case == "link inside":
        target = tmp_path / "states"
        target.mkdir()
        (target / "step-000000001").symlink_to(outside)
    elif case == "itself":
        target = run
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(target)
    refused(run, message)
    assert (outside / "precious").exists()


def other_owner(found, other):
    """What stat says, of another owner's."""
    return os.stat_result([*found[:4], found.st_uid + 2 * other, *found[5:]])


def test_what_lies_in_a_folder_of_another_owner_may_lead_to_that_owners_folders(run, tmp_path, monkeypatch):
    """As root in a container, whose volumes belong to the user outside."""
    shutil.move(run / "checkpoints", tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    monkeypatch.setattr(os, "geteuid", lambda: run.stat().st_uid + 1)
    output_checks.refuse_full(run, RUN_FILES, overwrite=True)


def test_a_memory_has_no_folders_on_another_disk(tmp_path, outside):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.safetensors").symlink_to(outside / "precious")
    with pytest.raises(OdcftError, match=r"memory.safetensors is a link"):
        output_checks.refuse_full(tmp_path / "memory", MEMORY_FILES, overwrite=True)


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
        with files.made(top / "a" / "b"):
            assert (top / "a" / "b").is_dir()
        assert not (top / "a").exists()
        with files.made(top / "c" / "d"):
            (top / "c" / "file").write_text("")
        assert tree(top / "c") == {"file": b""}
        (top / "c" / "file").unlink()
        with files.made(top / "c"):
            pass
        assert (top / "c").exists()  # it was there before
        (top / "c").rmdir()


# ---------------------------------------------------------------- the lock


def test_lock_is_a_file_of_ours_and_goes(tmp_path):
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


def test_lock_that_has_a_second_name_is_made_anew(tmp_path):
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


def test_lock_keeps_others_out_even_when_it_has_a_second_name(tmp_path):
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


def test_lock_that_its_holder_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
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
def test_file_system_that_cannot_lock_is_told_of(tmp_path, monkeypatch, number, held):
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
    assert "cannot be locked (No locks available): let no other run write to it" in said[0]


def test_full_disk_does_not_hinder_locking(tmp_path, monkeypatch):
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


# ---------------------------------------------------------------- writing


WRITERS = {
    "run.json": lambda folder: files.write_whole(folder / "run.json", "{}"),
    "images.csv": lambda folder: write_image_lists(Images(folder, folder, ["a"]), {}, folder),
    "quarantine.csv": lambda folder: write_image_lists(Images(folder, folder, ["a"]), {"b": "why"}, folder),
    "metrics.jsonl": lambda folder: written(Metrics(folder, tensorboard=False)),
}


def written(metrics):
    metrics.write(0, {"loss": 1.0})
    metrics.close()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["link", "hard link"])
@pytest.mark.parametrize("place", ["{}", ".{}.unfinished"])
def test_files_are_written_anew_and_through_nothing(tmp_path, outside, name, kind, place):
    path = tmp_path / place.format(name)
    path.symlink_to(outside / "precious") if kind == "link" else os.link(outside / "precious", path)
    WRITERS[name](tmp_path)
    assert (outside / "precious").read_text() == "mine"
    assert not (tmp_path / name).is_symlink()
    assert "mine" not in (tmp_path / name).read_text()
    assert not os.path.lexists(tmp_path / f".{name}.unfinished")


def test_image_lists(tmp_path):
    write_image_lists(Images(tmp_path, tmp_path, ["a,b", "c\udcff"]), {}, tmp_path)
    assert not (tmp_path / "quarantine.csv").exists()
    assert files.read_column(tmp_path / "images.csv", "path") == ["a,b", "c\udcff"]
    assert files.read_column(tmp_path / "images.csv", "row") == ["0", "1"]
    write_image_lists(Images(tmp_path, tmp_path, []), {"d": "why"}, tmp_path)
    with (tmp_path / "quarantine.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"path": "d", "reason": "why"}]


def test_what_is_not_whole_does_not_appear(tmp_path):
    (tmp_path / "a").write_text("before")
    with suppress(ZeroDivisionError), files.whole(tmp_path / "a") as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == {"a": b"before"}


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    with suppress(ZeroDivisionError), files.filling(tmp_path / "a" / "b") as unfinished:
        (unfinished / "x").write_text("half")
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    (tmp_path / "a" / ".unfinished" / "x").mkdir(parents=True)
    (tmp_path / "a" / "y").write_text("stays")
    with files.filling(tmp_path / "a") as unfinished:
        (unfinished / "x").write_text("new")
        assert tree(tmp_path / "a")[".unfinished/x"] == b"new"
    assert tree(tmp_path / "a") == {"x": b"new", "y": b"stays"}


def test_everything_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files.write_whole(tmp_path / "a", "x")
    assert done == [str(tmp_path / ".a.unfinished"), str(tmp_path)]
    done.clear()
    with files.filling(tmp_path / "b") as unfinished:
        (unfinished / "x").write_text("new")
    assert done == [str(tmp_path / "b" / ".unfinished" / "x"), str(tmp_path / "b")]


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_the_rights_of_the_umask(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        files.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        with files.whole(tmp_path / "b.safetensors") as unfinished:
            files.save_file({"a": torch.ones(2)}, unfinished, {"x": "y"})
        with files.whole(tmp_path / "c.pth") as unfinished:
            files.save_checkpoint({"a": torch.ones(2)}, unfinished)
        files.write_whole(tmp_path / "d.json", "{}")
        state = snapshot_files.State({"a": torch.ones(2)}, {"labels": torch.arange(7)}, {}, {"step": 1, "images": 7})
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


def test_a_file_is_tried_before_it_is_needed(tmp_path, outside):
    output_checks.refuse_unwritable(tmp_path / "a" / "b" / "c.pth")
    (tmp_path / ".c.pth.unfinished").symlink_to(outside / "precious")
    output_checks.refuse_unwritable(tmp_path / "c.pth")
    assert (outside / "precious").read_text() == "mine"
    assert tree(tmp_path).keys() == {"outside", "outside/precious", "outside/inner", "outside/inner/precious"}
    (tmp_path / ".d.pth.unfinished").mkdir()
    for path in (
        outside / "precious" / "c.pth",
        tmp_path / f"{300 * 'a'}.pth",
        tmp_path / "d.pth",
        Path("/proc/c.pth"),
    ):
        with pytest.raises(OdcftError, match=r"cannot be written: .* Choose another place"):
            output_checks.refuse_unwritable(path)


def test_a_place_that_may_not_be_looked_at_is_refused(tmp_path, monkeypatch):
    output_checks.refuse_unreachable(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    output_checks.refuse_unreachable(tmp_path / "file" / "run")  # that is told of by what comes next
    for refuse in (output_checks.refuse_unreachable, lambda path: output_checks.refuse_full(path, RUN_FILES, True)):
        with pytest.raises(OdcftError, match=r"a cannot be written: File name too long. Choose another place"):
            refuse(tmp_path / (300 * "a"))


def test_without_pyarrow_no_run_begins(monkeypatch):
    clusters_parquet.require_parquet()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OdcftError, match=r"clusters.parquet needs pyarrow .*: pip install pyarrow"):
        clusters_parquet.require_parquet()


# ---------------------------------------------------------------- files that may be replaced


def pretext_file(path):
    torch.save(dict.fromkeys(("task", "arch", "epoch", "optimizer", "state_dict"), 1), path)


THEIRS = {
    "text": lambda path: path.write_text("thesis"),
    "nothing": lambda path: path.write_text(""),
    "checkpoint": lambda path: torch.save({"state_dict": {"a": torch.ones(2)}, "arch": "resnet", "epoch": 3}, path),
    "list": lambda path: torch.save([1, 2], path),
    "old checkpoint": lambda path: torch.save({"task": 1}, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_privately({"a": torch.ones(2)}, path, {"format": "pt"}),
    "safetensors without words": lambda path: save_privately({"a": torch.ones(2)}, path),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_file_that_odcft_did_not_write_is_not_replaced(tmp_path, kind):
    THEIRS[kind](tmp_path / "file")
    assert not output_checks.written_by_odcft(tmp_path / "file")
    with pytest.raises(OdcftError, match="file was not written by odcft, so --overwrite will not touch it"):
        output_checks.refuse_file_of_others(tmp_path / "file")


OURS = {
    "pretext": pretext_file,
    "safetensors": lambda path: save_privately({"a": torch.ones(2)}, path, {"architecture": "x", "input": "{}"}),
    "torchvision": lambda path: torch.save(with_words({"odcft": {}}), path),
}


def with_words(words):
    named = OrderedDict(a=torch.ones(2))
    named._metadata = words
    return named


@pytest.mark.parametrize("kind", OURS)
def test_a_file_of_ours_may_be_replaced(tmp_path, kind):
    OURS[kind](tmp_path / "file")
    assert output_checks.written_by_odcft(tmp_path / "file")
    output_checks.refuse_file_of_others(tmp_path / "file")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("HACKED",)


def test_to_look_at_a_file_of_others_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**dict.fromkeys(("task", "arch", "epoch"), 1), "optimizer": Evil()}, tmp_path / "evil.pth")
    assert not output_checks.written_by_odcft(tmp_path / "evil.pth")
    assert list(tree(tmp_path)) == ["evil.pth"]


def test_nothing_stays_open(tmp_path):
    def open_now():
        return sorted(os.listdir("/proc/self/fd"))

    before = open_now()
    with locked(tmp_path / "a", print):
        files.write_whole(tmp_path / "a" / "b", "x")
        files.sync(tmp_path / "a" / "b")
        files.save_file({"a": torch.ones(2)}, tmp_path / "a" / "c")
        output_checks.refuse_unwritable(tmp_path / "d")
    assert open_now() == before


def test_a_link_is_not_replaced(tmp_path):
    pretext_file(tmp_path / "r.pth")
    output_checks.refuse_file_of_others(tmp_path / "new")
    for target in ("r.pth", "nowhere"):
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(OdcftError, match=r"link is a link. Give the place that it leads to"):
            output_checks.refuse_file_of_others(tmp_path / "link")
        (tmp_path / "link").unlink()


# ---------------------------------------------------------------- checksums


def test_checksums(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (1 << 22) + b"y")
    import hashlib

    expected = hashlib.sha256(b"x" * (1 << 22) + b"y").hexdigest()
    assert files.digest(tmp_path / "a") == files.digest(tmp_path / "a", from_disk=True) == expected
    assert files.sha256(str(tmp_path / "a")) == expected
    assert files.sha256("timm:resnet18") == "timm:resnet18"
    assert files.sha256(str(tmp_path)) == str(tmp_path)
    for inner in ("pytorch_model.bin", "model.safetensors", "backbone/model.safetensors"):  # the last found counts
        (tmp_path / inner).parent.mkdir(exist_ok=True)
        (tmp_path / inner).write_text(inner)
        assert files.sha256(str(tmp_path)) == files.digest(tmp_path / inner)


def test_from_disk_means_from_disk(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *how: forgotten.append(how[1:]))
    files.digest(tmp_path / "a")
    assert not forgotten
    files.digest(tmp_path / "a", from_disk=True)
    assert forgotten == [(0, 0, os.POSIX_FADV_DONTNEED)]


def test_about_one_checkpoint_or_several(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    images = Images(tmp_path, tmp_path, ["a"])
    one, two = made_from([a], ["x"], "data", images), made_from([a, b], ["x", "y"], "data", images)
    sums = [files.digest(tmp_path / name) for name in "ab"]
    assert one == {"checkpoint": a, "sha256": sums[0], "arch": "x", "data": "data", "images": 1}
    assert two == {"checkpoint": [a, b], "sha256": sums, "arch": ["x", "y"], "data": "data", "images": 1}


def test_sample_of_images_is_spread_over_the_set(tmp_path):
    names = [f"{i:03d}" for i in range(10)]
    for name in names[:-1]:
        (tmp_path / name).write_text(name)
    images = Images(tmp_path, tmp_path, names)
    assert list(checksums(images, 3)) == ["000", "003", "006"]
    assert list(checksums(images, 100)) == names[:-1]
    assert checksums(images)["000"] == files.digest(tmp_path / "000")
