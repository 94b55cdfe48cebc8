"""Train a network from random weights on a pretext task (`odcft pretext`), if there is no checkpoint to start from.

A task is a module that turns images into puzzles and returns logits and targets; the training loop is the same for all.

Shapes: B images, M puzzles, C answers, P patches, F features.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft import files, seeds
from odcft.backbone.checkpoint_files import load_torch
from odcft.backbone.load import Loaded, normalise, refuse_unknown
from odcft.backbone.metadata import check_arguments
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import Input
from odcft.data.batches import Crops, TrainingOrder, loader
from odcft.data.feature_extraction import to_float
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.distributed import dist
from odcft.distributed.stop_signals import Stopped
from odcft.errors import OdcftError
from odcft.optim import lr_at, make_optimizer, set_lr
from odcft.plan import resolve, view_of
from odcft.precision import allow_tf32
from odcft.prepare import fitting_recipe
from odcft.pretexts.colorization import Colorization
from odcft.pretexts.jigsaw import Jigsaw
from odcft.pretexts.rotation import Rotation
from odcft.progress import Progress
from odcft.recipe import Recipe
from odcft.run import output_checks
from odcft.run.failures import explained
from odcft.text import count_of

Task = Rotation | Jigsaw | Colorization
TASKS: dict[str, type[Task]] = {"rotation": Rotation, "jigsaw": Jigsaw, "colorization": Colorization}


def train_pretext(
    task: str,
    data: str,
    arch: str,
    out: Path,
    recipe: Recipe,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a network on a pretext task from random weights, and save it after every epoch.

    Args:
        task: one of TASKS.
        data: what `find_images` takes; labels are never read.
        arch: the timm name of the network.
        out: the .pth to write: a dict with `task`, `arch`, `arch_args`, `input` ("rgb", or "lab_l" for lightness only),
            `size`, `crop_fraction` and `intensity` (as in `View`), `mean` and `std` (of RGB in 0..1, or of L in
            0..100), `epoch`, `state_dict` (`backbone.` and `head.`) and `optimizer`.
        recipe: its seed and its groups data, augment, optim and log are used. Colorization does not jitter colours.
        overwrite: replace `out`.
        resume: continue from the last epoch in `out`.
        progress: where to print.

    Returns:
        out, task, arch, images, unreadable, epochs, loss, accuracy (0..1, over the last epoch, on augmented training
        images), chance (accuracy of a random guess), recipe (the one to fine-tune with), seconds.

    Raises:
        OdcftError: for anything the user can fix.
        Stopped: within `stop_signals.listening()`, when a signal asks to stop; `out` holds the last finished epoch.
    """
    try:
        return _train(task, data, arch, out, recipe, overwrite, resume, progress or Progress())
    except Stopped as stopped:
        if out.exists():
            stopped.args = (
                f"{out} holds the last finished epoch; run the same command with --resume to continue from there.",
            )
        raise


def _train(
    task: str,
    data: str,
    arch: str,
    out: Path,
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    began = time.monotonic()
    if task not in TASKS:
        raise OdcftError(f"There is no pretext task {task}. Choose from {', '.join(TASKS)}.")
    output_checks.refuse_unreachable(out)
    if out.is_dir() or (out.exists() and not (overwrite or resume)):
        raise OdcftError(
            f"{out} exists. Pass --resume to continue from it, --overwrite to replace it, or choose another --out."
        )
    if not resume or out.is_symlink():
        output_checks.refuse_file_of_others(out)
    output_checks.refuse_unwritable(out)
    images = find_images(data)
    progress.say(f"Images      {len(images):,} in {images.source}")
    if images.skipped:
        progress.say(f"Not read    {images.not_read()}")
    state = _read_state(out, task, arch) if resume else {}
    torch.manual_seed(seeds.seed(recipe.seed, "pretext network"))
    backbone = new_backbone(arch, task, recipe)
    if state and recipe.data.range == "auto":
        recipe = recipe.model_copy(deep=True)
        recipe.data.range = tuple(state.get("intensity") or ()) or "full"
    recipe, device = resolve(recipe, [Loaded(backbone, f"scratch:{arch}", None)], images, progress)
    allow_tf32(recipe.optim.tf32)
    optim, size = recipe.optim, recipe.data.size
    assert isinstance(size, int)
    assert isinstance(recipe.data.workers, int)
    if state and state["size"] != size:
        raise OdcftError(f"{out} was trained at {state['size']} pixels, not at {size}. Choose another --out.")
    view = view_of(recipe)
    if state and "intensity" in state and tuple(state["intensity"] or ()) != (view.intensity or ()):
        raise OdcftError(
            f"{out} was trained with data.range={state['intensity']}, not {recipe.data.range}. Choose another --out."
        )
    then = {name: state.get(name) for name in ("arch_args", "mean", "std")}
    now = {"arch_args": backbone.kwargs, "mean": list(backbone.input.mean), "std": list(backbone.input.std)}
    for name in now if state else ():
        if then[name] not in (now[name], None):
            raise OdcftError(f"{out} was trained with {name}={then[name]}, not {now[name]}. Choose another --out.")
    network: Task = TASKS[task](backbone, images, size, recipe)
    network.to(device)
    if optim.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(network.backbone.parameters(), network.head.parameters(), optim)
    model = dist.parallel(network, device)
    order = TrainingOrder(len(images), optim.batch_size // dist.world_size(), optim.epochs, recipe.seed)
    progress.say(
        f"Plan        {task} · {arch} from random weights · {count_of(optim.epochs, 'epoch')} · "
        f"batch {optim.batch_size} · {size} px · {optim.precision}"
    )
    if state:
        network.backbone.net.load_state_dict(_under("backbone.", state["state_dict"]))
        network.head.load_state_dict(_under("head.", state["state_dict"]))
        optimizer.load_state_dict(state["optimizer"])
        order.first_step = state["epoch"] * order.steps_per_epoch
        if order.first_step >= order.steps:
            raise OdcftError(
                f"{out} has already been trained for {state['epoch']} epochs. Pass a larger --epochs to train on."
            )
        progress.say(f"Resuming    {out} after {state['epoch']} epochs")

    crops = Crops(images, view, recipe.augment, recipe.seed)
    sums_3 = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch so far: loss, correct answers, puzzles
    figures: dict[str, float] = {}
    unreadable: dict[int, str] = {}
    network.train()
    puzzled = len(order) * order.batch * dist.world_size()
    with explained(recipe), files.made(out.parent), progress.phase(task.capitalize(), puzzled) as advance:
        batches = iter(loader(crops, order, recipe.data.workers, device))
        for step in range(order.first_step, order.steps):
            batch = next(batches)
            for i in batch.unreadable.keys() - unreadable.keys():
                progress.say(f"Warning     {images.names[i]} is skipped: it cannot be read ({batch.unreadable[i]}).")
            unreadable |= batch.unreadable
            if len(batch.index_B) < 2:
                raise OdcftError(
                    f"Step {step}: fewer than 2 images of the batch can be read. Check the images in {images.source}."
                )
            set_lr(optimizer, lr_at(step, order.steps_per_epoch, optim))
            pixels = to_float(batch.pixels, device)
            if optim.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
                logits_MC, answer_M = model(pixels, seeds.seed(recipe.seed, "pretext puzzles", dist.rank(), step))
            loss = F.cross_entropy(logits_MC.float(), answer_M, network.weight_C)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            correct = (logits_MC.detach().argmax(1) == answer_M).sum()
            sums_3 += torch.stack([loss.detach() * len(answer_M), correct, torch.full_like(correct, len(answer_M))])
            epoch_ends = (step + 1) % order.steps_per_epoch == 0
            note = ""
            if epoch_ends or (step + 1) % recipe.log.interval == 0:
                loss_sum, correct_sum, puzzles = dist.all_sum(sums_3).tolist()
                figures = {"loss": loss_sum / puzzles, "accuracy": correct_sum / puzzles}
                if not math.isfinite(figures["loss"]):
                    raise OdcftError(
                        f"The loss is not finite at step {step} (learning rate {optim.lr:.3g}). "
                        "Start again with a lower learning rate (--set optim.lr=…)."
                    )
                note = f"epoch {step // order.steps_per_epoch + 1}/{optim.epochs} · loss {figures['loss']:.2f}"
                note += f" · {figures['accuracy']:.0%} correct"
            advance(len(batch.index_B) * dist.world_size(), note)
            if epoch_ends:
                sums_3.zero_()
                _save(out, task, network, optimizer, view, (step + 1) // order.steps_per_epoch)
    return {
        "out": str(out),
        "task": task,
        "arch": arch,
        "images": len(images),
        "unreadable": len(dist.gather_dict(unreadable)),
        "epochs": optim.epochs,
        **figures,
        "chance": 1 / logits_MC.shape[1],
        "recipe": fitting_recipe([backbone], len(images)),
        "seconds": round(time.monotonic() - began, 1),
    }


def new_backbone(arch: str, task: str, recipe: Recipe) -> Backbone:
    """Build a network with random weights, for RGB images, or for lightness only if the task is colorization."""
    refuse_unknown(arch)
    arch_args = check_arguments(recipe.backbone.arch_args or {})
    backbone = Backbone(arch, **arch_args)
    if task == "colorization":
        backbone = Backbone(arch, Input("lab_l", backbone.size, (50.0,), (50.0,)), **{**arch_args, "in_chans": 1})
    normalise(backbone, recipe.data.mean, recipe.data.std)
    return backbone


def _save(out: Path, task: str, network: Task, optimizer: torch.optim.Optimizer, view: View, epoch: int) -> None:
    """Write the checkpoint atomically, on the first rank."""
    if dist.rank() == 0:
        backbone = network.backbone
        weights = {f"backbone.{name}": tensor for name, tensor in backbone.net.state_dict().items()}
        weights |= {f"head.{name}": tensor for name, tensor in network.head.state_dict().items()}
        tree = {
            "task": task,
            "arch": backbone.arch,
            "arch_args": backbone.kwargs,
            "input": backbone.input.color,
            "size": view.size,
            "crop_fraction": view.crop_fraction,
            "intensity": None if view.intensity is None else list(view.intensity),
            "mean": list(backbone.input.mean),
            "std": list(backbone.input.std),
            "epoch": epoch,
            "state_dict": weights,
            "optimizer": optimizer.state_dict(),
        }
        with files.whole(out) as unfinished:
            files.save_checkpoint(tree, unfinished)
    dist.barrier()


def _read_state(out: Path, task: str, arch: str) -> dict[str, Any]:
    """Read the checkpoint that `_save` wrote, to resume from it."""
    try:
        if out.exists() and not out.is_file():
            raise ValueError("a folder, pipe or device")
        state = load_torch(out)
        ours = (state["task"], state["arch"])
        state["epoch"], state["state_dict"], state["optimizer"]
    except FileNotFoundError:
        raise OdcftError(
            f"{out} does not exist, so there is nothing to resume. Drop --resume to start from scratch."
        ) from None
    except Exception:  # torch raises many types for a file that is not a checkpoint
        raise OdcftError(f"{out} was not written by `odcft pretext`, so it cannot be resumed. Check --out.") from None
    if ours != (task, arch):
        raise OdcftError(f"{out} holds {ours[0]} of {ours[1]}, not {task} of {arch}. Choose another --out.")
    return state


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
