"""Did a backbone get better, judged without one label? `odcft evaluate --protocol unlabelled`.

Shapes: N images, V views of each, F features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from odcft.backbone.layers import LAST
from odcft.data.images import Images
from odcft.distributed import dist
from odcft.errors import OdcftError, refuse_not_finite
from odcft.evaluation.comparison import Column, load_column, load_starting_checkpoints
from odcft.evaluation.features import features_of
from odcft.evaluation.random_views import random_views
from odcft.evaluation.starting_checkpoint import origins_of, reader_note
from odcft.evaluation.unlabelled import measure
from odcft.evaluation.unlabelled_verdict import CANNOT_TELL, judge
from odcft.progress import Progress
from odcft.text import printable

MOST, LEAST = 1500, 300  # images to measure on
VIEWS = 2  # of each image
SEED = 0  # of the sample
NOT_RELATED = "only runs of one checkpoint, and that checkpoint, can be compared without labels; these are not."


def evaluate_unlabelled(
    ckpt: str | Sequence[str],
    data: str,
    *,
    size: int | None = None,
    arch: str | None = None,
    input: str | None = None,
    allow_partial: bool = False,
    arch_args: dict[str, Any] | None = None,
    part: str | None = None,
    crop: str = "centre",
    reader: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure backbones on images without labels, and say whether they got better.

    Args:
        ckpt: as for `comparison.evaluate`: a RUN is compared with the checkpoint it was started from, each of several
            with the last.
        data: the images; their labels, if they have any, are not read. Of more than MOST, a fixed sample is measured.
        size, arch, input, allow_partial, arch_args, part, crop, reader: as for `comparison.evaluate`.
        progress: where to report.

    Returns:
        On rank 0 `verdict` (better, worse, cannot tell; None if there is nothing to compare with), `reason` (a
        sentence), `measures` (each with `before` and `after`, or only `after`), `images` (how many were measured),
        `found` (how many there are), `unreadable` (how many of the sample), `views`, `seed`. Of several checkpoints
        these are of the first, and `columns` has `source`, `verdict`, `reason` and `measures` of each. On other ranks
        nothing.

    Raises:
        OdcftError: too few images, or a checkpoint that cannot be loaded or gives features that are not finite.
    """
    from odcft.data.custom_reader import make_reader
    from odcft.data.sources import find_images

    progress = progress or Progress()
    found = find_images(data, progress, make_reader(reader))
    _refuse_too_few(len(found), data)
    images = sample(found)
    options = {"arch": arch, "input": input, "allow_partial": allow_partial, "arch_args": arch_args, "part": part}
    sources = [ckpt] if isinstance(ckpt, str) else list(ckpt)
    columns = [load_column(one, options, images, size, crop, progress) for one in sources]
    if isinstance(ckpt, str) and (before := load_starting_checkpoints(columns[0], progress)):
        columns.append(Column(before[0].source, before, columns[0].views, suffix=" before"))
    _report(found, images, columns, sources, progress)
    features, unreadable = _features(columns, images, progress)
    if dist.rank() > 0:
        return {}
    good = _readable(images, unreadable, data, progress)
    measured = []
    for column, (clean_NF, views_NVF) in zip(columns, features, strict=True):
        finite_N = np.isfinite(clean_NF[good]).all(1) & np.isfinite(views_NVF[good]).all((1, 2))
        refuse_not_finite(len(good) - int(finite_N.sum()), len(good), column.source)
        with progress.waiting(f"Measuring   {column.source}"):
            measured.append(measure(clean_NF[good], views_NVF[good]))
    counts = {"images": len(good), "found": len(found), "unreadable": len(unreadable)}
    return {**_compared(columns, measured, len(sources) > 1), **counts, "views": VIEWS, "seed": SEED}


def sample(images: Images) -> Images:
    """A fixed sample of MOST images in their order; all if there are no more."""
    if len(images) <= MOST:
        return images
    return images.take(np.sort(np.random.default_rng(SEED).choice(len(images), MOST, replace=False)))


def _features(
    columns: list[Column], images: Images, progress: Progress
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[int, str]]:
    """Features (N, F) and those of random views (N, V, F) of each column, and why images cannot be read."""
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    unreadable: dict[int, str] = {}
    for column in columns:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for one, view in zip(column.parts, column.views, strict=True):
            clean = features_of(one.backbone, images, view, progress)
            views = random_views(one.backbone, images, view, VIEWS, progress)
            parts.append((clean.layers.get(LAST, views), views))  # other ranks than the first may have neither
            unreadable |= clean.unreadable
        if dist.rank() == 0:
            rows.append((_side_by_side([part[0] for part in parts]), _side_by_side([part[1] for part in parts])))
    return rows, unreadable


def _readable(images: Images, unreadable: dict[int, str], data: str, progress: Progress) -> np.ndarray:
    """The rows of the images that can be read; say which cannot, and refuse if too few are left."""
    if unreadable:
        index, why = min(unreadable.items())
        first = printable(f"{images.names[index]} ({why})")
        progress.say(f"Left out    {len(unreadable):,} of {len(images):,} images cannot be read: {first}")
        _refuse_too_few(len(images) - len(unreadable), data)
    return np.array([i for i in range(len(images)) if i not in unreadable], dtype=np.int64)


def _side_by_side(members: list[np.ndarray]) -> np.ndarray:
    """The features (…, F) of the members of a RUN concatenated, each scaled to unit length; of one alone unchanged."""
    if len(members) == 1:
        return members[0]
    return np.concatenate([part / (np.linalg.norm(part, axis=-1, keepdims=True) + 1e-5) for part in members], axis=-1)


def _compared(columns: list[Column], measured: list[dict[str, float]], several: bool) -> dict[str, Any]:
    """The measures of the first column, and what they say beside those of the last; the same of each of several."""
    rows: list[dict[str, Any]] = []
    before = measured[-1]
    for column, after in zip(columns, measured, strict=True):
        if column is columns[-1]:
            reason = "there is nothing to compare with. Give a RUN, or the checkpoint it came from as well."
            measures = {name: {"after": value} for name, value in after.items()}
            rows.append({"source": column.source, "verdict": None, "reason": reason, "measures": measures})
            continue
        if not several or origins_of(column.source) & origins_of(columns[-1].source):
            verdict, reason = judge(before, after)
        else:
            verdict, reason = CANNOT_TELL, NOT_RELATED
        measures = {name: {"before": before[name], "after": value} for name, value in after.items()}
        rows.append({"source": column.source, "verdict": verdict, "reason": reason, "measures": measures})
    return {**rows[0], **({"columns": rows} if several else {})}


def _report(found: Images, images: Images, columns: list[Column], sources: list[str], progress: Progress) -> None:
    """Say which images are measured, and how the networks see them."""
    from odcft.data.view import describe_view

    of = "" if len(images) == len(found) else f"{len(images):,} of "
    views = dict.fromkeys(view for column in columns for view in column.views)
    seen = f" · {describe_view(next(iter(views)))}" if len(views) == 1 else ""
    progress.say(f"Images      {of}{len(found):,} in {found.source}{seen}")
    if len(views) > 1:
        for column in columns:
            progress.say(f"            {column.source}: {'; '.join(map(describe_view, dict.fromkeys(column.views)))}")
    if found.skipped:
        progress.say(f"Not read    {found.skipped_summary()}")
    for source in sources:
        if note := reader_note(source, found.reader):
            progress.say(f"Note        {note}")


def _refuse_too_few(count: int, data: str) -> None:
    if count < LEAST:
        raise OdcftError(
            f"--protocol unlabelled needs at least {LEAST} images that can be read, but {data} has {count:,}. "
            "Give more."
        )
