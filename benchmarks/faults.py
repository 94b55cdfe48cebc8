"""Does a run survive faults? Kill, stop, damage or starve small trainings at random moments, resume them until they
finish, and compare them with an undisturbed one: backbone, state, clusters and metrics (except times) must be equal to
the bit.

    python benchmarks/faults.py [--sigkill 100] [--two-ranks 20] [--sigterm 50] [--damage 8] [--disk 1] [--cost]

Every count may be 0. --disk mounts a tmpfs in its own namespace, which needs Linux and may need root.
docs/reliability.md has the results.

A training takes a few seconds and saves its state as often as it can (log.snapshot_share=1), so that many of the random
moments fall into saving. Processes are forks of this one, to save the imports; every fifth run of two ranks is started
by `--devices 2` instead.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from odcft import cli
from odcft.run import snapshot_files

LIMIT = 120.0  # seconds until a process that has not ended counts as hanging
TIMES = ("images_per_second", "data_wait", "time")
TRAINING = [
    *("--recipe", "small", "--clusters", "6", "--epochs", "4"),
    *("--set", "memory.min_cluster=3", "--set", "memory.centroid_interval=3", "--set", "neck.dropout=0.3"),
    *("--set", "optim.batch_size=8", "--set", "optim.lr=0.1", "--set", "neck.hidden=64", "--set", "neck.dim=32"),
    *("--set", "log.interval=3", "--set", "log.snapshot_minutes=0.001", "--set", "log.snapshot_share=1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sigkill", type=int, default=100, help="runs of one process to kill")
    parser.add_argument(
        "--two-ranks", type=int, default=20, help="runs of two processes to kill: one, both or the launcher"
    )
    parser.add_argument(
        "--sigterm", type=int, default=50, help="runs to stop by a signal, half of them with data workers"
    )
    parser.add_argument("--damage", type=int, default=8, help="runs whose newest state to damage")
    parser.add_argument("--disk", type=int, default=1, help="runs whose disk to fill up and then make read-only")
    parser.add_argument(
        "--cost", action="store_true", help="measure what saving a state costs, by size (writes 1.5 GB)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, help="folder to work in; by default a temporary one")
    parser.add_argument("--json", action="store_true", help="print the results on one line")
    parser.add_argument(
        "--mounted", action="store_true", help=argparse.SUPPRESS
    )  # set when this script runs itself in a namespace
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="odcft-faults-"))
    make_inputs(folder)
    draw = random.Random(args.seed)
    results: dict[str, Any] = {}

    def record(name: str, values: dict[str, Any]) -> None:
        results[name] = values
        print(f"{name}: {json.dumps(values)}", file=sys.stderr, flush=True)

    expected, _ = reference(folder, "whole")
    seconds = comparison_can_fail(folder, expected)
    record("reference", {"seconds": round(seconds, 2), "states_in_a_run": count_states(folder)})
    if args.sigkill:
        record("sigkill", repeat(args.sigkill, lambda i: killed(folder, expected, seconds, draw, i)))
    if args.sigterm:
        record("sigterm", repeat(args.sigterm, lambda i: stopped(folder, expected, seconds, draw, i)))
    if args.damage:
        record("damage", repeat(args.damage, lambda i: damaged(folder, expected, draw, i)))
    if args.disk and args.mounted:
        record("disk", repeat(args.disk, lambda i: starved(folder, expected, i)))
    elif args.disk:
        record("disk", in_a_namespace(args.disk, args.seed))
    if args.two_ranks:
        two, seconds = reference(folder, "two", ranks=2)
        record("two_ranks", repeat(args.two_ranks, lambda i: one_of_two_killed(folder, two, seconds, draw, i)))
    if args.cost:
        record("cost", {"states": cost(folder)})
    if args.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(results) if args.json else json.dumps(results, indent=2))
    sys.exit(0 if all(values.get("wrong", 0) == 0 for values in results.values()) else 1)


def repeat(count: int, one: Any) -> dict[str, Any]:
    """Do `one` that many times; return the sums of its counts, and the largest value of names that end in "_s"."""
    total: dict[str, Any] = {"runs": 0, "identical": 0, "wrong": 0}
    for i in range(count):
        figures = one(i)
        differences = figures.pop("differences")
        total["runs"] += 1
        total["identical"] += not differences
        total["wrong"] += bool(differences)
        if differences:
            total.setdefault("differences", []).append({"run": i, "what": differences})
        for name, value in figures.items():
            before = total.get(name, 0)
            total[name] = max(before, round(value, 2)) if name.endswith("_s") else before + value
    return total


# ---------------------------------------------------------------- the training and its outcome


def make_inputs(folder: Path) -> None:
    """Write 40 small images of two kinds and the checkpoint of a tiny network."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(40):
        tiles = draw.integers(0, 255, (4, 4, 3)) if i % 2 else draw.integers(0, 255, (1, 4, 3)).repeat(4, 0)
        path = folder / "images" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(tiles.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "start.pth")


def command(folder: Path, run: Path, *extra: str) -> list[str]:
    return ["finetune", str(folder / "start.pth"), str(folder / "images"), "--out", str(run), *extra]


def start(arguments: list[str], log: Path, **environment: str) -> int:
    """Run `odcft` with these arguments in a fork of this process; return the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it otherwise
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["odcft", *arguments]
        os.environ.update(environment)
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start_two(arguments: list[str], log: Path) -> list[int]:
    """Run it as two ranks, as a scheduler would start them; return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(arguments, log, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"]


def end_of(pid: int, within: float) -> int | None:
    """The exit code of a process (negative for a signal), or None if it still runs after `within` seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def end_while_saving(pid: int, run: Path, draw: random.Random) -> int | None:
    """Wait until one of the next states is being written; return the exit code if the process ends before."""
    states, seen, saving = draw.randint(1, 6), 0, False
    while seen < states:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        before, saving = saving, any((run / "checkpoints").glob(".*.unfinished"))
        seen += saving and not before
    return end_of(pid, draw.uniform(0, 0.02))


def finish(pid: int, log: Path) -> int:
    """The exit code of a process that should end on its own."""
    code = end_of(pid, LIMIT)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise RuntimeError(f"a process hangs; its output is in {log}")
    return code


def reference(folder: Path, name: str, ranks: int = 1) -> tuple[dict[str, Any], float]:
    """The outcome of an undisturbed run, and how long it takes."""
    began, log, arguments = time.monotonic(), folder / f"{name}.log", command(folder, folder / name, *TRAINING)
    pids = start_two(arguments, log) if ranks == 2 else [start(arguments, log)]
    assert all(finish(pid, log) == 0 for pid in pids), log.read_text()
    return outcome(folder / name), time.monotonic() - began


def count_states(folder: Path) -> int:
    """How often a training saves its state, counted in a separate run."""
    log = folder / "count.log"
    pid = start(command(folder, folder / "count", *TRAINING), log)
    seen: set[str] = set()
    while end_of(pid, 0.002) is None:
        seen |= {path.name for path in (folder / "count" / "checkpoints").glob("step-*")}
    return len(seen)


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves behind that must not depend on the faults on the way."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "backbone": load_file(run / "backbone" / "model.safetensors"),
        "step": last.name,
        "state": load_file(last / "same.safetensors"),
        "memory": {f"{path.name} {k}": t for path in last.glob("rank-*") for k, t in load_file(path).items()},
        "clusters": pq.read_table(run / "clusters.parquet").to_pydict(),
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "left": sorted(path.name for path in run.iterdir() if path.name != "tensorboard"),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of two outcomes that are not equal to the bit."""
    different = []
    for part, value in one.items():
        if isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values()):
            same = value.keys() == other[part].keys() and all(
                torch.equal(v.flatten().view(torch.uint8), other[part][k].flatten().view(torch.uint8))
                for k, v in value.items()
                if v.numel()
            )
        else:
            same = value == other[part]
        if not same:
            different.append(part)
    return different


def comparison_can_fail(folder: Path, expected: dict[str, Any]) -> float:
    """Check that `differences` notices another seed, one bit and one line; return how long a run takes."""
    log = folder / "other.log"
    finish(start(command(folder, folder / "other", *TRAINING, "--seed", "1"), log), log)
    noticed = differences(expected, outcome(folder / "other"))
    assert {"backbone", "state", "memory", "metrics", "clusters"} <= set(noticed), noticed
    again, seconds = reference(folder, "again")
    assert not differences(expected, again), "two undisturbed runs differ, so nothing can be compared"
    for part in ("backbone", "memory"):
        tensor = next(t for t in again[part].values() if t.numel() > 1)
        tensor.flatten()[1:2].view(torch.uint8)[0] ^= 1
        assert differences(expected, again) == [part]
        tensor.flatten()[1:2].view(torch.uint8)[0] ^= 1
    line = again["metrics"].pop(3)
    assert differences(expected, again) == ["metrics"]
    again["metrics"][3:3] = [line, line]
    assert differences(expected, again) == ["metrics"]
    return seconds


# ---------------------------------------------------------------- the faults


def killed(folder: Path, expected: dict[str, Any], seconds: float, draw: random.Random, i: int) -> dict[str, Any]:
    """Kill a run at a random moment and, with a chance of 1/3 each time, again after resuming; then let it finish.

    In every second run the first kill comes while a state is being written.
    """
    run, log = folder / f"killed-{i}", folder / f"killed-{i}.log"
    figures = {"kills": 0, "while_saving": 0, "before_first_state": 0, "after_last_step": 0}
    arguments = command(folder, run, *TRAINING)
    while True:
        pid = start(arguments, log)
        leave_alone = figures["kills"] and draw.random() > 1 / 3
        if leave_alone:
            code: int | None = finish(pid, log)
        elif i % 2 and not figures["kills"]:
            code = end_while_saving(pid, run, draw)
        else:
            code = end_of(pid, draw.uniform(0, seconds))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            figures["kills"] += 1
            figures["while_saving"] += any((run / "checkpoints").glob(".*.unfinished"))
            figures["before_first_state"] += not snapshot_files.exists(run)
            figures["after_last_step"] += (run / "checkpoints" / expected["step"]).exists()
            arguments = command(folder, run, "--resume", *(TRAINING if draw.random() < 0.5 else []))
            if not (run / "recipe.yaml").exists():  # nothing is known of it yet except the command
                arguments = command(folder, run, "--resume", *TRAINING)
        elif code == 0 and figures["kills"]:
            break
        elif code == 0:  # it finished before the kill: try again
            shutil.rmtree(run)
        else:
            return {**figures, "differences": [f"exit code {code}: {log.read_text()[-2000:]}"]}
    result = {**figures, "differences": differences(expected, outcome(run))}
    shutil.rmtree(run)
    return result


def stopped(folder: Path, expected: dict[str, Any], seconds: float, draw: random.Random, i: int) -> dict[str, Any]:
    """Send SIGTERM, SIGUSR1 or SIGINT at a random moment; the run must exit with 75 and resume."""
    run, log = folder / f"stopped-{i}", folder / f"stopped-{i}.log"
    workers = ["--set", f"data.workers={i % 2 * 2}"]
    arguments, name = command(folder, run, *TRAINING, *workers), ("SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT")[i % 4]
    figures: dict[str, Any] = {"asked": 0, "exit_75": 0, "with_workers": 0, "slowest_s": 0.0}
    while True:
        pid = start(arguments, log)
        leave_alone = figures["asked"] and draw.random() > 1 / 3
        code = end_of(pid, LIMIT if leave_alone else draw.uniform(0.05, seconds))
        if code is None:
            began = time.monotonic()
            if draw.random() < 0.5:
                os.kill(pid, getattr(signal, name))
            else:
                os.killpg(pid, getattr(signal, name))  # as schedulers do, so data workers get it too
            code = finish(pid, log)
            if code != 0:
                figures["asked"] += 1
                figures["exit_75"] += code == 75
                figures["with_workers"] += i % 2
                figures["slowest_s"] = max(figures["slowest_s"], time.monotonic() - began)
        if code not in (0, 75):
            return {**figures, "differences": [f"exit code {code}: {log.read_text()[-2000:]}"]}
        if code == 0 and figures["asked"]:
            break
        if code == 0:
            shutil.rmtree(run)  # it finished too early: try again
        else:
            arguments = command(folder, run, *TRAINING, *workers, "--resume")
    result = {**figures, "differences": differences(expected, outcome(run))}
    shutil.rmtree(run)
    return result


def damaged(folder: Path, expected: dict[str, Any], draw: random.Random, i: int) -> dict[str, Any]:
    """Truncate or empty a file of the newest state, flip one bit, or delete it: the run must use the state before."""
    run, log = folder / f"damaged-{i}", folder / f"damaged-{i}.log"
    while True:
        pid, states = start(command(folder, run, *TRAINING), log), draw.randint(2, 7)
        seen: set[Path] = set()
        while len(seen) < states and end_of(pid, 0.002) is None:
            seen |= set((run / "checkpoints").glob("step-*"))
        if len(seen) == states:
            os.kill(pid, signal.SIGTERM)
            if finish(pid, log) == 75 and len(list((run / "checkpoints").glob("step-*"))) == 2:
                break
        shutil.rmtree(run, ignore_errors=True)
    newest = max((run / "checkpoints").glob("step-*"))
    path = draw.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    how = ("cut", "flipped", "gone", "empty")[i % 4]
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    code = finish(start(command(folder, run, "--resume"), log), log)
    said = f"{newest} is damaged" in log.read_text()
    wrong = (
        [] if code == 0 and said else [f"{path.name} {how}: exit code {code}, said: {said}: {log.read_text()[-2000:]}"]
    )
    result = {how: 1, "differences": wrong or differences(expected, {**outcome(run)})}
    shutil.rmtree(run)
    return result


def in_a_namespace(count: int, seed: int) -> dict[str, Any]:
    """Run this script again in a namespace, where it may mount file systems that no one else sees."""
    nothing = [a for name in ("sigkill", "two-ranks", "sigterm", "damage") for a in (f"--{name}", "0")]
    again = [sys.executable, __file__, *nothing, "--disk", str(count), "--seed", str(seed), "--mounted", "--json"]
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        return {"skipped": "this machine does not allow namespaces"}
    done = subprocess.run([*alone, *again], capture_output=True, text=True)
    if not done.stdout:
        return {"wrong": 1, "differences": done.stderr[-2000:]}
    return json.loads(done.stdout)["disk"]


def starved(folder: Path, expected: dict[str, Any], i: int) -> dict[str, Any]:
    """Fill the disk for a while, then make it read-only: the run must continue, and nothing be missing in the end."""
    disk, log = folder / f"disk-{i}", folder / f"disk-{i}.log"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    run, ballast = disk / "run", disk / "ballast"
    pid = start(command(folder, run, *TRAINING), log)
    figures = {"full_was_said": 0, "read_only_refused": 0}
    while not snapshot_files.exists(run):
        assert end_of(pid, 0.01) is None, log.read_text()
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    code, began = None, time.monotonic()
    while code is None and "No space left" not in log.read_text() and time.monotonic() - began < LIMIT:
        code = end_of(pid, 0.01)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    ballast.unlink()
    code = finish(pid, log) if code is None else code
    figures["full_was_said"] = "No space left" in log.read_text()
    wrong = (
        [] if code == 0 and figures["full_was_said"] and len(kept) >= 1 else [f"exit {code}, {kept}: {log.read_text()}"]
    )
    found = wrong or differences(expected, outcome(run))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code = finish(start(command(folder, run, *TRAINING, "--resume", "--epochs", "7"), log), log)
    figures["read_only_refused"] = code == 2 and "Traceback" not in log.read_text()
    if not figures["read_only_refused"]:
        found = [*found, f"read-only: exit {code}: {log.read_text()[-1000:]}"]
    subprocess.run(["umount", str(disk)], check=True)
    return {**figures, "differences": found}


def one_of_two_killed(
    folder: Path, expected: dict[str, Any], seconds: float, draw: random.Random, i: int
) -> dict[str, Any]:
    """Kill rank 0, rank 1, both, or their launcher: all processes must end, and the run must resume."""
    run, log = folder / f"two-{i}", folder / f"two-{i}.log"
    who = ("rank 0", "rank 1", "both", "rank 1", "launcher")[i % 5]
    figures: dict[str, Any] = {"kills": 0, who: 0, "while_saving": 0, "slowest_end_s": 0.0}
    arguments = command(folder, run, *TRAINING)
    while True:
        if who == "launcher":
            figures["slowest_end_s"] = launcher_killed(arguments, run, log, draw.uniform(0, 0.3 * seconds))
            codes = [-9]
        else:
            pids = start_two(arguments, log)
            code = end_while_saving(pids[0], run, draw) if i % 2 else end_of(pids[0], draw.uniform(0.2, 1) * seconds)
            began = time.monotonic()
            hit = {"rank 0": pids[:1], "rank 1": pids[1:], "both": pids}[who] if code is None else []
            for pid in hit:
                os.kill(pid, signal.SIGKILL)
            codes = [code if code is not None else finish(pids[0], log), finish(pids[1], log)]
            if hit:
                figures["slowest_end_s"] = max(figures["slowest_end_s"], time.monotonic() - began)
        if any(codes):
            figures["kills"] += 1
            figures[who] += 1
            figures["while_saving"] += any((run / "checkpoints").glob(".*.unfinished"))
            break
        shutil.rmtree(run)  # it finished too early: try again
    wrong = [f"{who} was killed, and a rank ended with 0"] if 0 in codes else []
    codes = [finish(pid, log) for pid in start_two(command(folder, run, *TRAINING, "--resume"), log)]
    if any(codes):
        return {**figures, "differences": [*wrong, f"exit codes {codes}: {log.read_text()[-2000:]}"]}
    result = {**figures, "differences": wrong or differences(expected, outcome(run))}
    shutil.rmtree(run)
    return result


def launcher_killed(arguments: list[str], run: Path, log: Path, after: float) -> float:
    """Start two ranks by `--devices 2` and kill their launcher `after` seconds after the first state.

    Returns:
        Seconds until both ranks have ended.
    """
    with log.open("a") as file:
        line = [sys.executable, "-m", "odcft", *arguments, "--devices", "2"]
        process = subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True)
    while not snapshot_files.exists(run):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    time.sleep(after)
    ranks, began = children(process.pid), time.monotonic()
    process.kill()
    process.wait()
    while any(alive(pid) for pid in ranks):
        assert time.monotonic() - began < LIMIT, "a rank is still running"
        time.sleep(0.01)
    return time.monotonic() - began


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- the cost of saving


def cost(folder: Path) -> list[dict[str, Any]]:
    """Seconds to write a state of one rank, including reading it back twice, and its share of ten minutes."""
    rows = []
    for name, images, weights in (
        ("ResNet-18, 20,000 images", 20_000, 11_200_000),
        ("ResNet-50, 160,000 images: a rank of eight on ImageNet", 160_000, 28_000_000),
        ("ResNet-50, 1,281,167 images", 1_281_167, 28_000_000),
    ):
        same = {"model": torch.rand(weights), "optimizer": torch.rand(weights)}
        shares = {"features": torch.rand(images, 256), "labels": torch.zeros(images, dtype=torch.int32)}
        seconds = []
        for step in range(4):
            began = time.monotonic()
            failed = snapshot_files.save(
                folder / "cost", snapshot_files.State(same, shares, about={"step": step, "images": images})
            )
            seconds.append(time.monotonic() - began)
            assert not failed, failed
        size = sum(t.numel() * t.element_size() for t in (*same.values(), *shares.values()))
        shutil.rmtree(folder / "cost")
        typical = sorted(seconds[1:])[1]
        rows.append(
            {
                "what": name,
                "megabytes": round(size / 1e6),
                "seconds": round(typical, 2),
                "percent_at_10_minutes": round(100 * typical / (600 + typical), 2),
            }
        )
    return rows


if __name__ == "__main__":
    for module in ("odcft.train", "sklearn.metrics", "torch.utils.tensorboard"):
        import_module(module)  # before the forks
    main()
