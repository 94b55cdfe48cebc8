"""Images and checkpoints that tests make for themselves: nothing is downloaded."""

import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
os.environ["ODCFT_CACHE"] = "off"  # nothing outside the folders of tests is written


@pytest.fixture(autouse=True, scope="session")
def no_cache():
    """Tests neither read nor write the cache of whoever runs them."""
    os.environ["ODCFT_CACHE"] = "off"


@pytest.fixture(autouse=True, scope="session")
def temporary_files(tmp_path_factory):
    """What libraries leave in the folder for temporary files (wandb, torchrun) goes when the tests end."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        patched.setattr(tempfile, "tempdir", None)  # asked for anew
        yield


@pytest.fixture(autouse=True, scope="session")
def write_at_end():
    """Runs of tests end without a report, which takes seconds; this is the function that writes it."""
    from odcft.reports import during_a_run

    with pytest.MonkeyPatch.context() as patched:
        real = during_a_run.write_at_end
        patched.setattr(during_a_run, "write_at_end", lambda *args, **options: None)
        yield real


@pytest.fixture
def make_images():
    """A function that writes `count` small photographs-like images of two kinds into folders `a` and `b`."""

    def make(folder, count=12, side=32):
        draw = np.random.default_rng(0)
        for i in range(count):
            kind = "ab"[i % 2]
            base = draw.integers(0, 255, (4, 4, 3)) if kind == "a" else draw.integers(0, 255, (1, 4, 3)).repeat(4, 0)
            path = folder / kind / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(base.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC).save(path)
        return folder

    return make


@pytest.fixture
def make_checkpoint():
    """A function that writes a checkpoint of a small timm network, as people's training code saves it."""

    def make(path, arch="test_resnet", prefix="module.", wrap="state_dict", seed=0, **extra):
        import timm

        torch.manual_seed(seed)
        net = timm.create_model(arch, num_classes=4)
        state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
        torch.save({wrap: state, "epoch": 3, **extra} if wrap else state, path)
        return path

    return make


@pytest.fixture
def outside(tmp_path):
    """A folder of the user's that nothing may happen to."""
    (tmp_path / "outside" / "inner").mkdir(parents=True)
    (tmp_path / "outside" / "precious").write_text("mine")
    (tmp_path / "outside" / "inner" / "precious").write_text("mine, too")
    return tmp_path / "outside"


@pytest.fixture
def odcft_command(capfd):
    """A function that runs the command line in this process: arguments in, (exit code, stdout, stderr) out."""
    import sys

    from odcft.cli import main

    def run(*args):
        old, sys.argv = sys.argv, ["odcft", *map(str, args)]
        try:
            main()
        except SystemExit as end:
            out, err = capfd.readouterr()
            return end.code, out, err
        finally:
            sys.argv = old

    return run


@pytest.fixture
def on_threads(monkeypatch):
    """A function that runs `work()` on so many ranks, threads of this process, and returns what each of them returned.

    A collective that not every rank joins, or not in the same order, fails.
    """
    from odcft.distributed import dist

    def run(count, work):
        this, gate, board = threading.local(), threading.Barrier(count, timeout=10), [None] * count

        def exchange(kind, mine):
            board[this.rank] = (kind, mine)
            gate.wait()
            kinds, parts = zip(*board, strict=True)
            assert set(kinds) == {kind}
            gate.wait()
            return parts

        def all_sum_(*tensors):
            for tensor in tensors:
                tensor.copy_(sum(exchange(f"sum {tuple(tensor.shape)} {tensor.dtype}", tensor.clone())))

        def broadcast_(*tensors):
            for tensor in tensors:
                tensor.copy_(exchange("broadcast", tensor.clone())[0])

        def gather_filled(rows, most, fill=0.0):
            filled = rows.new_full((most, *rows.shape[1:]), fill)
            filled[: len(rows)] = rows
            return torch.cat(exchange("filled", filled))

        def gather_dict(mine):
            return {key: value for part in exchange("dict", dict(mine)) for key, value in part.items()}

        def one(rank):
            this.rank = rank
            try:
                return work()
            except BaseException:
                gate.abort()
                raise

        with monkeypatch.context() as patched, ThreadPoolExecutor(count) as pool:
            patched.setattr(dist, "rank", lambda: this.rank)
            patched.setattr(dist, "world_size", lambda: count)
            patched.setattr(dist, "all_sum_", all_sum_)
            patched.setattr(dist, "broadcast_", broadcast_)
            patched.setattr(dist, "gather_dict", gather_dict)
            patched.setattr(dist, "gather_rows", lambda rows: torch.cat(exchange("rows", rows.clone())))
            patched.setattr(dist, "gather_filled", gather_filled)
            patched.setattr(dist, "barrier", lambda: exchange("barrier", None))
            ranks = [pool.submit(one, rank) for rank in range(count)]
            errors = sorted(filter(None, (rank.exception() for rank in ranks)), key=_is_broken_barrier)
            if errors:
                raise errors[0]  # of the rank that failed first; the others only missed it
            return [rank.result() for rank in ranks]

    return run


def _is_broken_barrier(error):
    return isinstance(error, threading.BrokenBarrierError)
