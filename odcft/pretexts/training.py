"""Train a network from random weights on a pretext task (`odcft pretext`), if there is no checkpoint to start from.

A task is a module that turns images into puzzles and returns logits and targets; the training loop is the same for all.

Shapes: B images, M puzzles, C answers, P patches, F features.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft import files, seeds
from odcft.backbone.checkpoint_containers import load_torch
from odcft.backbone.checkpoint_metadata import check_arguments
from odcft.backbone.load import Loaded, refuse_unknown_arch, set_mean_and_std
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import Input
from odcft.data.batches import Batch, Crops, TrainingBatches, TrainingOrder
from odcft.data.custom_reader import Reader, make_reader, refuse_other_reader
from odcft.data.decoded_cache import make_cache
from odcft.data.feature_extraction import to_float
from odcft.data.images import Images
from odcft.data.sources import find_images
from odcft.distributed import dist
from odcft.distributed.stop_signals import Stopped
from odcft.errors import OdcftError
from odcft.normalisation import decide_normalisation
from odcft.optim import lr_at, make_optimizer, set_lr
from odcft.plan import Plan, make_plan
from odcft.precision import LossScale
from odcft.pretexts.colorization import Colorization
from odcft.pretexts.jigsaw import Jigsaw
from odcft.pretexts.rotation import Rotation
from odcft.progress import Progress
from odcft.recipe import Recipe, load_options
from odcft.run import output_checks
from odcft.run.failure_messages import explain_failures
from odcft.suitable_recipe import suitable_recipe
from odcft.text import count_of

Task = Rotation | Jigsaw | Colorization
TASKS: dict[str, type[Task]] = {"rotation": Rotation, "jigsaw": Jigsaw, "colorization": Colorization}


def train_pretext(
    task: str,
    data: str,
    arch: str,
    out: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reader: str | Callable[[Any], Any] | Reader | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a network on a pretext task from random weights, and save it after every epoch.

    Args:
        task: one of TASKS.
        data: what `find_images` takes; labels are never read.
        arch: the timm name of the network.
        out: the .pth to write: a dict with `task`, `arch`, `arch_args`, `input` ("rgb", or "lab_l" for lightness only),
            `size`, `crop_fraction` and `intensity` (as in `View`), `decoder` (as `data.decoder`), `mean` and `std` (of
            RGB in 0..1, or L in 0..100), `epoch`, `reader`, `state_dict` (`backbone.` and `head.`) and `optimizer`.
        recipe: its seed and its groups data, augment, optim and log are used. Colorization does not jitter colours.
        overwrite: replace `out`.
        resume: continue from the last epoch in `out`.
        reader: the user's function that reads the images (`Reader`), or its name.
        progress: where to print.

    Returns:
        out, task, arch, images, unreadable, epochs, loss, accuracy (0..1, over the last epoch, on augmented training
        images), chance (accuracy of a random guess), recipe (the one to fine-tune with), seconds.

    Raises:
        OdcftError: for anything the user can fix.
        Stopped: within `stop_signals.listening()`, when a signal asks to stop; `out` holds the last finished epoch.
    """
    progress, began = progress or Progress(), time.monotonic()
    if task not in TASKS:
        raise OdcftError(f"There is no pretext task {task}. Choose from {', '.join(TASKS)}.")
    _refuse_output(out, overwrite, resume)
    try:
        images = find_images(data, progress, make_reader(reader))
        pretext = _prepare(task, images, arch, out, recipe, resume, progress)
        with explain_failures(recipe, in_parts=False), files.new_folder(out.parent):
            figures = _train(pretext, progress)
        return {
            "out": str(out),
            "task": task,
            "arch": arch,
            "images": len(pretext.images),
            "epochs": pretext.plan.optim.epochs,
            **figures,
            "recipe": suitable_recipe([pretext.network.backbone], len(pretext.images)),
            "seconds": round(time.monotonic() - began, 1),
        }
    except Stopped as stopped:
        if out.exists():
            stopped.args = (
                f"{out} holds the last finished epoch; run the same command with --resume to continue from there.",
            )
        raise


@dataclass
class _Pretext:
    """A task that is being trained."""

    task: str
    out: Path
    network: Task
    optimizer: torch.optim.Optimizer
    plan: Plan
    images: Images
    order: TrainingOrder
    loss_scale: LossScale


def _prepare(
    task: str, images: Images, arch: str, out: Path, recipe: Recipe, resume: bool, progress: Progress
) -> _Pretext:
    """Build the network, with the weights of the last epoch if the task is resumed."""
    _refuse_settings_of_finetune(recipe)
    progress.say(f"Images      {len(images):,} in {images.source}")
    if images.skipped:
        progress.say(f"Not read    {images.skipped_summary()}")
    state = _read_state(out, task, arch) if resume else {}
    if state:
        refuse_other_reader(state.get("reader"), images.reader, out)
    torch.manual_seed(seeds.seed(recipe.seed, "pretext network"))
    backbone = new_backbone(arch, task, recipe)
    if state and recipe.data.range == "auto":
        recipe = recipe.model_copy(deep=True)
        recipe.data.range = tuple(state.get("intensity") or ()) or "full"
    if task == "rotation" and recipe.augment.quarter_turns:
        raise OdcftError(
            "augment.quarter_turns turns images at random, so nobody can predict how they were rotated. "
            "Pass --set augment.quarter_turns=false, or choose another task."
        )
    if state and recipe.data.decoder == "auto":  # older files do not say, and were made with Pillow
        recipe = recipe.model_copy(deep=True)
        recipe.data.decoder = "turbo" if state.get("decoder") == "turbo" else "pil"
    plan, notes = make_plan(recipe, [backbone], images, clustered=False)
    plan.allow_rounding()
    backbone.resize(plan.data.size)
    plan, measured = decide_normalisation(recipe, plan, [Loaded(backbone, arch)], images)
    for note in [*notes, *measured]:
        progress.say(f"Note        {note}")
    device, optim = dist.this_device(), plan.optim
    if state:
        _refuse_other_settings(out, state, backbone, plan)
    network: Task = TASKS[task](backbone, images, plan.data.size, plan)
    network.to(device)
    if optim.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(network.backbone.parameters(), network.head.parameters(), optim)
    order = TrainingOrder(len(images), optim.batch_size // dist.world_size(), optim.epochs, plan.seed)
    progress.say(
        f"Plan        {task} · {arch} from random weights · {count_of(optim.epochs, 'epoch')} · "
        f"batch {optim.batch_size} · {plan.data.size} px · {optim.precision}"
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
    scale = LossScale(optim.precision == "float16")
    scale.restore(state.get("loss_scale") or {})
    return _Pretext(task, out, network, optimizer, plan, images, order, scale)


def _refuse_settings_of_finetune(recipe: Recipe) -> None:
    """Refuse what only `finetune` does, rather than train without it."""
    if recipe.optim.accumulate != 1:
        raise OdcftError(
            "optim.accumulate is for finetune: a pretext task computes its batch in one part. Choose a smaller "
            "optim.batch_size instead."
        )
    if recipe.optim.compile:
        raise OdcftError("optim.compile is for finetune. Drop it to train a pretext task.")
    if recipe.optim.skip_padding:
        raise OdcftError("optim.skip_padding is for finetune. Drop it to train a pretext task.")
    if recipe.optim.freeze:
        raise OdcftError("optim.freeze is for finetune: a pretext task starts from random weights. Drop it.")


def _train(pretext: _Pretext, progress: Progress) -> dict[str, Any]:
    """Train to the last epoch, and save after each one.

    Returns:
        loss, accuracy, chance, and how many images could not be read.
    """
    network, optimizer, plan, order = pretext.network, pretext.optimizer, pretext.plan, pretext.order
    device, images, chance = dist.this_device(), pretext.images, 0.0
    cache = make_cache(images, plan.view) if plan.data.cache == "on" else None
    crops = Crops(images, plan.view, plan.augment, plan.seed, plan.data.decoder, cache)
    batches = TrainingBatches(crops, order, plan.data.workers, device)
    sums_3 = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch so far: loss, correct answers, puzzles
    figures: dict[str, float] = {}
    unreadable: dict[int, str] = {}
    sync_bn = [network] if plan.optim.sync_bn == "on" else []
    model, step = dist.data_parallel(network, device, sync_bn), order.first_step
    network.train()
    scale = pretext.loss_scale
    with closing(batches), progress.phase(pretext.task.capitalize(), order.images_left()) as advance:
        for epoch in range(step // order.steps_per_epoch, plan.optim.epochs):
            for batch in batches.of_epoch(step):
                _say_unreadable(batch, step, unreadable, images, progress)
                set_lr(optimizer, lr_at(step, order.steps_per_epoch, plan.optim))
                pixels = to_float(batch.pixels, device)
                if plan.optim.channels_last:
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                with plan.autocast(device):
                    logits_MC, answer_M = model(pixels, seeds.seed(plan.seed, "pretext puzzles", dist.rank(), step))
                loss = F.cross_entropy(logits_MC.float(), answer_M, network.weight_C)
                optimizer.zero_grad()
                (loss * scale.factor if scale.used else loss).backward()
                if scale.allows_step(network):
                    optimizer.step()

                correct = (logits_MC.detach().argmax(1) == answer_M).sum()
                sums_3 += torch.stack([loss.detach() * len(answer_M), correct, torch.full_like(correct, len(answer_M))])
                step, note, chance = step + 1, "", 1 / logits_MC.shape[1]
                if step % order.steps_per_epoch == 0 or step % plan.log.interval == 0:
                    figures = _figures(sums_3, step - 1, plan)
                    note = f"epoch {epoch + 1}/{plan.optim.epochs} · loss {figures['loss']:.2f}"
                    note += f" · {figures['accuracy']:.0%} correct"
                advance(len(batch.index_B) * dist.world_size(), note)
            sums_3.zero_()
            _save(pretext, epoch + 1)
    return {**figures, "chance": chance, "unreadable": len(dist.gather_dict(unreadable))}


def _say_unreadable(batch: Batch, step: int, known: dict[int, str], images: Images, progress: Progress) -> None:
    """Name each image that cannot be read once; a batch without any ends the training."""
    for i in batch.unreadable.keys() - known.keys():
        progress.say(f"Warning     {images.names[i]} is skipped: it cannot be read ({batch.unreadable[i]}).")
    known |= batch.unreadable
    if len(batch.index_B) < 2:
        raise OdcftError(
            f"Step {step}: fewer than 2 images of the batch can be read. Check the images in {images.source}."
        )


def _figures(sums_3: Tensor, step: int, plan: Plan) -> dict[str, float]:
    """Loss and accuracy of the epoch so far, over all ranks."""
    loss_sum, correct_sum, puzzles = dist.all_sum(sums_3).tolist()
    if not math.isfinite(loss_sum):
        raise OdcftError(
            f"The loss is not finite at step {step} (learning rate {plan.optim.lr:.3g}). "
            "Start again with a lower learning rate (--set optim.lr=…)."
        )
    return {"loss": loss_sum / puzzles, "accuracy": correct_sum / puzzles}


def _refuse_output(out: Path, overwrite: bool, resume: bool) -> None:
    """Refuse a file that must not be replaced or cannot be written."""
    output_checks.refuse_invalid_path(out)
    if out.is_dir() or (out.exists() and not (overwrite or resume)):
        raise OdcftError(
            f"{out} exists. Pass --resume to continue from it, --overwrite to replace it, or choose another --out."
        )
    if not resume or out.is_symlink():
        output_checks.refuse_foreign_file(out)
    output_checks.refuse_unwritable(out)


def _refuse_other_settings(out: Path, state: dict[str, Any], backbone: Backbone, plan: Plan) -> None:
    """Refuse to resume with another size, range or network than before."""
    size, intensity = plan.data.size, plan.view.intensity
    if state["size"] != size:
        raise OdcftError(f"{out} was trained at {state['size']} pixels, not at {size}. Choose another --out.")
    if "intensity" in state and tuple(state["intensity"] or ()) != (intensity or ()):
        raise OdcftError(
            f"{out} was trained with data.range={state['intensity']}, not {plan.data.range}. Choose another --out."
        )
    now = {"arch_args": backbone.arch_args, "mean": list(backbone.input.mean), "std": list(backbone.input.std)}
    for name, value in now.items():
        if state.get(name) not in (value, None):
            raise OdcftError(f"{out} was trained with {name}={state[name]}, not {value}. Choose another --out.")


def new_backbone(arch: str, task: str, recipe: Recipe) -> Backbone:
    """Build a network with random weights, for RGB images, or for lightness only if the task is colorization."""
    refuse_unknown_arch(arch)
    if recipe.data.bands not in ("auto", 3):
        raise OdcftError("odcft pretext trains on RGB images only. Drop data.bands.")
    arch_args = check_arguments(recipe.backbone.arch_args or {})
    backbone = Backbone(arch, **arch_args)
    if task == "colorization":
        backbone = Backbone(arch, Input("lab_l", backbone.size, (50.0,), (50.0,)), **{**arch_args, "in_chans": 1})
    given = load_options(recipe)
    set_mean_and_std(backbone, given["mean"], given["std"])
    return backbone


def _save(pretext: _Pretext, epoch: int) -> None:
    """Write the checkpoint atomically, on the first rank."""
    if dist.rank() == 0:
        network, view = pretext.network, pretext.plan.view
        backbone = network.backbone
        weights = {f"backbone.{name}": tensor for name, tensor in backbone.net.state_dict().items()}
        weights |= {f"head.{name}": tensor for name, tensor in network.head.state_dict().items()}
        tree = {
            "task": pretext.task,
            "arch": backbone.arch,
            "arch_args": backbone.arch_args,
            "input": backbone.input.color,
            "size": view.size,
            "crop_fraction": view.crop_fraction,
            "decoder": pretext.plan.data.decoder,
            "intensity": None if view.intensity is None else list(view.intensity),
            "mean": list(backbone.input.mean),
            "std": list(backbone.input.std),
            "epoch": epoch,
            "reader": None if pretext.images.reader is None else pretext.images.reader.name,
            "state_dict": weights,
            "optimizer": pretext.optimizer.state_dict(),
            "loss_scale": pretext.loss_scale.stored(),
        }
        with files.atomic_file(pretext.out) as unfinished:
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
