"""Record 30 steps of every method on one rank and on two, which refactoring must not change.

    python tests/recording.py                 compare with the recording in tests/data, and print what differs
    python tests/recording.py --write FILE    make a new recording for this machine (in a separate commit that says why)

Bits are compared if there is a recording of this kind of processor with this version of torch; elsewhere values are
compared with tests/data/recording.json.

Images and weights come from numpy's generator, whose numbers do not depend on its version. Images are PNG files, which
every library decodes to the same pixels.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

DATA = Path(__file__).parent / "data"
RECORDING = DATA / "recording.json"
METHODS = ("odc", "dc", "codc")
RANKS = (1, 2)
# Ten steps an epoch; clusters become small and are refilled; dropout in the neck is 0.5.
SETTINGS = (
    *("optim.epochs=3", "optim.batch_size=8", "optim.lr=0.05", "neck.hidden=24", "neck.dim=8", "neck.dropout=0.5"),
    *("memory.clusters=6", "memory.min_cluster=7", "memory.centroid_interval=4", "memory.momentum=0.5", "dc.pca=6"),
    *(
        "log.interval=1",
        "log.tensorboard=false",
        "log.report=false",
        "data.size=32",
        "optim.precision=float32",
        "optim.schedule=step",
    ),
)
CODC = "codc.members=[{cluster: 1, rotation: 1}, {cluster: 1, mixup: 0.5}]"
PROCESSOR = {"model name": "processor", "cpu family": "family", "model": "model", "stepping": "stepping"}
VALUES = ("loss", "change_ratio", "empty", "smallest", "largest")


def write_inputs(folder: Path) -> None:
    """80 images of four kinds, and two checkpoints."""
    import timm

    draw = np.random.default_rng(7)
    (folder / "images").mkdir()
    kinds = draw.integers(0, 255, (4, 5, 5, 3))
    for i in range(80):
        pixels = np.clip(kinds[i % 4] + draw.integers(-60, 60, (5, 5, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(folder / "images" / f"{i:02d}.png")
    for name in ("one.pth", "other.pth"):
        state = timm.create_model("test_resnet", num_classes=0).state_dict()
        for key, tensor in state.items():
            if tensor.ndim > 1:
                values = draw.standard_normal(tensor.shape) * (2 / np.prod(tensor.shape[1:])) ** 0.5
                state[key] = torch.from_numpy(values.astype(np.float32))
            else:
                state[key] = torch.full_like(tensor, float(key.endswith(("weight", "running_var"))))
        torch.save(state, folder / name)


def digest(*tensors: torch.Tensor) -> str:
    """A short hash of all bits of the tensors."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()[:16]


def train(method: str, folder: Path, out: Path) -> None:
    """Train 30 steps in this process, which may be one of several, and write what was recorded to OUT-RANK.json."""
    from odcft.clustering.methods import METHODS as modules
    from odcft.distributed import dist
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    dist.start(torch.device("cpu"))
    torch.set_num_threads(1)
    seen: dict[str, list[str]] = {"memory": [], "weights": []}
    update = modules[method].update

    def recorded(state: Any, *args: Any) -> Any:
        change_ratio = update(state, *args)
        seen["memory"].append(digest(state.memory.features_SD, state.memory.labels_S, state.memory.centroids_KD))
        return change_ratio

    modules[method].update = recorded  # type: ignore[attr-defined]
    register_optimizer_step_post_hook(
        lambda optimizer, *args: seen["weights"].append(
            digest(*(p for group in optimizer.param_groups for p in group["params"]))
        )
    )
    several = method == "codc"
    recipe = load_recipe("odc_small", [*SETTINGS, f"method={method}", *([CODC] if several else [])])
    ckpts = [str(folder / name) for name in ("one.pth", "other.pth")[: 2 if several else 1]]
    run = folder / f"{method}-{dist.world_size()}"
    fine_tune(ckpts, str(folder / "images"), run, recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen["values"] = [[line[name] for name in VALUES] for line in lines]  # type: ignore[misc]
    out.with_name(f"{out.name}-{dist.rank()}.json").write_text(json.dumps(seen))
    dist.exit_process(0)


def record(method: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Run a method, and return the values of rank 0 and the hashes of every rank."""
    out = folder / f"seen-{method}-{ranks}"
    command = [sys.executable, __file__, "--train", method, str(ranks), str(folder), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text()) for rank in range(ranks)]
    return {"values": seen[0]["values"], **{name: [one[name] for one in seen] for name in ("memory", "weights")}}


def machine() -> dict[str, str]:
    """What the bits depend on besides the code."""
    about = {"torch": torch.__version__, "processor": platform.processor()}
    cpu = Path("/proc/cpuinfo")
    for line in cpu.read_text().splitlines() if cpu.exists() else ():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in PROCESSOR:
            about[PROCESSOR[name]] = value
    return about


def of_this_machine() -> dict[str, Any] | None:
    """The recording made on this kind of processor with this version of torch, whose bits must match."""
    here = machine()
    for path in sorted(DATA.glob("recording*.json")):
        kept: dict[str, Any] = json.loads(path.read_text())
        if all(here.get(name) == value for name, value in kept["machine"].items()):
            return kept
    return None


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--train", nargs=4)
    arguments = parser.parse_args()
    if arguments.train:
        from odcft.distributed.launch import run_ranks

        method, ranks, folder, out = arguments.train
        if int(ranks) > 1 and "RANK" not in os.environ:
            sys.exit(run_ranks(int(ranks)))
        train(method, Path(folder), Path(out))
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        made = {f"{method} {ranks}": record(method, ranks, Path(name)) for method in METHODS for ranks in RANKS}
    if arguments.write:
        arguments.write.write_text(json.dumps({"machine": machine(), **made}, separators=(",", ":")) + "\n")
        return
    kept = of_this_machine()
    if kept is None:
        sys.exit("There is no recording of this machine. Make one with --write before you change anything.")
    for name, now in made.items():
        print(name, "as recorded" if now == kept[name] else "differs")


if __name__ == "__main__":
    main()
