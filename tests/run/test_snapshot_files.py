"""States on disk: written completely or not at all, verified, two of them kept, readable on any number of ranks."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.run import snapshot_files
from odcft.state import Snapshot


def make_state(step, value=1.0):
    same = {"weight": torch.full((3, 5), value)}
    return Snapshot(same, {"labels": torch.arange(7)}, {"loss": torch.tensor(2.0)}, {"step": step, "images": 7})


@pytest.mark.parametrize("file", ["same.safetensors", "rank-0-of-1.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "empty"])
def test_damaged_state_is_noticed_and_the_one_before_is_used(tmp_path, file, how):
    for step in (1, 2):
        assert snapshot_files.save(tmp_path, make_state(step, float(step))) == ""
    path = tmp_path / "checkpoints" / "step-000000002" / file
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 0 if how == "empty" else len(content) - 1])
    said = []
    found = snapshot_files.newest(tmp_path, said.append)
    assert found.name == "step-000000001"
    assert snapshot_files.load(found).same["weight"][0, 0] == 1
    assert "step-000000002 is damaged" in said[0]
    assert snapshot_files.newest(tmp_path, said.append) == found
    assert len(said) == 1
    assert snapshot_files.save(tmp_path, make_state(2, 5.0)) == ""
    assert snapshot_files.load(snapshot_files.newest(tmp_path, said.append)).same["weight"][0, 0] == 5


def test_a_flip_of_any_bit_of_a_state_is_noticed(tmp_path):
    assert snapshot_files.save(tmp_path, make_state(1)) == ""
    folder = tmp_path / "checkpoints" / "step-000000001"
    for path in folder.iterdir():
        whole = path.read_bytes()
        for place in range(0, len(whole), 5):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert snapshot_files.damage(folder), f"bit {place % 8} of byte {place} of {path.name}"
        path.write_bytes(whole)
    assert snapshot_files.damage(folder) == ""


def test_two_states_are_kept_and_none_is_removed_before_the_new_one_is_verified(tmp_path, monkeypatch):
    for step in range(1, 6):
        assert snapshot_files.save(tmp_path, make_state(step)) == ""
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["4", "5"]

    def cut(tensors, path):
        save_file(tensors, path)
        sums_are_made_of.append(path.read_bytes())

    sums_are_made_of = []
    monkeypatch.setattr(snapshot_files, "save_file", cut)
    monkeypatch.setattr(snapshot_files, "file_sha256", lambda path, from_disk=False: f"{path.name} {from_disk}")
    assert "is not what was written" in snapshot_files.save(tmp_path, make_state(6))  # the disk shows something else
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["4", "5"]


def test_run_without_an_intact_state_is_refused(tmp_path):
    assert snapshot_files.save(tmp_path, make_state(1)) == ""
    (tmp_path / "checkpoints" / "step-000000001" / "state.json").write_text("{")
    with pytest.raises(OdcftError, match="none of its states is intact"):
        snapshot_files.newest(tmp_path, lambda line: None)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (2, 2), (2, 3), (3, 2), (1, 4), (4, 2), (6, 4), (3, 6), (6, 3)])
def test_rows_find_their_images_on_any_number_of_ranks(tmp_path, monkeypatch, before, now):
    images = 103
    folder = tmp_path / "checkpoints" / "step-000000001"
    folder.mkdir(parents=True)
    features = torch.randn(images, 3)
    for rank in range(before):
        rows = {"rows.features": features[rank::before].contiguous(), "rows.number": torch.arange(rank, images, before)}
        save_file({**rows, "own.loss": torch.tensor(float(rank))}, folder / f"rank-{rank}-of-{before}.safetensors")
    save_file({"weight": torch.ones(2)}, folder / "same.safetensors")
    files = dict.fromkeys((path.name for path in folder.iterdir()), "")
    text = json.dumps({"step": 1, "images": images, "ranks": before, "files": files})
    (folder / "state.json").write_text(json.dumps({"sha256": snapshot_files._sha256(text), "state": text}))
    monkeypatch.setattr(snapshot_files, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(dist, "world_size", lambda: now)
    for rank in range(now):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        state = snapshot_files.load(folder)
        assert torch.equal(state.rows["features"], features[rank::now])
        assert state.rows["number"].tolist() == list(range(rank, images, now))
        assert state.own["loss"] == (rank if before == now else (before - 1) / 2)


def steps(run):
    """The names in the checkpoints folder of a run, shortened."""
    return [path.name.replace("step-00000000", "") for path in sorted((run / "checkpoints").iterdir())]


def spoil(run, step, file="same.safetensors"):
    (run / "checkpoints" / f"step-{step:09d}" / file).write_bytes(b"spoilt")


# ---------------------------------------------------------------- written


def test_whether_there_is_a_state_at_all(tmp_path):
    assert not snapshot_files.exists(tmp_path)
    snapshot_files.save(tmp_path, make_state(1))
    assert snapshot_files.exists(tmp_path)
    spoil(tmp_path, 1)
    assert snapshot_files.exists(tmp_path)  # intact or not
    with pytest.raises(OdcftError, match="it has no state"):
        snapshot_files.newest(tmp_path / "other", print)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    state = make_state(3)
    state.rows["features"] = torch.randn(4, 7).T  # of a transposed tensor too
    assert snapshot_files.save(tmp_path, state) == ""
    found = snapshot_files.load(tmp_path / "checkpoints" / "step-000000003")
    for name in ("same", "rows", "own"):
        first, second = getattr(state, name), getattr(found, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert found.about["step"] == 3
    assert found.about["ranks"] == 1


def test_a_state_of_the_same_step_is_replaced_and_later_ones_of_an_earlier_attempt_are_removed(tmp_path):
    for step in (1, 3, 7):
        assert snapshot_files.save(tmp_path, make_state(step)) == ""
    assert snapshot_files.save(tmp_path, make_state(3, 2.0)) == ""
    assert steps(tmp_path) == ["3"]
    assert snapshot_files.load(tmp_path / "checkpoints" / "step-000000003").same["weight"][0, 0] == 2
    assert snapshot_files.save(tmp_path, make_state(5)) == ""
    assert steps(tmp_path) == ["3", "5"]


def test_half_written_states_of_a_killed_process_are_removed_by_the_next_save(tmp_path):
    for step in (2, 4):
        left = tmp_path / "checkpoints" / f".step-{step:09d}.unfinished"
        left.mkdir(parents=True)
        (left / "same.safetensors").write_bytes(b"half")
    assert snapshot_files.save(tmp_path, make_state(4)) == ""
    assert steps(tmp_path) == ["4"]


def test_no_state_is_removed_while_the_one_before_the_new_one_is_damaged(tmp_path):
    for step in (1, 2):
        assert snapshot_files.save(tmp_path, make_state(step)) == ""
    spoil(tmp_path, 2)
    assert snapshot_files.save(tmp_path, make_state(3)) == ""
    assert steps(tmp_path) == ["1", "2", "3"]
    assert snapshot_files.newest(tmp_path, print).name == "step-000000003"
    assert snapshot_files.save(tmp_path, make_state(4)) == ""
    assert steps(tmp_path) == ["3", "4"]


def test_files_are_synced_before_the_rename_and_the_rename_before_older_states_are_removed(tmp_path, monkeypatch):
    done, remove = [], snapshot_files.shutil.rmtree
    new = ".step-000000003.unfinished"
    for step in (1, 2):
        snapshot_files.save(tmp_path, make_state(step))
    digest, rename = snapshot_files.file_sha256, Path.rename
    monkeypatch.setattr(snapshot_files, "fsync", lambda path: done.append(("sync", path.name)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(("rename", path.name)), rename(path, to))[1])
    monkeypatch.setattr(
        snapshot_files,
        "file_sha256",
        lambda path, disk=False: (done.append(("disk" if disk else "read", path.parent.name)), digest(path, disk))[1],
    )
    monkeypatch.setattr(
        snapshot_files.shutil, "rmtree", lambda path, **how: (done.append(("gone", path.name)), remove(path))
    )
    monkeypatch.setattr(dist, "barrier", lambda: done.append(("barrier", "")))
    assert snapshot_files.save(tmp_path, make_state(3)) == ""
    written = [("sync", "rank-0-of-1.safetensors"), ("read", new), ("sync", "same.safetensors"), ("read", new)]
    assert done == [
        *written,
        ("rename", new),
        ("sync", "checkpoints"),
        *[("read", "step-000000002")] * 2,  # it was read from the disk when it was written
        *[("disk", "step-000000003")] * 2,
        ("gone", "step-000000001"),
        ("barrier", ""),
    ]


def test_a_disk_failure_is_reported_and_leaves_earlier_states(tmp_path, monkeypatch):
    snapshot_files.save(tmp_path, make_state(1))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot_files, "save_file", full)
        assert snapshot_files.save(tmp_path, make_state(2)) == "No space left on device"
    assert steps(tmp_path) == ["1"]
    with monkeypatch.context() as patched:
        patched.setattr(snapshot_files, "write_text_atomically", lambda *args: full({}, tmp_path / "x"))
        assert snapshot_files.save(tmp_path, make_state(2)) == "No space left on device"
    assert steps(tmp_path) == ["1"]
    (tmp_path / "file").write_bytes(b"")
    assert snapshot_files.save(tmp_path / "file", make_state(2)) == "Not a directory"


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    for step in (1, 2):
        snapshot_files.save(tmp_path, make_state(step))

    def held(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(snapshot_files.shutil, "rmtree", held)
    assert snapshot_files.save(tmp_path, make_state(3)) == ""
    assert steps(tmp_path) == ["1", "2", "3"]
    with monkeypatch.context() as patched:
        patched.setattr(snapshot_files, "file_sha256", lambda path, from_disk=False: str(from_disk))
        assert "is not what was written" in snapshot_files.save(tmp_path, make_state(4))
    with monkeypatch.context() as patched:
        patched.setattr(snapshot_files, "save_file", lambda *args: held(None))
        assert snapshot_files.save(tmp_path, make_state(5)) == "Device or resource busy"


def test_a_state_that_is_damaged_twice_is_set_aside_twice(tmp_path):
    said = []
    snapshot_files.save(tmp_path, make_state(1))
    for _ in range(2):
        assert snapshot_files.save(tmp_path, make_state(2)) == ""
        spoil(tmp_path, 2)
        assert snapshot_files.newest(tmp_path, said.append).name == "step-000000001"
    assert steps(tmp_path) == ["damaged-2", "1"]
    assert len(said) == 2


# ---------------------------------------------------------------- several ranks


def state_of_rank(step):
    """The state of one of several ranks: its rows of seven images, and the same weights."""
    mine = torch.tensor(list(ownership.my_images(7)))
    own = {"loss": torch.tensor(float(dist.rank()))}
    return Snapshot({"weight": torch.ones(2)}, {"labels": mine}, own, {"step": step, "images": 7})


def test_ranks_write_and_read_their_own_files_and_the_first_does_the_rest(tmp_path, on_threads):
    def work():
        failed = [snapshot_files.save(tmp_path, state_of_rank(step)) for step in (1, 2, 3)]
        state = snapshot_files.load(snapshot_files.newest(tmp_path, print))
        return failed, state.rows["labels"].tolist(), float(state.own["loss"])

    assert on_threads(3, work) == [([""] * 3, list(range(rank, 7, 3)), rank) for rank in range(3)]
    assert steps(tmp_path) == ["2", "3"]
    folder = tmp_path / "checkpoints" / "step-000000003"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"rank-{rank}-of-3.safetensors" for rank in range(3)), "same.safetensors", "state.json"]
    assert load_file(folder / "rank-1-of-3.safetensors")["rows.labels"].tolist() == [1, 4]
    assert set(json.loads(json.loads((folder / "state.json").read_text())["state"])["files"]) == set(names[:4])
    alone = snapshot_files.load(folder)
    assert alone.rows["labels"].tolist() == list(range(7))
    assert alone.own["loss"] == 1  # the mean of 0, 1 and 2


@pytest.mark.parametrize("file", ["rank-0-of-2.safetensors", "rank-1-of-2.safetensors", "same.safetensors"])
def test_ranks_agree_on_what_is_damaged_whoever_read_it(tmp_path, on_threads, file):
    on_threads(2, lambda: [snapshot_files.save(tmp_path, state_of_rank(step)) for step in (1, 2)])
    spoil(tmp_path, 2, file)
    said = []
    found = on_threads(2, lambda: snapshot_files.newest(tmp_path, said.append).name)
    assert found == ["step-000000001"] * 2
    assert f"({file} is not what was written)" in said[0]
    assert steps(tmp_path) == ["damaged-2", "1"]


def test_a_disk_failure_on_one_rank_fails_on_all(tmp_path, on_threads, monkeypatch):
    write = snapshot_files.save_file

    def full(tensors, path):
        if dist.rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(snapshot_files, "save_file", full)
    failed = on_threads(2, lambda: snapshot_files.save(tmp_path, state_of_rank(1)))
    assert failed == ["No space left on device"] * 2
    assert steps(tmp_path) == []


def test_all_ranks_see_the_states_that_rank_0_sees(tmp_path, on_threads, monkeypatch):
    """On a network disk another machine may not see the newest folder yet."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: glob(path, pattern) if dist.rank() == 0 else iter(()))
    saved = on_threads(2, lambda: [snapshot_files.save(tmp_path, state_of_rank(step)) for step in (1, 2, 3)])
    assert saved == [[""] * 3] * 2
    assert on_threads(2, lambda: snapshot_files.newest(tmp_path, print).name) == ["step-000000003"] * 2
