"""Nothing is lost: runs are stopped, starved, damaged and gone on with, and end as if nothing had happened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odcft import members, prepare, train
from odcft.distributed import stop_signals
from odcft.distributed.delayed_reader import DelayedReader
from odcft.distributed.stop_signals import Stopped
from odcft.errors import OdcftError
from odcft.progress import Progress
from odcft.recipe import load_recipe
from odcft.run import snapshot_files
from odcft.run.collapse_warnings import summary, warnings
from odcft.run.metrics import Metrics
from odcft.train import fine_tune

ROOT = Path(__file__).parent.parent
TIMES = ("images_per_second", "data_wait", "time")
QUICK = [
    *("optim.batch_size=4", "log.interval=2", "neck.hidden=16", "neck.dim=8", "neck.dropout=0.5"),
    *("log.tensorboard=false", "log.snapshot_share=1", "optim.epochs=2", "memory.centroid_interval=2"),
]


def quick(*overrides):
    return load_recipe("small", [*QUICK, *overrides])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint, 12 images, and the outcome of a run of two epochs of three steps that nothing happens to."""
    import numpy as np
    import timm
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "c.pth")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(folder / "images" / f"{i:02d}.png")
    fine_tune(str(folder / "c.pth"), str(folder / "images"), folder / "whole", quick())
    return folder


@pytest.fixture
def go(inputs, tmp_path):
    """A function that trains into tmp_path/run; `said` collects what it says."""

    class Listener(Progress):
        def say(self, line):
            go.said.append(line)

    def go(recipe=None, **options):
        recipe = recipe or quick()
        run = options.pop("run", tmp_path / "run")
        ckpt, data = options.pop("ckpt", inputs / "c.pth"), options.pop("data", inputs / "images")
        return fine_tune(str(ckpt), str(data), run, recipe, progress=Listener(), **options)

    go.said = []
    return go


@pytest.fixture
def listening():
    """The signals are heeded, as on the command line."""
    with stop_signals.handling_signals():
        yield


def forget():
    """As in a new process."""
    stop_signals._asked = ""


def at_step(monkeypatch, wanted, do):
    """Have something happen in the middle of a step."""
    whole, calls = train.lr_at, []

    def lr_at(step, *args):
        calls.append(step)
        if step in wanted:
            do()
        return whole(step, *args)

    monkeypatch.setattr(train, "lr_at", lr_at)
    return calls


def ask_to_stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def outcome(run):
    """What must not depend on what happened on the way."""
    state = snapshot_files.load(sorted((run / "checkpoints").glob("step-*"))[-1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    tensors = {**load_file(run / "backbone" / "model.safetensors"), **state.same, **state.rows, **state.own}
    return {name: tensor.tolist() for name, tensor in tensors.items()}, figures, state.about["step"]


# ---------------------------------------------------------------- stopped and gone on with


@pytest.mark.parametrize("steps", [(0,), (1,), (2,), (1, 3, 4), (5,)])  # three steps an epoch, two a log line
def test_run_that_was_stopped_anywhere_ends_with_the_same_bits(inputs, go, tmp_path, monkeypatch, listening, steps):
    at_step(monkeypatch, steps, ask_to_stop)
    for number, step in enumerate(steps):
        with pytest.raises(Stopped, match=f"Saved after {step + 1} of 6 steps"):
            go(resume=number > 0)
        assert not (tmp_path / "run" / "backbone").exists()
        forget()
        monkeypatch.undo()
        at_step(monkeypatch, steps[number + 1 :], ask_to_stop)
    go(resume=True)
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name == "lock" or path.name[0] == "."]


def test_run_that_is_asked_before_its_first_step_begins_again(inputs, go, tmp_path, monkeypatch, listening):
    def interrupted(*args):
        ask_to_stop()
        time.sleep(1)

    monkeypatch.setattr(prepare, "kmeans", interrupted)
    with pytest.raises(Stopped, match="nothing"):
        go()
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    forget()
    go(resume=True)
    assert "has no state to resume from yet" in "".join(go.said)
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")


def test_run_that_was_killed_while_its_first_state_was_written_begins_again(inputs, go, tmp_path, monkeypatch):
    def killed(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(snapshot_files, "write_text_atomically", killed)
    with pytest.raises(RuntimeError, match="killed"):
        go()
    assert list((tmp_path / "run" / "checkpoints").glob(".*.unfinished"))
    monkeypatch.undo()
    with pytest.raises(OdcftError, match="is not empty"):
        go()
    go(resume=True)
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")


@pytest.mark.slow
def test_killed_and_stopped_processes_end_with_the_same_bits():
    """A short version of what docs/reliability.md reports."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--json", "--sigkill", "2", "--sigterm", "1"]
    nothing = ["--damage", "0", "--disk", "0", "--two-ranks", "0"]
    result = subprocess.run([*command, *nothing], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout)
    assert figures["sigkill"]["identical"] == 2
    assert figures["sigkill"]["kills"] >= 2
    assert figures["sigterm"]["asked"] == figures["sigterm"]["exit_75"] >= 1
    assert figures["sigterm"]["slowest_s"] < 30


@pytest.mark.slow
def test_two_ranks_one_killed_then_asked_to_stop_then_alone(inputs, go, tmp_path):
    run = tmp_path / "run"
    settings = [part for override in (*QUICK, "log.snapshot_minutes=0.001") for part in ("--set", override)]
    arguments = [inputs / "c.pth", inputs / "images", "--out", run, "--recipe", "small", *settings]
    command = [sys.executable, "-m", "odcft", "finetune", *map(str, arguments), "--devices", "2", "--epochs", "400"]

    def started(*extra):
        process = subprocess.Popen([*command, *extra], stderr=subprocess.PIPE, text=True)
        began, states = time.monotonic(), set((run / "checkpoints").glob("step-*"))
        while len(set((run / "checkpoints").glob("step-*")) - states) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - began < 100
            time.sleep(0.02)
        return process

    process = started()
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Continue with --resume" in err

    process = started("--resume")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "SIGUSR1: stopped. Saved after" in err

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    both = [load_file(newest / f"rank-{rank}-of-2.safetensors")["rows.features"] for rank in (0, 1)]
    alone = snapshot_files.load(newest).rows["features"]
    assert torch.equal(alone[0::2], both[0])
    assert torch.equal(alone[1::2], both[1])
    epochs = int(newest.name[5:]) // 3 + 2
    summary = go(quick("optim.epochs=400", "log.snapshot_minutes=0.001"), resume=True, epochs=epochs)
    assert summary["steps"] == 3 * epochs
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps))
    assert steps == sorted(steps)


def test_finished_run_is_left_alone(go, tmp_path):
    first = go()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = go(resume=True)
    assert "nothing is left to do" in "".join(go.said)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    (tmp_path / "run" / "clusters.parquet").unlink()  # as if it had been killed before that was written
    go(resume=True)
    assert (tmp_path / "run" / "clusters.parquet").exists()


def test_second_ctrl_c_ends_at_once_and_two_in_a_moment_are_one():
    code = (
        "import signal, time; from odcft.distributed import stop_signals as stopping\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "listening = stopping.listening(); listening.__enter__()\n"  # (a shell's background ignores SIGINT)
        "with stopping.deferred():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(2); print('still here', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for pause in (0.1, 1.5):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "stopping after this step" in err
    assert "ended at once" in err


# ---------------------------------------------------------------- only what was started goes on


@pytest.fixture(scope="module")
def stopped_once(inputs):
    """A run that was asked to stop in its fourth step."""
    with pytest.MonkeyPatch.context() as patched, stop_signals.handling_signals():
        at_step(patched, (3,), ask_to_stop)
        with pytest.raises(Stopped):
            fine_tune(str(inputs / "c.pth"), str(inputs / "images"), inputs / "stopped", quick())
    return inputs / "stopped"


@pytest.fixture
def stopped_run(stopped_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("optim.lr=0.5", "optim.lr=0.03, not 0.5"),
        ("memory.clusters=3", "memory.clusters=2, not 3"),
        ("neck.dropout=0", "neck.dropout=0.5, not 0.0"),
        ("seed=7", "seed=0, not 7"),
        ("optim.epochs=9", "optim.epochs=2, not 9.*--epochs"),
    ],
)
def test_another_recipe_is_refused(stopped_run, go, changed, message):
    with pytest.raises(OdcftError, match=message):
        go(quick(changed), resume=True)


def test_edited_recipe_in_the_run_is_noticed(stopped_run, inputs, odcft_command):
    path = stopped_run / "recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.03", "lr: 0.04"))
    code, _, err = odcft_command("finetune", inputs / "c.pth", inputs / "images", "--out", stopped_run, "--resume")
    assert code == 2
    assert "optim.lr=0.03, not 0.04" in err


def test_epochs_prolong_and_workers_and_lines_may_change(stopped_run, go):
    summary = go(quick("log.interval=1", "data.workers=1"), resume=True, epochs=3)
    assert summary["steps"] == 9
    assert load_recipe(stopped_run / "recipe.yaml").optim.epochs == 3
    with pytest.raises(OdcftError, match=r"has already done 3.0 epochs"):
        go(resume=True, epochs=2)


def test_a_prolonged_run_that_is_stopped_goes_on_without_being_told_again(stopped_run, go, monkeypatch, listening):
    at_step(monkeypatch, (5,), ask_to_stop)
    monkeypatch.setattr(
        snapshot_files, "save", lambda *args: "No space left on device"
    )  # no state knows of the new epochs
    with pytest.raises(Stopped):
        go(resume=True, epochs=4)
    forget()
    monkeypatch.undo()
    assert "4 epochs instead of 2: the learning rate goes from" in "".join(go.said)
    assert go(load_recipe(stopped_run / "recipe.yaml"), resume=True)["epochs"] == 4
    with pytest.raises(OdcftError, match=r"optim.epochs=4, not 9"):
        go(quick("optim.epochs=9"), resume=True)


def prolonged(recipe, epochs, step, steps_per_epoch=3):
    """The recipe of a run that has done so many steps and is to have so many epochs."""
    from odcft.run.resume_checks import resumed_recipe

    asked = recipe.model_dump(mode="json")
    resolved = {**asked, "optim": {**asked["optim"]}}
    if resolved["optim"]["final_epochs"] == "auto":
        resolved["optim"]["final_epochs"] = recipe.optim.epochs / 6
    saved = {"recipe": resolved, "step": step, "steps_per_epoch": steps_per_epoch}
    return resumed_recipe(recipe, epochs, Path("run"), {"asked": asked}, saved).optim


@pytest.mark.parametrize(
    ("final", "step", "expected"),
    [("auto", 15, "auto"), ("auto", 16, 7.0), ("auto", 18, 7.0), (2, 12, 2), (2, 13, 8), (0, 18, 0)],
)
def test_a_rate_that_has_dropped_does_not_rise_again_when_a_run_is_prolonged(final, step, expected):
    """Six epochs of three steps; the last sixth, or as many as are given, at the lower rate."""
    recipe = quick("optim.schedule=step", "optim.epochs=6", f"optim.final_epochs={final}")
    assert prolonged(recipe, 12, step).final_epochs == expected


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"1 are missing \(03.png\)"),
        ("new", r"1 are new \(new.png\)"),
        ("content", "the content of .*05.png has changed"),
        ("checkpoint", "was started from .*c.pth, not from .*other.pth"),
    ],
)
def test_other_data_or_checkpoint_is_refused(stopped_run, go, inputs, tmp_path, case, message, make_checkpoint):
    data, ckpt = tmp_path / "images", inputs / "c.pth"
    shutil.copytree(inputs / "images", data)
    if case == "missing":
        (data / "03.png").unlink()
    elif case == "new":
        shutil.copy(data / "03.png", data / "new.png")
    elif case == "content":
        shutil.copy(data / "03.png", data / "05.png")
    else:
        ckpt = make_checkpoint(tmp_path / "other.pth")
    with pytest.raises(OdcftError, match=message):
        go(resume=True, data=data, ckpt=ckpt)


# ---------------------------------------------------------------- faults


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
    assert "Step 3: the state could not be saved (No space left on device). The run goes on" in "".join(go.said)
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
    with pytest.raises(OdcftError, match=r"not finite at step 4 \(learning rate 0.0075\).*skip_non_finite"):
        go()
    state = snapshot_files.load(snapshot_files.newest(tmp_path / "run", print))
    assert state.about["step"] <= 4
    assert all(t.isfinite().all() for t in (*state.same.values(), *state.rows.values()))


def test_non_finite_step_is_skipped_where_that_is_wanted(go, tmp_path, monkeypatch):
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


def test_memory_that_runs_out_names_the_batch_to_try(go, monkeypatch):
    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(members, "augment_batch", full)
    with pytest.raises(OdcftError, match=r"optim.batch_size=2 --set optim.lr=0.015"):
        go()


def test_data_worker_that_dies_is_named(go, monkeypatch):
    from odcft.data import batches

    whole, me = batches.read_image, os.getpid()

    def read(path, *more):
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, *more)

    monkeypatch.setattr(batches, "read_image", read)
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
    go()  # what a killed run leaves does not lock


def test_half_a_line_of_metrics_does_not_count(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n{"step": 5}\n{"ste')
    metrics = Metrics(tmp_path, False, first_step=4)
    metrics.write(5, {"loss": 1.0})
    metrics.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 3, 5]
    assert written[-1]["loss"] == 1.0


def test_late_answers_come_a_step_later_and_survive_a_snapshot(monkeypatch):
    class Event:
        record = synchronize = staticmethod(lambda: None)

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: real(*args, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    late = DelayedReader()
    assert late._exchange(torch.tensor([1.0])) is None
    assert late._exchange(torch.tensor([2.0])).item() == 1
    resumed = DelayedReader()
    resumed.restore_pending(late.pending())
    assert resumed._exchange(torch.tensor([3.0])).item() == late._exchange(torch.tensor([3.0])).item() == 2


# ---------------------------------------------------------------- health

HEALTHY = {"loss_over_ln_k": 0.7, "entropy": 0.98, "largest_share": 0.02, "centroid_spread": 0.4}


def lines(count=9, **figures):
    return [{"step": 50 * i + 49, "epoch": (i + 1) / 2, **HEALTHY, **figures} for i in range(count)]


@pytest.mark.parametrize(
    ("figures", "trouble"),
    [
        ({}, []),
        ({"loss_over_ln_k": 0.99}, ["chance"]),
        ({"loss_over_ln_k": 2.0}, ["diverging"]),
        ({"entropy": 0.8}, ["uneven"]),
        ({"largest_share": 0.2}, ["uneven"]),
        ({"centroid_spread": 0.01}, ["alike"]),
    ],
)
def test_troubles_are_told_by_their_figures(figures, trouble):
    assert list(warnings(lines(**figures), K=156)) == trouble


def test_centroids_of_a_new_neck_are_no_collapse_in_the_first_steps_of_few_images():
    new = {"centroid_spread": 0.01, "loss": 0.5, "change_ratio": 0.1, "smallest": 3, "largest": 4, "data_wait": 0.0}
    early = {**lines(1, **new)[0], "step": 4, "epoch": 5.0}  # five images: a step an epoch
    assert not warnings([early], K=2)
    assert summary(early, "odc").endswith("too early to tell")
    assert list(warnings([{**early, "step": 49}], K=2)) == ["alike"]


def test_a_loss_at_chance_is_no_trouble_at_first_nor_once_it_has_fallen():
    assert not warnings(lines(5, loss_over_ln_k=1.0), K=156)
    history = lines(loss_over_ln_k=1.0)
    history[-3]["loss_over_ln_k"] = 0.9
    assert not warnings(history, K=156)


def test_a_classifier_that_is_always_new_is_at_chance_for_another_reason():
    assert "labels carry no signal" in warnings(lines(loss_over_ln_k=1.0), K=156)["chance"]
    assert "is re-initialised" in warnings(lines(loss_over_ln_k=1.0), K=156, method="dc")["chance"]


def test_collapsing_run_is_told_and_a_healthy_one_is_left_in_peace(go, tmp_path, make_images):
    images = make_images(tmp_path / "kinds", 48)
    base = ("memory.clusters=6", "optim.batch_size=8", "optim.schedule=step", "optim.final_epochs=0", "neck.dropout=0")
    go(quick(*base, "optim.epochs=4", "memory.min_cluster=-1", "optim.lr=5"), data=images)
    said = "".join(go.said)
    assert "the clusters are as uneven as if there were" in said
    assert "the loss is" in said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "uneven" in last["warnings"]
    go.said.clear()
    go(quick(*base, "memory.min_cluster=2", "optim.lr=0.05"), data=images, run=tmp_path / "healthy")
    assert not [line for line in go.said if "Warning" in line]
