"""Outputs: only what odcft wrote is replaced; links and other people's files are left alone, wherever they are."""

import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from folders import tree
from safetensors.torch import save_file as save_privately

from odcft import files
from odcft.errors import OdcftError
from odcft.run import output_checks, snapshot_files
from odcft.run.folder import FILES_BEFORE_FIRST_STEP, MEMORY_FILES, RUN_FILES
from odcft.run.lock import locked
from odcft.run.output_checks import has_no_progress
from odcft.state import Snapshot

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
    """A RUN with every file that it can hold."""
    for place in PLACES:
        (tmp_path / "run" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / place).write_text("process 1 on vm" if place == "lock" else place)
    return tmp_path / "run"


def refused(run, message, resumed=True):
    """Resuming and overwriting a RUN are refused with the same message, and nothing changes."""
    before = tree(run)
    if resumed:
        with pytest.raises(OdcftError, match=message):
            output_checks.refuse_foreign_files(run, RUN_FILES, resumed=True)
    with pytest.raises(OdcftError, match=message):
        output_checks.refuse_non_empty(run, RUN_FILES, overwrite=True)
    with pytest.raises(OdcftError, match=message):
        output_checks.clear_folder(run, RUN_FILES)
    assert tree(run) == before


# ---------------------------------------------------------------- existing folders


def test_a_run_of_ours_can_be_replaced_and_resumed(run):
    output_checks.refuse_foreign_files(run, RUN_FILES, resumed=True)
    output_checks.refuse_non_empty(run, RUN_FILES, overwrite=True)
    output_checks.clear_folder(run, RUN_FILES)
    assert list(tree(run)) == ["lock"]  # held by whoever clears the folder
    output_checks.clear_folder(run / "new" / "folder", RUN_FILES)
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
    refused(run, f"{run / place} is a link, and odcft does not write through links.*choose another output")
    assert tree(outside) == before


# What a killed process left may be a file or a folder.
@pytest.mark.parametrize("place", [place for place in [*TOP, *INSIDE] if not place.endswith(".unfinished")])
def test_another_kind_under_a_name_of_ours_is_refused_by_name(run, place):
    folder = (run / place).is_dir()
    files.remove(run / place)
    (run / place).write_text("mine") if folder else (run / place).mkdir()
    found, expected = ("file", "folder") if folder else ("folder", "file")
    refused(run, f"{run / place} is a {found}, but odcft writes a {expected} of this name")
    files.remove(run / place)
    os.mkfifo(run / place)
    refused(run, f"{run / place} is a special file, but odcft writes a {expected} of this name")


@pytest.mark.parametrize("name", [".backbone.unfinished", "backbone/.unfinished", ".run.json.unfinished"])
def test_a_pipe_for_a_leftover_is_refused(run, name):
    files.remove(run / name)
    os.mkfifo(run / name)
    refused(run, "is a special file")


FOREIGN = [
    *("thesis.txt", "backbone/thesis.txt", "checkpoints/thesis.txt", f"{STATE}/thesis.txt", "tensorboard/thesis.txt"),
    *(".thesis.unfinished", "thesis.unfinished", "backbone_10", "checkpoints/step-3", "checkpoints/step-000000003.old"),
    *("checkpoints/.thesis.unfinished", "checkpoints/step-00000000x", "memory.json", ".run.json"),
    *("xrun.json.unfinished", "backbone/xconfig.json.unfinished"),
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_odcft_did_not_write_is_not_overwritten_and_does_not_prevent_resuming(run, outside, name, kind):
    path = run / name
    path.symlink_to(outside) if kind == "link" else path.mkdir() if kind == "folder" else path.write_text("mine")
    refused(run, rf"holds files odcft did not write \({name}\), so --overwrite will not touch it", resumed=False)
    output_checks.refuse_foreign_files(run, RUN_FILES, resumed=True)


@pytest.mark.parametrize("name", [".thesis.unfinished", "thesis.unfinished", "thesis.txt", "unfinished"])
def test_a_folder_that_holds_something_is_not_empty(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OdcftError, match=r"is not empty. Pass --resume to continue it, --overwrite to replace it"):
        output_checks.refuse_non_empty(tmp_path, RUN_FILES, overwrite=False)
    with pytest.raises(OdcftError, match=r"is not empty. Pass --overwrite"):
        output_checks.refuse_non_empty(tmp_path, MEMORY_FILES, overwrite=False)


def test_leftovers_of_a_killed_process_count_as_empty(tmp_path):
    for name in (".metrics.jsonl.unfinished", "lock"):
        (tmp_path / name).write_text("")
    (tmp_path / ".unfinished").mkdir()
    output_checks.refuse_non_empty(tmp_path, RUN_FILES, overwrite=False)
    assert output_checks.names_in(tmp_path, RUN_FILES) == set()
    assert output_checks.names_in(tmp_path, {"a": None}) == {"lock", ".metrics.jsonl.unfinished"}
    assert output_checks.names_in(tmp_path / "nowhere", RUN_FILES) == set()
    assert has_no_progress(tmp_path)


def test_a_run_without_a_state_and_a_log_line_has_no_progress(tmp_path):
    for name in ("recipe.yaml", "run.json", "images.csv", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    assert has_no_progress(tmp_path)
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "quarantine.csv").write_text("")
    assert output_checks.names_in(tmp_path, RUN_FILES) == FILES_BEFORE_FIRST_STEP
    assert has_no_progress(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert not has_no_progress(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoints" / "damaged-step-000000003").mkdir(parents=True)
    assert not has_no_progress(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "clusters.parquet").write_text("")
    assert not has_no_progress(tmp_path)


def test_an_output_that_is_not_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OdcftError, match=r"file is a file. Choose a folder"):
        output_checks.refuse_non_empty(tmp_path / "file", RUN_FILES, overwrite=True)
    with pytest.raises(OdcftError, match=r"run cannot be written: .*file is not a folder you may write to"):
        output_checks.refuse_non_empty(tmp_path / "file" / "run", RUN_FILES, overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OdcftError, match="nowhere is a broken link"):
        output_checks.refuse_non_empty(tmp_path / "nowhere", RUN_FILES, overwrite=True)
    output_checks.refuse_non_empty(tmp_path / "a" / "b", RUN_FILES, overwrite=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("right", [os.W_OK, os.X_OK])
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch, right):
    monkeypatch.setattr(os, "access", lambda path, asked: not asked & right)
    with pytest.raises(OdcftError, match="is not a folder you may write to"):
        output_checks.refuse_non_empty(tmp_path / "run", RUN_FILES, overwrite=False)


def test_the_output_itself_may_be_a_link_to_a_folder(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    output_checks.refuse_non_empty(tmp_path / "link", RUN_FILES, overwrite=True)
    with locked(tmp_path / "link", print):
        output_checks.clear_folder(tmp_path / "link", RUN_FILES)
        files.write_text_atomically(tmp_path / "link" / "run.json", "{}")
    assert list(tree(run)) == ["run.json"]
    assert (tmp_path / "link").is_symlink()


# ---------------------------------------------------------------- checkpoints on another disk


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_of_the_users_on_another_disk_is_used_emptied_and_kept(run, tmp_path, name):
    shutil.move(run / name, tmp_path / "scratch")
    (run / name).symlink_to(tmp_path / "scratch")
    output_checks.refuse_foreign_files(run, RUN_FILES, resumed=True)
    output_checks.refuse_non_empty(run, RUN_FILES, overwrite=True)
    output_checks.clear_folder(run, RUN_FILES)
    assert (run / name).is_symlink()
    assert list((tmp_path / "scratch").iterdir()) == []
    if name == "checkpoints":
        same = {"weight": torch.ones(3)}
        for step in range(1, 5):
            state = Snapshot(same, {"labels": torch.arange(7)}, {}, {"step": step, "images": 7})
            assert snapshot_files.save(run, state) == ""
        assert sorted(tree(run)) == ["checkpoints", "lock"]
        assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["step-000000003", "step-000000004"]
        assert snapshot_files.newest(run, print).name == "step-000000004"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("precious", r"is a link to .*outside, where inner was not written by odcft. Remove the link"),
        ("nothing", "is a broken link. Create the folder"),
        ("circle", "is a broken link"),
        ("file", "is a link to .*precious, which is not a folder"),
        ("another run", "is a link to .*other/checkpoints, which belongs to another RUN"),
        ("somebody's", "is a link to .*empty, which belongs to somebody else"),
        (
            "link inside",
            "is a link to .*states, where step-000000001 is a link, and odcft does not write through links",
        ),
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
    """A stat result with another owner."""
    return os.stat_result([*found[:4], found.st_uid + 2 * other, *found[5:]])


def test_links_in_a_folder_of_another_owner_may_lead_to_that_owners_folders(run, tmp_path, monkeypatch):
    """As root in a container, whose volumes belong to the user outside."""
    shutil.move(run / "checkpoints", tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    monkeypatch.setattr(os, "geteuid", lambda: run.stat().st_uid + 1)
    output_checks.refuse_non_empty(run, RUN_FILES, overwrite=True)


def test_a_memory_has_no_folders_on_another_disk(tmp_path, outside):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.safetensors").symlink_to(outside / "precious")
    with pytest.raises(OdcftError, match=r"memory.safetensors is a link"):
        output_checks.refuse_non_empty(tmp_path / "memory", MEMORY_FILES, overwrite=True)


def test_an_output_file_is_tried_before_it_is_needed(tmp_path, outside):
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


def test_a_path_that_cannot_be_looked_up_is_refused(tmp_path, monkeypatch):
    output_checks.refuse_invalid_path(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    output_checks.refuse_invalid_path(tmp_path / "file" / "run")  # the next check reports that
    for refuse in (
        output_checks.refuse_invalid_path,
        lambda path: output_checks.refuse_non_empty(path, RUN_FILES, True),
    ):
        with pytest.raises(OdcftError, match=r"a cannot be written: File name too long. Choose another place"):
            refuse(tmp_path / (300 * "a"))


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
    "safetensors without metadata": lambda path: save_privately({"a": torch.ones(2)}, path),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_file_that_odcft_did_not_write_is_not_replaced(tmp_path, kind):
    THEIRS[kind](tmp_path / "file")
    assert not output_checks.written_by_odcft(tmp_path / "file")
    with pytest.raises(OdcftError, match="file was not written by odcft, so --overwrite will not touch it"):
        output_checks.refuse_foreign_file(tmp_path / "file")


OURS = {
    "pretext": pretext_file,
    "safetensors": lambda path: save_privately({"a": torch.ones(2)}, path, {"architecture": "x", "input": "{}"}),
    "torchvision": lambda path: torch.save(with_metadata({"odcft": {}}), path),
}


def with_metadata(metadata):
    state = OrderedDict(a=torch.ones(2))
    state._metadata = metadata
    return state


@pytest.mark.parametrize("kind", OURS)
def test_a_file_of_ours_may_be_replaced(tmp_path, kind):
    OURS[kind](tmp_path / "file")
    assert output_checks.written_by_odcft(tmp_path / "file")
    output_checks.refuse_foreign_file(tmp_path / "file")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("HACKED",)


def test_checking_a_file_of_others_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**dict.fromkeys(("task", "arch", "epoch"), 1), "optimizer": Evil()}, tmp_path / "evil.pth")
    assert not output_checks.written_by_odcft(tmp_path / "evil.pth")
    assert list(tree(tmp_path)) == ["evil.pth"]


def test_a_link_is_not_replaced(tmp_path):
    pretext_file(tmp_path / "r.pth")
    output_checks.refuse_foreign_file(tmp_path / "new")
    for target in ("r.pth", "nowhere"):
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(OdcftError, match=r"link is a link. Give the path it points to"):
            output_checks.refuse_foreign_file(tmp_path / "link")
        (tmp_path / "link").unlink()
