"""Pretext tasks: a checkpoint to start from where there is none (`odcft pretext`).

A task is a network that makes puzzles of images and says which answers it believes in; the loop is one for all.

Shapes: B images, M puzzles, C answers, P patches, F features.
"""

import math
import time
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft import dist, folders, seeds
from odcft.advice import explained
from odcft.augment import augment_batch, turned
from odcft.backbone import Backbone, Loaded, normalise, refuse_unknown
from odcft.checkpoint import load_torch
from odcft.color import colours, lab, nearest_colour
from odcft.data import Crops, Images, TrainingOrder, find_images, in_order, loader
from odcft.description import check_arguments
from odcft.errors import OdcftError
from odcft.features import to_float
from odcft.inputs import Input, View
from odcft.log import Progress, count_of
from odcft.optim import lr_at, make_optimizer, set_lr
from odcft.precision import allow_tf32
from odcft.recipe import Recipe
from odcft.stopping import Stopped
from odcft.train import fitting_recipe, resolve, view_of


class Rotation(nn.Module):
    """By how many quarters was the image turned (Gidaris et al., ICLR 2018)?"""

    weight_C = None

    def __init__(self, backbone: Backbone, images: Images, size: int, recipe: Recipe) -> None:
        super().__init__()
        self.backbone, self.augment = backbone, recipe.augment
        self.head = nn.Linear(backbone.width, 4)

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H), RGB in 0..1, to logits (B, 4) and answers (B,)."""
        generator = torch.Generator().manual_seed(seed)
        images = augment_batch(images, self.augment, generator)
        turn_B = torch.randint(4, (len(images),), generator=generator).to(images.device, non_blocking=True)
        return self.head(self.backbone(turned(images, turn_B))), turn_B


class Jigsaw(nn.Module):
    """In which order were the patches laid (Noroozi and Favaro, ECCV 2016)?

    3 x 3 patches and 100 orders as there, from 96 pixels on. Smaller images are cut into 2 x 2, and all 24 orders are
    asked for: a ninth of 32 pixels is 10, less a gap too little to see anything in.

    Against shortcuts: each patch is cut from a random place in its cell, so that edges do not run on; is normalised by
    its own mean and spread; and its colours are jittered or dropped (`augment`) by themselves.
    """

    weight_C = None

    def __init__(self, backbone: Backbone, images: Images, size: int, recipe: Recipe) -> None:
        super().__init__()
        self.backbone, self.augment = backbone, recipe.augment
        self.side = 3 if size >= 96 else 2
        patch = size // self.side * 7 // 8
        if not backbone.takes(patch):
            raise OdcftError(
                f"{backbone.arch} cannot look at patches of {patch} pixels, which jigsaw cuts from images of {size}. "
                "Take rotation, a larger --set data.size, or another --arch."
            )
        self.order_CP: Tensor
        self.register_buffer("order_CP", orders(self.side**2, 100 if self.side == 3 else 24), persistent=False)
        self.head = nn.ModuleDict(
            {
                "patch": nn.Linear(backbone.width, 256),
                "all": nn.Sequential(
                    nn.BatchNorm1d(256 * self.side**2),
                    nn.ReLU(),
                    nn.Linear(256 * self.side**2, len(self.order_CP)),
                ),
            }
        )

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H), RGB in 0..1, to logits (B, C) and answers (B,)."""
        generator = torch.Generator().manual_seed(seed)
        B, P = len(images), self.side**2
        patches = cut(images, self.side, generator)  # (B * P, 3, h, h)
        patches = augment_batch(patches, self.augment, generator)
        mean, spread = patches.mean((2, 3), keepdim=True), patches.std((2, 3), keepdim=True)
        patches = (patches - mean) / (spread + 0.02)  # a patch of sky stays one, its noise is not blown up
        answer_B = torch.randint(len(self.order_CP), (B,), generator=generator).to(images.device, non_blocking=True)
        # On a CPU in float32: on maps of one pixel torch 2.13's bfloat16 convolutions leave uninitialised memory in
        # the gradients of filter taps that see only padding.
        exact = images.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if exact else nullcontext():
            features_MF = self.backbone.net(patches)
        features_BPF = self.head["patch"](features_MF).view(B, P, -1)
        laid_BPF = features_BPF.gather(1, self.order_CP[answer_B].unsqueeze(2).expand_as(features_BPF))
        return self.head["all"](laid_BPF.flatten(1)), answer_B


def cut(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A patch from each cell of a side x side grid, at a random place in the cell: (B, C, H, H) to (B * P, C, h, h).

    Patches have 7 / 8 of the cell's side (Noroozi and Favaro: 64 of 75 pixels): no gap, or up to a quarter of the cell.
    """
    B, C, H, _ = images.shape
    cell = H // side
    patch = cell * 7 // 8
    corner_B2P = torch.randint(cell - patch + 1, (B, 2, side * side), generator=generator)
    place = torch.arange(side * side)
    corner_B2P += cell * torch.stack([place // side, place % side])
    span = torch.arange(patch)
    rows, columns = (corner_B2P.unsqueeze(3) + span).to(images.device, non_blocking=True).unbind(1)  # (B, P, h) each
    batch = torch.arange(B, device=images.device).view(B, 1, 1, 1)
    patches = images.permute(0, 2, 3, 1)[batch, rows.unsqueeze(3), columns.unsqueeze(2)]  # (B, P, h, h, C)
    return patches.permute(0, 1, 4, 2, 3).reshape(-1, C, patch, patch)


def orders(patches: int, count: int) -> Tensor:
    """Orders of the patches that are told apart most easily: each is the farthest (Hamming) from those before it.

    Args:
        patches: P.
        count: how many, at most P!.

    Returns:
        (count, P) int64, the first in place.
    """
    every = torch.tensor(list(permutations(range(patches))))
    chosen = [0]
    distance = torch.full((len(every),), patches + 1)
    while len(chosen) < min(count, len(every)):
        distance = torch.minimum(distance, (every != every[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return every[chosen]


class Colorization(nn.Module):
    """Which colour has each place of a gray image (Zhang et al., ECCV 2016)?

    The backbone sees lightness alone. Each cell of its last feature map tells the colours of its own part of the image,
    4 x 4 of them: one cell at 32 pixels, 7 x 7 at 224. A colour is one of 260 squares of the ab plane; rare ones
    weigh more. The answer is the nearest square, where the paper spreads it over five.
    """

    CELL = 4

    def __init__(self, backbone: Backbone, images: Images, size: int, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.eval()  # looked at once, for its shape
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, size, size))
        if maps.ndim != 4 or maps.shape[1] != backbone.net.num_features:
            raise OdcftError(
                f"colorization needs feature maps (B, F, h, w), and {backbone.arch} gives {tuple(maps.shape)}. "
                "Take rotation or jigsaw, or a convolutional network."
            )
        self.colours_Q2: Tensor
        self.weight_C: Tensor
        self.register_buffer("colours_Q2", colours(), persistent=False)
        weight_C = rebalancing(images, size, self.colours_Q2, intensity=view_of(recipe).intensity)
        self.register_buffer("weight_C", weight_C, persistent=False)
        self.head = nn.Conv2d(maps.shape[1], len(self.colours_Q2) * self.CELL**2, 1)

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H), RGB in 0..1, to logits (M, Q) of all places and their colours (M,)."""
        logits = F.pixel_shuffle(self.head(self._maps(images)), self.CELL)  # (B, Q, h, w)
        ab = F.adaptive_avg_pool2d(lab(images)[:, 1:], (logits.shape[2], logits.shape[3])).permute(0, 2, 3, 1)
        return logits.permute(0, 2, 3, 1).flatten(0, 2), nearest_colour(ab, self.colours_Q2).flatten()

    def _maps(self, images: Tensor) -> Tensor:
        net: Any = self.backbone.net
        return net.forward_features(self.backbone.adapter(images))


def rebalancing(
    images: Images,
    size: int,
    colours_Q2: Tensor,
    most: int = 2000,
    intensity: tuple[float, float] | None = None,
) -> Tensor:
    """How much each colour weighs in the loss (Zhang et al., sec. 2.2): 1 over a mixture of its share and 1 / Q.

    Args:
        images: shares are counted in some 2,000 of them.
        size: pixels of the input.
        colours_Q2: (Q, 2).
        most: images to look at.
        intensity: as in `View`.

    Returns:
        (Q,) float32; the mean weight of a place is 1.
    """
    rows = range(0, len(images), max(1, len(images) // most))
    crops = Crops(images, View(size, 1.0, intensity=intensity))
    counts_Q = torch.zeros(len(colours_Q2))
    for batch in loader(crops, in_order(rows, 128), 0, torch.device("cpu")):
        if len(batch.index_B):
            ab = F.avg_pool2d(lab(to_float(batch.pixels, torch.device("cpu")))[:, 1:], 4).permute(0, 2, 3, 1)
            counts_Q += torch.bincount(nearest_colour(ab, colours_Q2).flatten(), minlength=len(colours_Q2))
    if counts_Q.sum() == 0:
        raise OdcftError(f"None of {len(rows):,} images of {images.source} can be read.")
    share_Q = counts_Q / counts_Q.sum()
    # Smoothed with a Gaussian of 5 units, so that a colour nobody has counted is not infinitely rare.
    near_QQ = torch.exp(-torch.cdist(colours_Q2, colours_Q2).square() / (2 * 5.0**2))
    share_Q = near_QQ / near_QQ.sum(0) @ share_Q
    weight_Q = 1 / (0.5 * share_Q + 0.5 / len(share_Q))
    return weight_Q / (share_Q * weight_Q).sum()


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
        arch: a timm name.
        out: the .pth to write: a dict with `task`, `arch`, `arch_args`, `input` ("rgb", or "lab_l": lightness alone),
            `size`, `crop_fraction` and `intensity` (as in `View`), `mean` and `std` (of RGB in 0..1, or of L in
            0..100), `epoch`, `state_dict` (`backbone.` and `head.`) and `optimizer`.
        recipe: its groups data, augment, optim and log, and the seed. Colorization leaves colours as they are.
        overwrite: replace `out`.
        resume: go on with `out`, from its last epoch.
        progress: where to speak.

    Returns:
        out, task, arch, images, unreadable, epochs, loss, accuracy (0..1, over the last epoch, on augmented training
        images), chance (of an answer), recipe (to fine-tune with), seconds.

    Raises:
        OdcftError: for anything the user can mend.
        Stopped: within `stopping.listening()`, asked to stop by a signal; `out` holds the last finished epoch.
    """
    try:
        return _train(task, data, arch, out, recipe, overwrite, resume, progress or Progress())
    except Stopped as stopped:
        if out.exists():
            stopped.args = (f"{out} holds the last finished epoch; the same command with --resume goes on from there.",)
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
        raise OdcftError(f"{task}: no such pretext task. Choose from {', '.join(TASKS)}.")
    folders.refuse_unreachable(out)
    if out.is_dir() or (out.exists() and not (overwrite or resume)):
        raise OdcftError(
            f"{out} exists. Pass --resume to go on with it, --overwrite to replace it, or choose another --out."
        )
    if not resume or out.is_symlink():
        folders.refuse_file_of_others(out)
    folders.refuse_unwritable(out)
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
            raise OdcftError(f"{out} has had its {state['epoch']} epochs. Pass more with --epochs to prolong it.")
        progress.say(f"Resuming    {out} after {state['epoch']} epochs")

    crops = Crops(images, view, recipe.augment, recipe.seed)
    sums_3 = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, puzzles since the epoch began
    figures: dict[str, float] = {}
    unreadable: dict[int, str] = {}
    network.train()
    puzzled = len(order) * order.batch * dist.world_size()
    with explained(recipe), folders.made(out.parent), progress.phase(task.capitalize(), puzzled) as advance:
        batches = iter(loader(crops, order, recipe.data.workers, device))
        for step in range(order.first_step, order.steps):
            batch = next(batches)
            for i in batch.unreadable.keys() - unreadable.keys():
                progress.say(f"Warning     {images.names[i]} is skipped: it cannot be read ({batch.unreadable[i]}).")
            unreadable |= batch.unreadable
            if len(batch.index_B) < 2:
                raise OdcftError(f"Step {step}: hardly any image of {images.source} can be read.")
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

            right = (logits_MC.detach().argmax(1) == answer_M).sum()
            sums_3 += torch.stack([loss.detach() * len(answer_M), right, torch.full_like(right, len(answer_M))])
            epoch_ends = (step + 1) % order.steps_per_epoch == 0
            note = ""
            if epoch_ends or (step + 1) % recipe.log.interval == 0:
                loss_sum, right_sum, puzzles = dist.all_sum(sums_3).tolist()
                figures = {"loss": loss_sum / puzzles, "accuracy": right_sum / puzzles}
                if not math.isfinite(figures["loss"]):
                    raise OdcftError(
                        f"The loss is not finite at step {step} (learning rate {optim.lr:.3g}). "
                        "Start again with a lower rate (--set optim.lr=…)."
                    )
                note = f"epoch {step // order.steps_per_epoch + 1}/{optim.epochs} · loss {figures['loss']:.2f}"
                note += f" · {figures['accuracy']:.0%} right"
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
    """A network with random weights, for three colours, or for lightness alone where colour is the question."""
    refuse_unknown(arch)
    arch_args = check_arguments(recipe.backbone.arch_args or {})
    backbone = Backbone(arch, **arch_args)
    if task == "colorization":
        backbone = Backbone(arch, Input("lab_l", backbone.size, (50.0,), (50.0,)), **{**arch_args, "in_chans": 1})
    normalise(backbone, recipe.data.mean, recipe.data.std)
    return backbone


def _save(out: Path, task: str, network: Task, optimizer: torch.optim.Optimizer, view: View, epoch: int) -> None:
    """Write the file, whole or not at all."""
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
        with folders.whole(out) as unfinished:
            folders.save_checkpoint(tree, unfinished)
    dist.barrier()


def _read_state(out: Path, task: str, arch: str) -> dict[str, Any]:
    """What `_save` wrote."""
    try:
        if out.exists() and not out.is_file():
            raise ValueError("a pipe, or a device")
        state = load_torch(out)
        ours = (state["task"], state["arch"])
        state["epoch"], state["state_dict"], state["optimizer"]
    except FileNotFoundError:
        raise OdcftError(f"{out}: no such file to resume from. Leave --resume away to start.") from None
    except Exception:  # torch raises many kinds for a file that is no checkpoint
        raise OdcftError(f"{out} was not written by `odcft pretext`, so it cannot go on with it.") from None
    if ours != (task, arch):
        raise OdcftError(f"{out} holds {ours[0]} of {ours[1]}, not {task} of {arch}. Choose another --out.")
    return state


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
