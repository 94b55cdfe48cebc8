"""Full disks, numbers that are not finite, dead workers: nothing is lost, and the failure is reported."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from stopped_runs import at_step, outcome, quick

from odcft import precision
from odcft.errors import OdcftError
from odcft.model import members
from odcft.run import snapshot_files


def test_full_disk_loses_nothing(inputs, go, tmp_path, monkeypatch):
    run, full = tmp_path / "run", []
    real_save, real_write = snapshot_files.save_file, os.write

    def save(tensors, path):
        if full:
            real_save(tensors, path)
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(tensors, path)

    def write(file, data):
        if full and file > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(file, data)

    monkeypatch.setattr(snapshot_files, "save_file", save)
    monkeypatch.setattr(os, "write", write)
    calls = at_step(monkeypatch, (1, 4), lambda: full.append(1) if not full else full.clear())
    go()
    assert calls == list(range(6))
    assert "Step 3: the state could not be saved (No space left on device). The run continues" in "".join(go.said)
    assert not list((run / "checkpoints").glob(".*"))
    assert outcome(run) == outcome(inputs / "whole")


def test_disk_that_is_full_from_the_start_is_refused(go, monkeypatch):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot_files, "save_file", full)
    with pytest.raises(OdcftError, match="cannot hold a state to resume from"):
        go()


def broken_image(monkeypatch, steps):
    whole, count = members.augment_batch, [0]

    def augment(images, *args):
        count[0] += 1
        return whole(images, *args) * (float("nan") if count[0] - 1 in steps else 1)

    monkeypatch.setattr(members, "augment_batch", augment)


def test_non_finite_step_ends_the_run_and_is_named(go, tmp_path, monkeypatch):
    broken_image(monkeypatch, {4})
    with pytest.raises(OdcftError, match=r"not finite at step 4 \(learning rate 0.025\).*skip_non_finite"):
        go()
    state = snapshot_files.load(snapshot_files.newest(tmp_path / "run", print))
    assert state.about["step"] <= 4
    assert all(t.isfinite().all() for t in (*state.same.values(), *state.rows.values()))


def test_non_finite_step_is_skipped_if_the_recipe_allows_it(go, tmp_path, monkeypatch):
    broken_image(monkeypatch, {1, 4})
    go(quick("optim.skip_non_finite=1"))
    state = snapshot_files.load(snapshot_files.newest(tmp_path / "run", print))
    assert all(t.isfinite().all() for t in (*state.same.values(), *state.rows.values()))
    assert "Step 4: a gradient is not finite; the step is skipped" in "".join(go.said)
    monkeypatch.undo()
    broken_image(monkeypatch, {1, 2})
    with pytest.raises(OdcftError, match="not finite at step 2"):
        go(quick("optim.skip_non_finite=1"), overwrite=True)


def test_skipping_that_is_not_needed_changes_nothing(inputs, go, tmp_path):
    go(quick("optim.skip_non_finite=3"))
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")


def test_a_gradient_that_overflows_in_float16_is_no_fault(go, tmp_path, monkeypatch):
    """The factor of the loss is far too large at first, and is lowered until the gradients fit."""
    monkeypatch.setattr(precision, "FIRST_FACTOR", 2.0**20)
    go(quick("optim.precision=float16", "optim.epochs=8"))
    state = snapshot_files.load(snapshot_files.newest(tmp_path / "run", print))
    assert 1 < state.about["loss_scale"]["factor"] < 2**20
    assert 0 < state.about["loss_scale"]["good_steps"] < state.about["step"] == 24
    assert all(t.isfinite().all() for t in (*state.same.values(), *state.rows.values()))
    assert "not finite" not in "".join(go.said)


@pytest.mark.parametrize("skips", [0, 1])
def test_a_loss_that_is_not_finite_is_a_fault_in_float16_too(go, tmp_path, monkeypatch, skips):
    broken_image(monkeypatch, {4} if not skips else range(4, 100))
    monkeypatch.setattr(precision, "FIRST_FACTOR", 4.0)
    # Where single steps may be skipped, first the factor is lowered to 1, as it might have been too large.
    with pytest.raises(OdcftError, match="not finite at step 4" if not skips else "not finite at step 7"):
        go(quick("optim.precision=float16", f"optim.skip_non_finite={skips}", "optim.epochs=4"))


def test_memory_that_runs_out_names_the_parts_and_the_batch_to_try(go, monkeypatch):
    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(members, "augment_batch", full)
    with pytest.raises(
        OdcftError, match=r"with --set optim.accumulate=2 .* or --set optim.batch_size=2 --set optim.lr=0.05"
    ):
        go()


def test_data_worker_that_dies_is_named(go, monkeypatch):
    from odcft.data import images

    whole, me = images.read_file, os.getpid()

    def read(path):
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path)

    monkeypatch.setattr(images, "read_file", read)
    with pytest.raises(OdcftError, match=r"A data worker died \(DataLoader worker .*--set data.workers=1"):
        go(quick("data.workers=2"))


def test_two_runs_cannot_write_to_one_folder(go, tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from odcft.run.lock import locked\n"
        "with locked(Path(sys.argv[1]), print):\n"
        "    print('locked', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OdcftError, match=rf"Another run is writing to .* \(process {other.pid} on "):
            go(**options)
    other.kill()
    other.wait()
    go()  # the lock of a killed run does not count
