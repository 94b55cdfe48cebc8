"""Does a run survive? Small trainings are killed, stopped and starved at random moments, resumed until they are done,
and compared with one that nothing happened to: backbone, state, clusters and metrics (but for times) must be the same
bits.

    python benchmarks/faults.py [--sigkill 100] [--two-ranks 20] [--sigterm 50] [--damage 8] [--disk 1] [--cost]

Every count may be 0. --disk mounts a tmpfs in a namespace of its own; that needs Linux, and may need root.
docs/reliability.md has the figures.

A training takes a few seconds and saves its state as often as it can (log.snapshot_share=1), so that a good part of the
moments falls into saving. Processes are forks of this one, to spare the imports; every fifth run of two ranks is
started by `--devices 2` instead.
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

LIMIT = 120.0  # seconds that a process may take to end; longer is a hang
TIMES = ("images_per_second", "data_wait", "time")
TRAINING = [
    *("--recipe", "small", "--clusters", "6", "--epochs", "4"),
    *("--set", "memory.min_cluster=3", "--set", "memory.centroid_interval=3", "--set", "neck.dropout=0.3"),
    *("--set", "optim.batch_size=8", "--set", "optim.lr=0.1", "--set", "neck.hidden=64", "--set", "neck.dim=32"),
    *("--set", "log.interval=3", "--set", "log.snapshot_minutes=0.001", "--set", "log.snapshot_share=1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sigkill", type=int, default=100, help="runs of one process, killed")
    parser.add_argument(
        "--two-ranks", type=int, default=20, help="runs of two processes; one, both or the launcher killed"
    )
    parser.add_argument("--sigterm", type=int, default=50, help="runs asked to stop, half of them with data workers")
    parser.add_argument("--damage", type=int, default=8, help="states cut, flipped or gone")
    parser.add_argument("--disk", type=int, default=1, help="runs whose disk fills up and is read-only for a time")
    parser.add_argument("--cost", action="store_true", help="what a state costs, by size (writes 1.5 GB)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)  # we are in a namespace of our own
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="odcft-faults-"))
    make_inputs(folder)
    draw = random.Random(args.seed)
    results: dict[str, Any] = {}

    def told(name: str, values: dict[str, Any]) -> None:
        results[name] = values
        print(f"{name}: {json.dumps(values)}", file=sys.stderr, flush=True)

    whole, _ = reference(folder, "whole")
    seconds = comparison_can_fail(folder, whole)
    told("reference", {"seconds": round(seconds, 2), "states_in_a_run": count_states(folder)})
    if args.sigkill:
        told("sigkill", many(args.sigkill, lambda i: killed(folder, whole, seconds, draw, i)))
    if args.sigterm:
        told("sigterm", many(args.sigterm, lambda i: stopped(folder, whole, seconds, draw, i)))
    if args.damage:
        told("damage", many(args.damage, lambda i: damaged(folder, whole, draw, i)))
    if args.disk and args.mounted:
        told("disk", many(args.disk, lambda i: starved(folder, whole, i)))
    elif args.disk:
        told("disk", in_a_namespace(args.disk, args.seed))
    if args.two_ranks:
        two, seconds = reference(folder, "two", ranks=2)
        told("two_ranks", many(args.two_ranks, lambda i: one_of_two_killed(folder, two, seconds, draw, i)))
    if args.cost:
        told("cost", {"states": cost(folder)})
    if args.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(results) if args.json else json.dumps(results, indent=2))
    sys.exit(0 if all(values.get("wrong", 0) == 0 for values in results.values()) else 1)


def many(count: int, one: Any) -> dict[str, Any]:
    """Do it so many times; sums of the counts, largest of what ends in "_s"."""
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


# ---------------------------------------------------------------- the training, and what comes of it


def make_inputs(folder: Path) -> None:
    """40 small images of two kinds and the checkpoint of a tiny network."""
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
    """`odcft` with these arguments, as a fork of this process; its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
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
    """The same as two ranks, as a scheduler would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(arguments, log, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"]


def end_of(number: int, within: float) -> int | None:
    """The exit code of a process (negative: the signal), or None if it is still there after so many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def end_while_saving(number: int, run: Path, draw: random.Random) -> int | None:
    """Wait until some state is being written; the exit code, if the process ended before."""
    states, seen, now = draw.randint(1, 6), 0, False
    while seen < states:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        before, now = now, any((run / "checkpoints").glob(".*.unfinished"))
        seen += now and not before
    return end_of(number, draw.uniform(0, 0.02))


def finish(number: int, log: Path) -> int:
    """The exit code of a process that should end by itself."""
    code = end_of(number, LIMIT)
    if code is None:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        raise RuntimeError(f"a process hangs; {log} has what it said")
    return code


def reference(folder: Path, name: str, ranks: int = 1) -> tuple[dict[str, Any], float]:
    """What comes of a run that nothing happens to, and how long it takes."""
    began, log, arguments = time.monotonic(), folder / f"{name}.log", command(folder, folder / name, *TRAINING)
    numbers = start_two(arguments, log) if ranks == 2 else [start(arguments, log)]
    assert all(finish(number, log) == 0 for number in numbers), log.read_text()
    return outcome(folder / name), time.monotonic() - began


def count_states(folder: Path) -> int:
    """How often the training saves, by counting in a run of its own."""
    log = folder / "count.log"
    number = start(command(folder, folder / "count", *TRAINING), log)
    seen: set[str] = set()
    while end_of(number, 0.002) is None:
        seen |= {path.name for path in (folder / "count" / "checkpoints").glob("step-*")}
    return len(seen)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves and that must not depend on what happened to it on the way."""
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
    """Which parts of two outcomes are not the same to the last bit."""
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


def comparison_can_fail(folder: Path, whole: dict[str, Any]) -> float:
    """Another seed must be noticed in every part; so must one bit, and one line. Returns how long a run takes."""
    log = folder / "other.log"
    finish(start(command(folder, folder / "other", *TRAINING, "--seed", "1"), log), log)
    noticed = differences(whole, outcome(folder / "other"))
    assert {"backbone", "state", "memory", "metrics", "clusters"} <= set(noticed), noticed
    again, seconds = reference(folder, "again")
    assert not differences(whole, again), "two runs that nothing happens to differ: nothing can be compared"
    for part in ("backbone", "memory"):
        tensor = next(t for t in again[part].values() if t.numel() > 1)
        tensor.flatten()[1:2].view(torch.uint8)[0] ^= 1
        assert differences(whole, again) == [part]
        tensor.flatten()[1:2].view(torch.uint8)[0] ^= 1
    line = again["metrics"].pop(3)
    assert differences(whole, again) == ["metrics"]
    again["metrics"][3:3] = [line, line]
    assert differences(whole, again) == ["metrics"]
    return seconds


# ---------------------------------------------------------------- what happens to it


def killed(folder: Path, whole: dict[str, Any], seconds: float, draw: random.Random, i: int) -> dict[str, Any]:
    """SIGKILL at a random moment, and at others while it goes on, with a chance of 1/3 each; then it may finish.

    In every second run the first moment is one of saving: soon after some state was begun.
    """
    run, log = folder / f"killed-{i}", folder / f"killed-{i}.log"
    figures = {"kills": 0, "while_saving": 0, "before_first_state": 0, "after_last_step": 0}
    arguments = command(folder, run, *TRAINING)
    while True:
        number = start(arguments, log)
        leave_alone = figures["kills"] and draw.random() > 1 / 3
        if leave_alone:
            code: int | None = finish(number, log)
        elif i % 2 and not figures["kills"]:
            code = end_while_saving(number, run, draw)
        else:
            code = end_of(number, draw.uniform(0, seconds))
        if code is None:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            figures["kills"] += 1
            figures["while_saving"] += any((run / "checkpoints").glob(".*.unfinished"))
            figures["before_first_state"] += not snapshot_files.exists(run)
            figures["after_last_step"] += (run / "checkpoints" / whole["step"]).exists()
            arguments = command(folder, run, "--resume", *(TRAINING if draw.random() < 0.5 else []))
            if not (run / "recipe.yaml").exists():  # nothing of it is known yet but the command itself
                arguments = command(folder, run, "--resume", *TRAINING)
        elif code == 0 and figures["kills"]:
            break
        elif code == 0:  # too late: again
            shutil.rmtree(run)
        else:
            return {**figures, "differences": [f"exit code {code}: {log.read_text()[-2000:]}"]}
    result = {**figures, "differences": differences(whole, outcome(run))}
    shutil.rmtree(run)
    return result


def stopped(folder: Path, whole: dict[str, Any], seconds: float, draw: random.Random, i: int) -> dict[str, Any]:
    """SIGTERM (or SIGUSR1, or SIGINT) at a random moment; it must exit with 75, and go on."""
    run, log = folder / f"stopped-{i}", folder / f"stopped-{i}.log"
    workers = ["--set", f"data.workers={i % 2 * 2}"]
    arguments, ask = command(folder, run, *TRAINING, *workers), ("SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT")[i % 4]
    figures: dict[str, Any] = {"asked": 0, "exit_75": 0, "with_workers": 0, "slowest_s": 0.0}
    while True:
        number = start(arguments, log)
        leave_alone = figures["asked"] and draw.random() > 1 / 3
        code = end_of(number, LIMIT if leave_alone else draw.uniform(0.05, seconds))
        if code is None:
            began = time.monotonic()
            if draw.random() < 0.5:
                os.kill(number, getattr(signal, ask))
            else:
                os.killpg(number, getattr(signal, ask))  # as schedulers do: data workers get it too
            code = finish(number, log)
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
            shutil.rmtree(run)  # too late: again
        else:
            arguments = command(folder, run, *TRAINING, *workers, "--resume")
    result = {**figures, "differences": differences(whole, outcome(run))}
    shutil.rmtree(run)
    return result


def damaged(folder: Path, whole: dict[str, Any], draw: random.Random, i: int) -> dict[str, Any]:
    """The newest state is cut, flipped in one bit, or loses a file: the one before it must do."""
    run, log = folder / f"damaged-{i}", folder / f"damaged-{i}.log"
    while True:
        number, states = start(command(folder, run, *TRAINING), log), draw.randint(2, 7)
        seen: set[Path] = set()
        while len(seen) < states and end_of(number, 0.002) is None:
            seen |= set((run / "checkpoints").glob("step-*"))
        if len(seen) == states:
            os.kill(number, signal.SIGTERM)
            if finish(number, log) == 75 and len(list((run / "checkpoints").glob("step-*"))) == 2:
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
    result = {how: 1, "differences": wrong or differences(whole, {**outcome(run)})}
    shutil.rmtree(run)
    return result


def in_a_namespace(count: int, seed: int) -> dict[str, Any]:
    """This script again, where it may mount what others do not see."""
    nothing = [a for name in ("sigkill", "two-ranks", "sigterm", "damage") for a in (f"--{name}", "0")]
    again = [sys.executable, __file__, *nothing, "--disk", str(count), "--seed", str(seed), "--mounted", "--json"]
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        return {"skipped": "this machine allows no namespaces"}
    done = subprocess.run([*alone, *again], capture_output=True, text=True)
    if not done.stdout:
        return {"wrong": 1, "differences": done.stderr[-2000:]}
    return json.loads(done.stdout)["disk"]


def starved(folder: Path, whole: dict[str, Any], i: int) -> dict[str, Any]:
    """The disk is full for a time, then read-only for a time: the run goes on, and nothing is missing in the end."""
    disk, log = folder / f"disk-{i}", folder / f"disk-{i}.log"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    run, ballast = disk / "run", disk / "ballast"
    number = start(command(folder, run, *TRAINING), log)
    figures = {"full_was_said": 0, "read_only_refused": 0}
    while not snapshot_files.exists(run):
        assert end_of(number, 0.01) is None, log.read_text()
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    code, began = None, time.monotonic()
    while code is None and "tried again later" not in log.read_text() and time.monotonic() - began < LIMIT:
        code = end_of(number, 0.01)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    ballast.unlink()
    code = finish(number, log) if code is None else code
    figures["full_was_said"] = "No space left" in log.read_text() and "tried again later" in log.read_text()
    wrong = (
        [] if code == 0 and figures["full_was_said"] and len(kept) >= 1 else [f"exit {code}, {kept}: {log.read_text()}"]
    )
    found = wrong or differences(whole, outcome(run))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code = finish(start(command(folder, run, *TRAINING, "--resume", "--epochs", "7"), log), log)
    figures["read_only_refused"] = code == 2 and "Traceback" not in log.read_text()
    if not figures["read_only_refused"]:
        found = [*found, f"read-only: exit {code}: {log.read_text()[-1000:]}"]
    subprocess.run(["umount", str(disk)], check=True)
    return {**figures, "differences": found}


def one_of_two_killed(
    folder: Path, whole: dict[str, Any], seconds: float, draw: random.Random, i: int
) -> dict[str, Any]:
    """Rank 0, rank 1 or both are killed, or the process that started them: all must end, and the run go on."""
    run, log = folder / f"two-{i}", folder / f"two-{i}.log"
    who = ("rank 0", "rank 1", "both", "rank 1", "launcher")[i % 5]
    figures: dict[str, Any] = {"kills": 0, who: 0, "while_saving": 0, "slowest_end_s": 0.0}
    arguments = command(folder, run, *TRAINING)
    while True:
        if who == "launcher":
            figures["slowest_end_s"] = launcher_killed(arguments, run, log, draw.uniform(0, 0.3 * seconds))
            codes = [-9]
        else:
            numbers = start_two(arguments, log)
            if i % 2:
                code = end_while_saving(numbers[0], run, draw)
            else:
                code = end_of(numbers[0], draw.uniform(0.2, 1) * seconds)
            began = time.monotonic()
            hit = {"rank 0": numbers[:1], "rank 1": numbers[1:], "both": numbers}[who] if code is None else []
            for number in hit:
                os.kill(number, signal.SIGKILL)
            codes = [code if code is not None else finish(numbers[0], log), finish(numbers[1], log)]
            if hit:
                figures["slowest_end_s"] = max(figures["slowest_end_s"], time.monotonic() - began)
        if any(codes):
            figures["kills"] += 1
            figures[who] += 1
            figures["while_saving"] += any((run / "checkpoints").glob(".*.unfinished"))
            break
        shutil.rmtree(run)  # too late: again
    wrong = [f"{who} was killed, and a rank ended with 0"] if 0 in codes else []
    codes = [finish(number, log) for number in start_two(command(folder, run, *TRAINING, "--resume"), log)]
    if any(codes):
        return {**figures, "differences": [*wrong, f"exit codes {codes}: {log.read_text()[-2000:]}"]}
    result = {**figures, "differences": wrong or differences(whole, outcome(run))}
    shutil.rmtree(run)
    return result


def launcher_killed(arguments: list[str], run: Path, log: Path, after: float) -> float:
    """Start two ranks by `--devices 2`, kill the process that started them some time after the first state; seconds
    until both have ended."""
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
    while any(alive(number) for number in ranks):
        assert time.monotonic() - began < LIMIT, "a rank is left behind"
        time.sleep(0.01)
    return time.monotonic() - began


def children(number: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    except OSError:
        return []


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- what it costs


def cost(folder: Path) -> list[dict[str, Any]]:
    """Seconds to write a state of one rank, reading it back twice included, and its share of ten minutes."""
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
