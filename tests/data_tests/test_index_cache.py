"""An index from the cache is used if it is whole and nothing has changed; else it is built again, without a word."""

import os
import shutil
import stat

import numpy as np
import pytest

from odcft.data import index_cache, sources
from odcft.data.index_cache import Index
from odcft.data.sources import find_images
from odcft.data.stores import folders


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache; every index is worth keeping, and no change is too recent."""
    monkeypatch.setenv("ODCFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "WORTH_KEEPING", 0)
    monkeypatch.setattr(index_cache, "SAME_TICK", -(10**18))
    return tmp_path / "cache" / "index"


@pytest.fixture
def searches(monkeypatch):
    """How often a folder was searched."""
    made, search = [], folders.search

    def counted(*args):
        made.append(args)
        return search(*args)

    monkeypatch.setattr(folders, "search", counted)
    return made


def entries(cache):
    return sorted(cache.glob("*.index"))


def names_now(folder):
    """What is found without a cache."""
    return list(folders.search(str(folder), sources.ENDINGS)[0])


def test_a_folder_is_searched_once(tmp_path, make_images, cache, searches):
    data = make_images(tmp_path / "set", 6)
    (data / "x.psd").touch()
    first, second = find_images(data), find_images(str(data))
    assert len(searches) == 1
    assert second.names == first.names == names_now(data)
    assert second.skipped == first.skipped == {".psd": 1}
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(entries(cache)[0].stat().st_mode) == 0o600


CHANGES = {
    "added": lambda data: shutil.copy(data / "a/000.png", data / "b/new.png"),
    "added in a new folder": lambda data: shutil.copytree(data / "a", data / "c"),
    "removed": lambda data: (data / "b/001.png").unlink(),
    "renamed": lambda data: (data / "b/001.png").rename(data / "b/001.PNG"),
    "a folder moved": lambda data: (data / "b").rename(data / "z"),
    "a folder exchanged": lambda data: ((data / "b").rename(data / "../old"), shutil.copytree(data / "a", data / "b")),
    "a link exchanged": lambda data: ((data / "link").unlink(), (data / "link").symlink_to(data.parent / "two")),
    "a link that leads somewhere now": lambda data: shutil.copytree(data / "a", data.parent / "later"),
    "inside a link": lambda data: shutil.copy(data / "a/000.png", data.parent / "one/new.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(tmp_path, make_images, cache, searches, change):
    data = make_images(tmp_path / "set", 6)
    for name in ("one", "two"):
        shutil.copytree(data / "a", tmp_path / name)
        (tmp_path / name / f"{name}.png").touch()
    (data / "link").symlink_to(tmp_path / "one")
    (data / "later").symlink_to(tmp_path / "later")
    before = list(find_images(data).names)
    CHANGES[change](data)
    after = find_images(data).names
    assert len(searches) == 2
    assert after == names_now(data)
    assert after != before


def test_a_list_is_read_again_when_it_changes(tmp_path, cache):
    path = tmp_path / "l.csv"
    path.write_text("path,label\na.png,x\nb.png,y\n")
    assert find_images(path).labels == find_images(path).labels == ["x", "y"]
    path.write_text("path,label\nb.png,x\na.png,y\n")
    assert find_images(path).names == ["b.png", "a.png"]
    assert len(entries(cache)) == 1


def test_what_was_changed_just_before_is_not_trusted(tmp_path, make_images, cache, searches, monkeypatch):
    monkeypatch.setattr(index_cache, "SAME_TICK", 2_000_000_000)
    data = make_images(tmp_path / "set", 2)
    find_images(data)
    find_images(data)
    assert len(searches) == 2
    for folder in (data, data / "a", data / "b"):
        os.utime(folder, ns=(0, 0))  # the time of the last change of anything stays: now
    find_images(data)
    assert len(searches) == 3


@pytest.mark.parametrize("place", ["off", "", "0", "/proc/nowhere", "/dev/null"])
def test_without_a_cache_all_works(tmp_path, make_images, cache, searches, monkeypatch, place):
    monkeypatch.setenv("ODCFT_CACHE", place)
    data = make_images(tmp_path / "set", 2)
    assert find_images(data).names == find_images(data).names == ["a/000.png", "b/001.png"]
    assert len(searches) == 2


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, make_images, cache, searches):
    data = make_images(tmp_path / "set", 2)
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    find_images(data)
    assert not list(cache.iterdir())


def test_the_cache_is_where_xdg_says(tmp_path, make_images, cache, monkeypatch):
    monkeypatch.delenv("ODCFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    find_images(make_images(tmp_path / "set", 2))
    assert len(list((tmp_path / "xdg/odcft/index").glob("*.index"))) == 1


def test_entries_unused_for_longest_are_removed(tmp_path, make_images, cache, monkeypatch):
    for i in range(4):
        find_images(make_images(tmp_path / str(i), 2))
        for entry in entries(cache):
            os.utime(entry, ns=(entry.stat().st_mtime_ns - 10**9,) * 2)
    find_images(tmp_path / "0")  # used: now the newest
    sizes = sum(entry.stat().st_size for entry in entries(cache))
    oldest = sorted(entries(cache), key=lambda entry: entry.stat().st_mtime_ns)[0]
    monkeypatch.setenv("ODCFT_CACHE_GB", str((sizes + 200) / 1e9))
    find_images(make_images(tmp_path / "4", 2))
    assert len(entries(cache)) == 4
    assert not oldest.exists()
    monkeypatch.setenv("ODCFT_CACHE_GB", "0")
    assert len(find_images(make_images(tmp_path / "5", 2))) == 2
    assert not entries(cache)


def test_damaged_entries_are_built_again(tmp_path, make_images, cache, searches):
    data = make_images(tmp_path / "set", 8)
    names = list(find_images(data).names)
    (entry,) = entries(cache)
    whole, draw = entry.read_bytes(), np.random.default_rng(0)
    damaged = [b"", b"x", whole[:-1], whole[: len(whole) // 2], whole + b"x", whole[:40], b"\0" * len(whole)]
    for _ in range(25):
        position = int(draw.integers(len(whole)))
        damaged.append(whole[:position] + bytes([whole[position] ^ 1 << draw.integers(8)]) + whole[position + 1 :])
    for content in damaged:
        entry.write_bytes(content)
        assert find_images(data).names == names
    padding = len(searches) - 1 - len(damaged)
    assert -10 < padding <= 0  # a flip between two arrays changes nothing
    entry.unlink()
    entry.symlink_to("/dev/zero")
    assert find_images(data).names == names


def test_an_entry_with_offsets_out_of_range_is_not_used(tmp_path, make_images, cache, searches):
    data = make_images(tmp_path / "set", 8)
    names = list(find_images(data).names)
    (entry,) = entries(cache)
    good = index_cache.read(entry, lambda index: index)
    ends = good.arrays["ends"]
    for bad in (ends + 1, ends[::-1], np.concatenate([ends[:-1], [1 << 40]]), ends[:0], ends.astype(np.int32)):
        index_cache.write(entry, Index({**good.arrays, "ends": bad}, good.about, good.watched, good.stamps, good.clock))
        assert find_images(data).names == names
    for about in ({}, {"skipped": [1]}, {"skipped": {"x": "1"}}, []):
        index_cache.write(entry, Index(good.arrays, about, good.watched, good.stamps, good.clock))
        assert find_images(data).names == names
    assert len(searches) == 10


def test_a_set_is_indexed_by_one_process_while_others_wait(tmp_path, make_images, cache):
    import multiprocessing

    data = make_images(tmp_path / "set", 4)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def slow_search(*args):
        import time

        queue.put("searched")
        time.sleep(0.3)
        return search(*args)

    search, folders.search = folders.search, slow_search
    try:
        processes = [context.Process(target=find_images, args=(data,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(20)
    finally:
        folders.search = search
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert queue.get(timeout=5) == "searched"
    assert queue.empty()


def test_files_that_are_no_entries_are_never_removed(tmp_path, monkeypatch):
    from odcft.cache_folder import cache_folder, make_room

    monkeypatch.setenv("ODCFT_CACHE", str(tmp_path))
    monkeypatch.setenv("ODCFT_CACHE_GB", "0")
    folder = cache_folder("index")
    mine = [folder / "my_thesis.txt", folder / "my_model.safetensors", folder / ("0" * 40)]
    old = folder / f"{'0' * 40}.index"
    for path in [*mine, old]:
        path.write_text("text")
    make_room(folder, keep=folder / "other")
    assert all(path.exists() for path in mine)
    assert not old.exists()
