"""The folder of `odcft init-memory`: both memories, the neck they were made with, and what they were made from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from odcft import files
from odcft.clustering.memory import Memory
from odcft.data.custom_reader import refuse_other_reader
from odcft.data.images import Images
from odcft.data.intensity_range import choose_range
from odcft.data.names import Names
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.plan import Plan
from odcft.recipe import Recipe, flatten, make_recipe
from odcft.run.folder import MEMORY_FILES, Run, read_quarantine, write_image_lists
from odcft.run.output_checks import clear_folder
from odcft.run.run_json import made_by, made_from

# Recipe fields that the features in a memory depend on, besides checkpoint and images: `dc.pca` for dc, `neck` for odc.
FEATURE_FIELDS = (
    *("method", "data.size", "data.crop_fraction", "data.range", "data.bands", "data.mean", "data.std"),
    *("backbone.input", "backbone.arch_args", "backbone.part", "neck.hidden", "neck.dim", "neck.relu", "dc.pca"),
    *("memory.start_layer", "memory.start_features"),
)


@dataclass
class StoredMemory:
    """The contents of a folder written by `init-memory`, checked against a checkpoint and images.

    Attributes:
        folder: where it is.
        made_with: the plan it was made with.
        features_ND, labels_N: of all images.
        clusters: K.
        neck: the neck's tensors.
        asked: the group `data` of the recipe as it was given, `auto` fields and all.
        images: those it was made from.
        unreadable: the images that could not be read: name to reason.
    """

    folder: Path
    made_with: Recipe
    features_ND: Tensor
    labels_N: Tensor
    clusters: int
    neck: dict[str, Tensor]
    images: Images
    unreadable: dict[str, str]
    asked: dict[str, Any]

    def rows_of_rank(self) -> tuple[Tensor, Tensor]:
        """Features (S, D) and labels (S,) of this rank's images."""
        owned = torch.tensor(ownership.my_images(len(self.images)))
        return self.features_ND[owned], self.labels_N[owned]


def write_memory(
    run: Run,
    plan: Plan,
    arch: str,
    images: Images,
    unreadable: dict[str, str],
    memory: Memory,
    neck: dict[str, Tensor],
    *,
    asked: Recipe,
) -> None:
    """Write the folder, replacing an earlier one; every rank takes part, rank 0 writes.

    Args:
        run: the folder to write, the checkpoint and the images.
        plan: what the features were made with.
        arch: of the backbone.
        images: those that could be read.
        unreadable: the others: name to reason.
        memory: this rank's part.
        neck: the neck's state dict.
        asked: the recipe as it was given.
    """
    tensors = {
        "features": ownership.in_dataset_order(memory.features_SD, len(images)),
        "labels": ownership.in_dataset_order(memory.labels_S, len(images)),
        "centroids": memory.centroids_KD,
    }
    if dist.rank() == 0:
        about = made_from(run.ckpts, [arch], run.data, images)
        about |= {"seed": plan.seed, "recipe": plan.model_dump(mode="json"), **made_by(run.ckpts)}
        about["asked"] = {"data": asked.data.model_dump(mode="json")}
        clear_folder(run.out, MEMORY_FILES)
        with files.atomic_folder(run.out) as unfinished:
            for name, part in {"memory": tensors, "neck": neck}.items():
                part = {key: tensor.cpu().contiguous() for key, tensor in part.items()}
                files.save_file(part, unfinished / f"{name}.safetensors")
            write_image_lists(images, unreadable, unfinished)
            files.write_text_atomically(unfinished / "memory.json", json.dumps(about, indent=2))
    dist.barrier()


def read_memory(folder: Path, ckpts: list[str], images: Images) -> StoredMemory:
    """Read a folder written by `write_memory`, and check that it was made from this checkpoint and these images.

    Raises:
        OdcftError: the folder is incomplete, or was made from another checkpoint or other images.
    """
    if len(ckpts) > 1:
        raise OdcftError(
            f"{folder} holds the memory of one checkpoint; several checkpoints make theirs together. Drop --memory."
        )
    about, tensors, neck, names, made_with = open_memory(folder)
    made_from, sha256 = str(about["checkpoint"]), str(about["sha256"])
    refuse_other_reader(about.get("reader"), images.reader, folder)
    if sha256 != files.checkpoint_sha256(ckpts[0]):
        raise OdcftError(
            f"{folder} was made from another checkpoint ({made_from}), not from {ckpts[0]}. "
            "Make it again with `odcft init-memory`."
        )
    unreadable = read_quarantine(folder)
    images = images.without(set(images.names.rows_of(unreadable).values()))
    if images.names != names:
        raise OdcftError(
            f"{folder} was made from {len(names):,} images, which are not those in {images.source} now. "
            "Make it again with `odcft init-memory`."
        )
    if made_with.data.range == "auto":  # written before this field existed: the full range of the type
        made_with.data.range = choose_range(images, "full")[0] or "full"
    if made_with.data.bands == "auto":  # likewise
        made_with.data.bands = 3
    asked = about.get("asked", {})
    asked = asked.get("data", {}) if isinstance(asked, dict) else {}
    numbers = (tensors["features"], tensors["labels"], len(tensors["centroids"]), neck)
    return StoredMemory(folder, made_with, *numbers, images, unreadable, asked if isinstance(asked, dict) else {})


def open_memory(folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor], Names, Recipe]:
    """All that a folder written by `write_memory` holds, checked for being complete and of one piece.

    Returns:
        memory.json; `features`, `labels` and `centroids`; the neck's tensors; the images; and the plan they were made
        with.

    Raises:
        OdcftError: it is not such a folder.
    """
    try:
        about, tensors, neck = _read_files(folder)
        names = Names(files.iterate_column(folder / "images.csv", "path"))
        _check_tensors(tensors, len(names))
        if missing := {"checkpoint", "sha256"} - about.keys():
            raise KeyError(min(missing))
        return about, tensors, neck, names, make_recipe(about["recipe"], str(folder / "memory.json"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OdcftError(
            f"{folder} is not a complete folder of `odcft init-memory` ({error}). Make it again."
        ) from None


def _read_files(folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """The contents of memory.json, memory.safetensors and neck.safetensors."""
    for name in ("memory.safetensors", "neck.safetensors"):
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"{name} is not a file")
    about = read_json(folder / "memory.json")
    return about, load_file(folder / "memory.safetensors"), load_file(folder / "neck.safetensors")


def _check_tensors(tensors: dict[str, Tensor], images: int) -> None:
    """Raise a ValueError if these are not the tensors of a memory of so many images."""
    (count, length), (clusters, _) = tensors["features"].shape, tensors["centroids"].shape
    if tensors["labels"].dtype != torch.int32 or tensors["features"].dtype not in (torch.float16, torch.float32):
        raise ValueError("its tensors have the wrong dtypes")
    if not (tensors["labels"].shape == (count,) == (images,) and tensors["centroids"].shape[1] == length):
        raise ValueError("the shapes of its tensors do not match")
    if not (count and 0 <= int(tensors["labels"].min()) <= int(tensors["labels"].max()) < clusters):
        raise ValueError("its labels do not match its clusters")
    if not tensors["features"].isfinite().all():
        raise ValueError("its features are not finite")


def recipe_for_memory(recipe: Recipe, stored: StoredMemory) -> Recipe:
    """The recipe with what the memory determines: K, and what was measured on its images by the rules of this recipe.

    Raises:
        OdcftError: the recipe asks for a different K.
    """
    if recipe.memory.clusters not in ("auto", stored.clusters):
        raise OdcftError(
            f"{stored.folder} has {stored.clusters:,} clusters, but {recipe.memory.clusters:,} were requested. "
            "Drop --clusters, or make the memory again."
        )
    recipe = recipe.model_copy(deep=True)
    recipe.memory.clusters = stored.clusters
    now, then = recipe.data, stored.made_with.data
    for name in ("range", "bands", "mean", "std"):  # what was measured is not measured again
        value = getattr(now, name)
        if value == "auto" or (name in stored.asked and value == stored.asked[name]):
            setattr(now, name, getattr(then, name))
    if recipe.memory.start_layer == "auto":
        recipe.memory.start_layer = stored.made_with.memory.start_layer
    return recipe


def refuse_other_features(stored: StoredMemory, plan: Plan, dim: int, random_weights: bool) -> None:
    """Refuse a memory whose features this plan would not have made.

    Args:
        stored: the memory.
        plan: of the run.
        dim: D, the length of the neck's output.
        random_weights: whether some weights of the backbone depend on the seed.
    """
    then, now = flatten(stored.made_with.model_dump(mode="json")), flatten(plan.model_dump(mode="json"))
    others = "neck." if plan.method == "dc" else "dc."
    names = [name for name in FEATURE_FIELDS if name in then and not name.startswith(others)]
    for name in [*names, *(["seed"] if random_weights else [])]:
        if then[name] != now[name]:
            raise OdcftError(
                f"{stored.folder} was made with {name}={then[name]}, but this run has {name}={now[name]}, which gives "
                "different features. Use the recipe and settings of `odcft init-memory`, or make the memory again."
            )
    if plan.method != "dc" and stored.features_ND.shape[1] != dim:
        raise OdcftError(
            f"{stored.folder} has features of length {stored.features_ND.shape[1]}, but the neck of this recipe gives "
            f"{dim}. Make the memory again."
        )
