"""The program behind `odcft init-memory`: extract features, run K-Means, write both memories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from odcft.data.custom_reader import Reader, make_reader
from odcft.prepare import prepare_start
from odcft.progress import Progress
from odcft.recipe import Recipe
from odcft.run.failure_messages import explain_failures
from odcft.run.folder import MEMORY_FILES, Run
from odcft.run.lock import locked
from odcft.run.memory_folder import write_memory
from odcft.run.output_checks import refuse_non_empty


def init_memory(
    ckpt: str,
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    arch: str | None = None,
    reader: str | Callable[[Any], Any] | Reader | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Extract features of all images, cluster them by K-Means, and write both memories to a folder.

    Args:
        ckpt: what `load_backbone` takes.
        data: what `find_images` takes.
        out: the folder to write.
        recipe: its `auto` fields are decided here.
        arch: a timm name, to override the checkpoint's own.
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION.
        overwrite: replace an earlier memory.
        progress: where to report.

    Returns:
        A summary: out, images, unreadable, clusters, smallest, largest.

    Raises:
        OdcftError: for anything the user can fix; nothing has been written yet.
    """
    progress, run = progress or Progress(), Run(out, [ckpt], data, arch, make_reader(reader))
    refuse_non_empty(out, MEMORY_FILES, overwrite)
    with locked(out, progress.say), explain_failures(recipe):
        start = prepare_start(run, recipe, progress, training=False)
        memory, (backbone,), (neck,) = start.clusters.memory, start.backbones, start.necks
        write_memory(
            run, start.plan, backbone.arch, start.images, start.unreadable, memory, neck.state_dict(), asked=recipe
        )
    return {
        "out": str(out),
        "images": len(start.images),
        "unreadable": len(start.unreadable),
        "clusters": len(memory.sizes_K),
        "smallest": int(memory.sizes_K.min()),
        "largest": int(memory.sizes_K.max()),
    }
