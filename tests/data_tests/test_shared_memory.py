"""Data workers where shared memory is short, full or unusable: the run continues without it, or ends with an error."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from odcft.data import batches, shared_memory
from odcft.data.batches import Batch, Crops, make_loader, sequential_batches
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.plan import fill_autos, notes_on_queue
from odcft.recipe import load_recipe
from odcft.run.failure_messages import explain_failures


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch):
    monkeypatch.setattr(shared_memory, "_warned", set())


@pytest.fixture
def crops(tmp_path, make_images):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"x")
    return Crops(find_images(make_images(tmp_path / "images", 11)), View(16))


def read(crops, workers):
    batches = make_loader(crops, sequential_batches(range(len(crops.images)), 4), workers, torch.device("cpu"))
    return [(batch.pixels, batch.index_B.tolist(), batch.unreadable) for batch in batches]


def same(some, others):
    return all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(some, others, strict=True))


def no_room(self):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_batches_from_workers_are_those_without(crops):
    assert same(read(crops, 2), read(crops, 0))


@pytest.mark.filterwarnings("ignore:/dev/shm is full")
def test_batches_without_shared_memory_come_through_the_pipe(crops, monkeypatch):
    expected = read(crops, 0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    assert same(read(crops, 2), expected)


def test_full_shared_memory_is_reported_once(crops, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    with pytest.warns(UserWarning, match="/dev/shm is full.*--shm-size=8g") as said:
        read(crops, 1)
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:/dev/shm is full")
def test_batch_without_any_image_comes_through_the_pipe(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    crops = Crops(find_images(tmp_path), View(16))
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    assert same(read(crops, 1), read(crops, 0))


@pytest.mark.parametrize("reason", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_without_locks_there_are_no_workers_and_the_reason_is_given(crops, monkeypatch, reason):
    def lock():
        raise OSError(reason, os.strerror(reason))

    expected = read(crops, 0)
    monkeypatch.setattr(multiprocessing, "Lock", lock)
    with pytest.warns(UserWarning, match=rf"Data workers cannot use /dev/shm \({os.strerror(reason)}\)"):
        assert same(read(crops, 2), expected)


def test_only_the_first_rank_warns(monkeypatch, recwarn):
    monkeypatch.setattr(shared_memory.dist, "rank", lambda: 1)
    shared_memory._warn_once("anything")
    assert not recwarn


def test_a_batch_that_cannot_be_sent_at_all_ends_the_run_with_an_error(crops, monkeypatch):
    def reduce(self):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Batch, "__reduce__", reduce)
    began = time.monotonic()
    with pytest.raises(OdcftError, match="A data worker died"), explain_failures(load_recipe("small")):
        read(crops, 2)
    assert time.monotonic() - began < 20


def test_a_worker_killed_by_full_shared_memory_is_reported_with_the_remedy(crops, monkeypatch):
    me = os.getpid()

    def centre_crop(image, view):
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(batches, "centre_crop", centre_crop)
    cure = pytest.raises(OdcftError, match=r"A data worker died .*--shm-size=8g.*--set data.workers=")
    with cure, explain_failures(load_recipe("small")):
        read(crops, 2)


@pytest.mark.slow
def test_a_worker_exits_when_its_reader_is_gone(tmp_path):
    """The pipe is full and its reader was killed: the worker would block in a write for ever."""
    code = (
        "import os, time, torch\n"
        "from odcft.data import batches as data\n"
        "from odcft.data.view import View\n"
        "class Large:\n"
        "    view = View(600)\n"
        "    def __getitem__(self, key): return torch.zeros(3, 600, 600, dtype=torch.uint8), 0\n"
        "def no_room(self): raise RuntimeError('no room')\n"
        "torch.Tensor.share_memory_ = no_room\n"
        "batches = iter(data.make_loader(Large(), [[(0, 0)]] * 9, 1, torch.device('cpu')))\n"
        "print(batches._workers[0].pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    time.sleep(1)
    process.kill()
    process.communicate()
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}"):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker is still there")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a small /dev/shm")
@pytest.mark.parametrize("size", ["size=1m", "size=1m,ro"])
def test_run_ends_with_the_same_bits_on_a_small_shared_memory(crops, tmp_path, size):
    code = (
        "import sys, torch, warnings; from odcft.data import batches as data; from odcft.data.view import View\n"
        "from odcft.data.sources import find_images\n"
        "warnings.simplefilter('ignore')\n"
        "crops = data.Crops(find_images(sys.argv[1]), View(400))\n"
        "for workers in (0, 2):\n"
        "    batches = data.make_loader(crops, data.sequential_batches(range(12), 3), workers, torch.device('cpu'))\n"
        "    print(sum((batch.pixels.double() * batch.index_B.view(-1, 1, 1, 1)).sum().item() for batch in batches))\n"
    )
    inside = f'mount -t tmpfs -o {size} tmpfs /dev/shm || exit 77; "$@"'
    command = ["unshare", "-m", "sh", "-c", inside, "sh", sys.executable, "-c", code, str(crops.images.root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode == 77:
        pytest.skip("may not mount")
    assert result.returncode == 0, result.stderr
    alone, with_workers = result.stdout.split()
    assert alone == with_workers


@pytest.mark.parametrize(
    ("free", "queue"),
    [
        (64 << 30, (4, True)),
        (16 << 30, (3, True)),
        (8 << 30, (1, True)),
        (4 << 30, (1, False)),
        (64 << 20, (1, False)),
        (None, (4, True)),
    ],
)
def test_the_queues_of_all_ranks_fit_in_half_of_the_free_shared_memory(monkeypatch, free, queue):
    monkeypatch.setattr(shared_memory, "_free_at_first", lambda: free)
    monkeypatch.setattr(shared_memory.dist, "local_world_size", lambda: 8)
    batch = 3 * 224 * 224 * 128
    ahead, shared = shared_memory.fitting_queue(16, batch)
    assert (ahead, shared) == queue
    if free and shared:
        assert 8 * 16 * ahead * batch <= free / 2


@pytest.mark.parametrize(("batches_that_fit", "ahead", "told"), [(20, 4, 0), (5, 1, 1), (1, 1, 1)])
def test_loader_and_plan_take_the_queue_that_fits(crops, monkeypatch, batches_that_fit, ahead, told):
    size = crops.view.size
    monkeypatch.setattr(shared_memory, "_free_at_first", lambda: 2 * 3 * size**2 * 3 * batches_that_fit)
    loader = make_loader(crops, sequential_batches(range(12), 3), 2, torch.device("cpu"))
    shared = batches_that_fit > 1
    assert loader.prefetch_factor == min(4, max(1, batches_that_fit // 2))
    with pytest.warns(UserWarning, match="too small, so batches go through pipes") if not shared else nullcontext():
        assert sum(len(batch.index_B) for batch in loader) == 11  # one is broken
    plan = fill_autos(load_recipe("small", ["data.workers=5", "optim.batch_size=3"]), size=size)
    plan.data.size = size
    notes = notes_on_queue(plan)
    assert [f"reads {ahead} instead of 4" in note for note in notes] == [True] * told
    assert sum("through a pipe" in note for note in notes) == (batches_that_fit == 1)
