"""`odcft embed`: the backbone's features of all images, in one file, with their paths and labels."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from odcft.backbone.layers import LAST
from odcft.backbone.load import load_backbone
from odcft.data.custom_reader import make_reader
from odcft.data.sources import find_images
from odcft.data.view import describe_view
from odcft.distributed import dist
from odcft.errors import OdcftError, refuse_not_finite
from odcft.evaluation.embedding_files import write_embedding, written_by_embed
from odcft.evaluation.features import features_of
from odcft.evaluation.starting_checkpoint import view_of_run
from odcft.plan import view_for_evaluation
from odcft.progress import Progress
from odcft.run import output_checks


class Embedding(TypedDict):
    """What `embed` returns.

    Attributes:
        out: the file that was written, if any.
        images: N, how many images have features.
        width: F.
        unreadable: name to reason of the images that cannot be read.
        cached: whether the features were computed earlier.
        features: (N, F) float32.
        paths: of the N images, as in the file.
        labels: of the N images, or None if there are none.
    """

    out: str | None
    images: int
    width: int
    unreadable: dict[str, str]
    cached: bool
    features: NDArray[np.float32]
    paths: list[str]
    labels: list[str] | None


def embed(
    ckpt: str,
    data: str,
    out: Path | None,
    *,
    size: int | None = None,
    arch: str | None = None,
    arch_args: dict[str, Any] | None = None,
    input: str | None = None,
    part: str | None = None,
    allow_partial: bool = False,
    reader: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Embedding:
    """Compute the features (N, F) of all images that can be read, and write them to a file.

    The file has `features` (float32), `paths`, and `labels` if the images have any (several of one joined by ";"). In
    .npz these are arrays, in .parquet columns. `odcft evaluate --features` takes both.

    Args:
        ckpt: anything `load_backbone` takes.
        data: the images.
        out: a `.npz` or `.parquet` file; None writes none.
        size: image size in pixels; by default chosen by `view_for_evaluation`.
        arch, arch_args, input, part, allow_partial: how to load it, as for `load_backbone`.
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION.
        overwrite: replace a file that `embed` wrote.
        progress: where to report.

    Returns:
        The features, on rank 0; other ranks get an Embedding of no images.

    Raises:
        OdcftError: a checkpoint or images that cannot be read, or a file that exists.
    """
    progress = progress or Progress()
    if out is not None:
        _refuse(out, overwrite)
    images = find_images(data, progress, make_reader(reader))
    loaded = load_backbone(ckpt, arch, input, allow_partial, arch_args=arch_args, part=part)
    view = view_for_evaluation(loaded, images, size, view_of_run(ckpt))
    progress.say(f"Images      {len(images):,} in {data} · {describe_view(view)}")
    if images.skipped:
        progress.say(f"Not read    {images.skipped_summary()}")
    found = features_of(loaded.backbone, images, view, progress)
    if dist.rank() > 0:
        return _embedding(None, np.empty((0, 0), np.float32), [], None, {}, found.cached)
    good = np.array([i for i in range(len(images)) if i not in found.unreadable], dtype=np.int64)
    bad = {images.names[i]: why for i, why in sorted(found.unreadable.items())}
    if not len(good):
        first = "{} ({})".format(*next(iter(bad.items())))
        raise OdcftError(f"None of the {len(images):,} images in {data} can be read; the first is {first}.")
    features_NF = found.layers[LAST][good]
    refuse_not_finite(len(features_NF) - int(np.isfinite(features_NF).all(1).sum()), len(features_NF), ckpt)
    labels = images.class_labels()
    names, labels_kept = [images.names[i] for i in good], [labels[i] for i in good] if any(labels) else None
    if out is not None:
        write_embedding(out, features_NF, names, labels_kept)
    return _embedding(out, features_NF, names, labels_kept, bad, found.cached)


def _embedding(
    out: Path | None,
    features_NF: NDArray[np.float32],
    names: list[str],
    labels: list[str] | None,
    unreadable: dict[str, str],
    cached: bool,
) -> Embedding:
    return {
        "out": None if out is None else str(out),
        "images": len(features_NF),
        "width": features_NF.shape[1],
        "unreadable": unreadable,
        "cached": cached,
        "features": features_NF,
        "paths": names,
        "labels": labels,
    }


def _refuse(out: Path, overwrite: bool) -> None:
    """Refuse a place where nothing can or should be written."""
    if out.suffix not in (".npz", ".parquet"):
        raise OdcftError(f"--out {out}: end the name with .npz or .parquet, which says the format to write.")
    output_checks.refuse_unwritable(out)
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise OdcftError(f"{out} exists. Choose another file, or pass --overwrite.")
    if out.is_symlink() or not out.is_file() or not written_by_embed(out):
        raise OdcftError(
            f"{out} was not written by odcft embed, so --overwrite will not touch it. Choose another file."
        )
