"""The state of a run on disk: enough to go on as if it had never stopped. No pickle: safetensors and JSON.

The samples memory is stored in dataset order, so a run may go on with another number of ranks. Random numbers are drawn
from seed and step alone (data.step_seed), so no generator's state has to be kept.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from odcft import dist
from odcft.memory import Memory
from odcft.methods import odc
from odcft.model import Model

KEPT = 2  # newest states


def save(run: Path, step: int, model: Model, optimizer: torch.optim.Optimizer, state: odc.State, count: int) -> Path:
    """Write `run/checkpoints/step-N`, whole or not at all, and remove all but the newest few.

    Args:
        run: the RUN folder.
        step: how many steps are done.
        model: with its weights and running statistics, the same on all ranks.
        optimizer: its momentum buffers are kept.
        state: its memory is gathered in dataset order.
        count: N, images.
    """
    memory = state.memory
    features_ND = dist.in_dataset_order(memory.features_SD, count)
    labels_N = dist.in_dataset_order(memory.labels_S, count)
    folder = run / "checkpoints" / f"step-{step:09d}"
    if dist.rank() == 0:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for number, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{slot}": t for slot, t in slots.items() if isinstance(t, Tensor)}
        tensors |= {"memory.features": features_ND, "memory.labels": labels_N, "memory.centroids": memory.centroids_KD}
        write_folder(folder, tensors, {"step": step, "images": count})
        states = sorted(folder.parent.glob("step-*"))
        for old in states[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return folder


def newest(run: Path) -> Path | None:
    """The newest state of a RUN, if there is one."""
    states = sorted((run / "checkpoints").glob("step-*"))
    return states[-1] if states else None


def load(folder: Path, model: Model, optimizer: torch.optim.Optimizer, state: odc.State) -> int:
    """Put a state back into model, optimizer and memory, in place.

    Returns:
        How many steps are done.
    """
    about = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    model.load_state_dict(_under("model.", tensors))
    device = state.memory.centroids_KD.device
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in _under("optimizer.", tensors).items():
        number, slot = name.split(".", 1)
        slots.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    owned = torch.tensor(dist.owned(about["images"]))
    odc.restore(
        state,
        tensors["memory.features"][owned].to(device),
        tensors["memory.labels"][owned].to(device),
        tensors["memory.centroids"].to(device),
    )
    return about["step"]


def write_folder(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A folder with state.safetensors and state.json that appears whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps(about))
    for file in unfinished.iterdir():
        with file.open("rb") as open_file:
            os.fsync(open_file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def memory_tensors(memory: Memory, count: int) -> dict[str, Tensor]:
    """Both memories under the names of memory.safetensors, in dataset order."""
    return {
        "features": dist.in_dataset_order(memory.features_SD, count),
        "labels": dist.in_dataset_order(memory.labels_S, count),
        "centroids": memory.centroids_KD,
    }
