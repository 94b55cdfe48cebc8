"""The program `init-memory`: features of all images, K-Means, both memories on disk."""

import json
from pathlib import Path
from typing import Any

from odcft import files
from odcft.distributed import dist, ownership
from odcft.prepare import begin
from odcft.progress import Progress
from odcft.recipe import Recipe
from odcft.run import output_checks
from odcft.run.failures import explained
from odcft.run.folder import MEMORY_FILES, write_image_lists
from odcft.run.identity import made_by, made_from
from odcft.run.lock import locked

# ---------------------------------------------------------------- init-memory


def init_memory(
    ckpt: str,
    data: str,
    out: Path,
    recipe: Recipe,
    arch: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Features of all images, K-Means, both memories on disk (INTERFACE: DIR).

    Args:
        ckpt: what `load_backbone` takes.
        data: what `find_images` takes.
        out: the folder to write.
        recipe: its `auto` fields are resolved here.
        arch: a timm name, where the checkpoint's own is not to be followed.
        overwrite: replace an earlier memory.
        progress: where to speak.

    Returns:
        What was made: out, images, unreadable, clusters, smallest, largest.

    Raises:
        OdcftError: for anything the user can mend; nothing has been written by then.
    """
    progress = progress or Progress()
    output_checks.refuse_full(out, MEMORY_FILES, overwrite)
    with locked(out, progress.say), explained(recipe):
        start = begin([ckpt], data, recipe, progress, arch, training=False)
        memory, count = start.state.memory, len(start.images)
        tensors = {
            "features": ownership.in_dataset_order(memory.features_SD, count),
            "labels": ownership.in_dataset_order(memory.labels_S, count),
            "centroids": memory.centroids_KD,
        }
        if dist.rank() == 0:
            about = made_from([ckpt], [start.loaded[0].backbone.arch], data, start.images)
            about |= {"seed": start.recipe.seed, "recipe": start.recipe.model_dump(mode="json"), **made_by([ckpt])}
            output_checks.clear(out, MEMORY_FILES)
            with files.filling(out) as unfinished:
                for name, part in {"memory": tensors, "neck": start.necks[0].state_dict()}.items():
                    part = {key: tensor.cpu().contiguous() for key, tensor in part.items()}
                    files.save_file(part, unfinished / f"{name}.safetensors")
                write_image_lists(start.images, start.unreadable, unfinished)
                files.write_whole(unfinished / "memory.json", json.dumps(about, indent=2))
        dist.barrier()
    sizes_K = start.state.memory.sizes_K
    return {
        "out": str(out),
        "images": len(start.images),
        "unreadable": len(start.unreadable),
        "clusters": len(sizes_K),
        "smallest": int(sizes_K.min()),
        "largest": int(sizes_K.max()),
    }
