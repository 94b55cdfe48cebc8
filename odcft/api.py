"""The Python functions behind `import odcft`: each does what the command of its name does.

Arguments have the words and defaults of the command line. A mistake that the user can fix raises an OdcftError, a
request to stop raises Stopped; nothing exits the process. Under torchrun, every process calls the same function, and
they share the work.
"""

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

from odcft.argument_types import StrPath, checked, in_range, path_of, text_of, texts_of
from odcft.errors import OdcftError
from odcft.recipe_choice import DEFAULT_RECIPE, Settings, choose_recipe, parse_arch_args

if TYPE_CHECKING:
    from odcft.backbone.load import Loaded
    from odcft.backbone.network import Backbone
    from odcft.data.images import Images
    from odcft.embeddings import Embedding
    from odcft.recipe import Recipe

Reader: TypeAlias = str | Callable[[Any], Any]

_training = threading.Lock()  # torch's random numbers, which training seeds in every step, belong to the whole process


class InitialMemory(TypedDict):
    """What `init_memory` returns."""

    out: str
    images: int
    unreadable: int
    clusters: int
    smallest: int
    largest: int


class FineTuned(TypedDict):
    """What `fine_tune` returns.

    Attributes:
        out: the RUN folder.
        backbone: the folder with the fine-tuned backbone.
        backbones: one for each member (codc); otherwise `backbone` alone.
        load: a line of Python that loads it.
        images: how many the run trained on.
        unreadable: images left out from the start, because they cannot be read.
        broken: images that became unreadable during training.
        clusters, epochs, steps: of the run.
        loss, change_ratio: the last ones logged; None if nothing was.
        seconds: the time it took.
        metrics: the lines of metrics.jsonl.
    """

    out: str
    backbone: str
    backbones: list[str]
    load: str
    images: int
    unreadable: int
    broken: int
    clusters: int
    epochs: int
    steps: int
    loss: float | None
    change_ratio: float | None
    seconds: float
    metrics: list[dict[str, Any]]


@checked
def load_backbone(
    ckpt: StrPath,
    *,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    input: str | None = None,
    part: str | None = None,
    allow_partial: bool = False,
    seed: int = 0,
) -> "Loaded":
    """Load a backbone: from a checkpoint of almost any origin, a RUN, or by name.

    Args:
        ckpt: a checkpoint file, a timm or transformers folder, a finished RUN, or `timm:NAME`, `torchvision:NAME`,
            `scratch:NAME`.
        arch: architecture (timm name), if it cannot be detected.
        arch_args: extra arguments to build the network with, for example {"patch_size": 8}.
        input: colours the network expects (rgb, bgr, gray, lab_l or sobel), if they are not detected.
        part: which backbone to take where a file holds several, for example "student".
        allow_partial: accept a checkpoint with less than 90 % of the backbone; the rest keeps random weights.
        seed: of the random weights of `scratch:NAME`.

    Returns:
        `backbone`, a torch module in evaluation mode on the CPU, from RGB images (B, 3, H, W) in 0..1 to features
        (B, F); it converts colours and normalises. Besides it `source`, `family`, `match` and `notes`.

    Raises:
        OdcftError: the file cannot be read, or its network is not recognised.
    """
    from odcft.backbone.load import load_backbone as load

    arguments = parse_arch_args(arch_args)
    return load(text_of(ckpt), arch, input, allow_partial, seed, arch_args=arguments, part=part)


@checked
def find_images(data: StrPath, *, reader: Reader | None = None, progress: bool = True) -> "Images":
    """Find the images of a DATA argument, in the order that every other function uses.

    Args:
        data: a folder (searched recursively), a list file, tar or parquet shards, a saved dataset, or a URL.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        progress: show when it takes long.

    Returns:
        `len()` of them is their number; `names` are their paths, `root` is the folder these are relative to, and
        `skipped` counts what is not read.

    Raises:
        OdcftError: `data` does not exist, holds no images, or cannot be read.
    """
    from odcft.data.custom_reader import make_reader
    from odcft.data.sources import find_images as find
    from odcft.progress import Progress

    return find(text_of(data), Progress(quiet=not progress), make_reader(reader))


@checked
def init_memory(
    ckpt: StrPath,
    data: StrPath,
    out: StrPath,
    *,
    recipe: "StrPath | Recipe" = DEFAULT_RECIPE,
    clusters: int | str | None = None,
    preset: str | None = None,
    set: Settings | None = None,
    seed: int | None = None,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    input: str | None = None,
    part: str | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    reader: Reader | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> InitialMemory:
    """Extract features of all images, cluster them by K-Means, and save the memories that `fine_tune` starts from.

    Args:
        ckpt: what `load_backbone` takes.
        data: what `find_images` takes.
        out: folder to write.
        recipe: name of a shipped recipe, a YAML file, or a Recipe.
        clusters, preset, set, seed: changes of the recipe, as for `fine_tune`.
        arch, arch_args, input, part, allow_partial: how to load the checkpoint, as for `load_backbone`.
        overwrite: replace an earlier memory.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        accelerator: auto, cpu, cuda, mps or xpu.
        progress: show progress.

    Raises:
        OdcftError: a mistake in an argument, the checkpoint or the images; nothing has been written.
        Stopped: a signal asked for it.
    """
    from odcft.first_memory import init_memory as run
    from odcft.progress import Progress

    resolved = choose_recipe(
        recipe,
        preset=preset,
        set=set,
        clusters=clusters,
        seed=seed,
        input=input,
        part=part,
        allow_partial=allow_partial,
        arch_args=arch_args,
    )
    with _ranks_joined(accelerator), _training_alone():
        made = run(
            *(text_of(ckpt), text_of(data), Path(text_of(out)), resolved),
            arch=arch,
            reader=reader,
            overwrite=overwrite,
            progress=Progress(quiet=not progress),
        )
    return cast(InitialMemory, made)


@checked
def fine_tune(
    ckpt: StrPath | Sequence[StrPath],
    data: StrPath,
    out: StrPath,
    *,
    method: str | None = None,
    recipe: "StrPath | Recipe | None" = None,
    preset: str | None = None,
    set: Settings | None = None,
    epochs: int | None = None,
    clusters: int | str | None = None,
    memory: StrPath | None = None,
    eval: StrPath | None = None,
    eval_every: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    seed: int | None = None,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    input: str | None = None,
    part: str | Sequence[str | None] | None = None,
    allow_partial: bool = False,
    reader: Reader | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> FineTuned:
    """Fine-tune a checkpoint on unlabelled images, and write a RUN folder with the fine-tuned backbone.

    Args:
        ckpt: what `load_backbone` takes; for codc a list, with a checkpoint for each member.
        data: what `find_images` takes. Labels are never read.
        out: the RUN folder to write.
        method: odc, dc (DeepCluster) or codc (collaborative ODC); by default the recipe's.
        recipe: name of a shipped recipe, a YAML file, or a Recipe; by default odc_r50_finetune (dc_r50_finetune with
            method="dc"; the RUN's own with resume=True).
        preset: augmentation that suits the images: photo, gray, microscopy, satellite or document.
        set: changes of the recipe's fields: {"memory.momentum": 0.3} or ["memory.momentum=0.3"].
        epochs: instead of the recipe's; can also prolong a run with resume=True.
        clusters: number of clusters, or "auto": images / 128, at most 10,000.
        memory: folder written by `init_memory` to start from.
        eval: labelled images to measure nearest-neighbour accuracy on after an epoch; training never sees the labels.
        eval_every: epochs between two measurements of `eval`.
        resume: continue the RUN in `out` from its last saved state.
        overwrite: replace the RUN in `out`.
        seed: the same seed on the same machine gives the same backbone.
        arch, arch_args, input, part, allow_partial: how to load the checkpoint, as for `load_backbone`.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        accelerator: auto, cpu, cuda, mps or xpu.
        progress: show progress, in a terminal, a notebook or a log.

    Returns:
        A summary of the run. It has the same values as `odcft finetune --json`, and the logged `metrics`.

    Raises:
        OdcftError: a mistake in an argument, the checkpoint or the images, or a loss that is not finite.
        Stopped: Ctrl-C (in a notebook: Interrupt), SIGTERM or SIGUSR1; the state is saved, resume=True continues.
    """
    from odcft.progress import Progress
    from odcft.recipe import MAX_EPOCHS
    from odcft.run.metrics import read_lines
    from odcft.train import fine_tune as run

    resolved = choose_recipe(
        recipe,
        method=method,
        resume_from=out if resume else None,
        preset=preset,
        set=set,
        clusters=clusters,
        seed=seed,
        input=input,
        part=part,
        allow_partial=allow_partial,
        arch_args=arch_args,
    )
    for name, count in (("epochs", epochs), ("eval_every", eval_every)):
        if count is not None and not 1 <= count <= MAX_EPOCHS:
            raise OdcftError(f"{name}={count!r}: give a whole number from 1 to {MAX_EPOCHS:,}.")
    with _ranks_joined(accelerator), _training_alone(to_continue="Continue with resume=True."):
        made = run(
            *(texts_of(ckpt), text_of(data), Path(text_of(out)), resolved),
            arch=arch,
            reader=reader,
            memory=path_of(memory),
            resume=resume,
            overwrite=overwrite,
            progress=Progress(quiet=not progress),
            epochs=epochs,
            eval_data=text_of(eval),
            eval_every=eval_every,
        )
    metrics = read_lines(Path(text_of(out)) / "metrics.jsonl")
    return cast(FineTuned, {"backbones": [made["backbone"]], **made, "metrics": metrics})


@checked
def evaluate(
    ckpt: StrPath | Sequence[StrPath] | None = None,
    data: StrPath | None = None,
    *,
    protocol: str | Sequence[str] = "svm,knn",
    test: StrPath | None = None,
    features: StrPath | None = None,
    layers: str = "last",
    per_class: bool = False,
    crop: str = "centre",
    size: int | None = None,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    input: str | None = None,
    part: str | None = None,
    allow_partial: bool = False,
    reader: Reader | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how good a backbone's features are, on labelled images.

    Args:
        ckpt: what `load_backbone` takes. A RUN is compared with the checkpoint it was started from; of several, each
            with the last.
        data: labelled images: one sub-folder per class, or a list or shards with labels.
        protocol: some of svm, low-shot, linear, knn, semi, clusters; or unlabelled, for images without labels.
        test: labelled images to test on; by default half of `data` is held out.
        features: features computed elsewhere (.npz), or a file written by `embed`, instead of `ckpt` and `data`.
        layers: last; best, the one that cross-validation on the training images prefers; or all.
        per_class: also return the figures of each class.
        crop: centre, or squash: the whole image, as in the published results on VOC07.
        size: image size in pixels; by default that of the RUN or the network.
        arch, arch_args, input, part, allow_partial: how to load the checkpoint, as for `load_backbone`.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        accelerator: auto, cpu, cuda, mps or xpu.
        progress: show progress.

    Returns:
        What `odcft evaluate --json` prints: one key for each protocol (`svm`: `mAP`; `knn`: `top1` …), of a RUN also
        `before`, `change` with its intervals, and `verdict`. Under torchrun, on rank 0 only.

    Raises:
        OdcftError: labels or images that cannot be evaluated on, or a checkpoint that cannot be loaded.
    """
    from odcft.evaluation.feature_files import evaluate_file
    from odcft.evaluation.protocols import check_protocols, with_labels
    from odcft.evaluation.results_table import json_values
    from odcft.progress import Progress

    load: dict[str, Any] = {"arch": arch, "input": input, "allow_partial": allow_partial, "part": part}
    load |= {"arch_args": arch_args, "size": size, "crop": crop}
    protocols = check_protocols(protocol if isinstance(protocol, str) else ",".join(protocol))
    shown = Progress(quiet=not progress)
    with_labels(protocols, features=features is not None, test=text_of(test), layers=layers)
    if features is not None:
        if ckpt is not None or data is not None:
            raise OdcftError("features takes the place of ckpt and data. Drop one or the other.")
        results = evaluate_file(Path(text_of(features)), protocols, shown, test=path_of(test), per_class=per_class)
        return cast(dict[str, Any], json_values(results))
    if ckpt is None or data is None:
        raise OdcftError("evaluate takes a checkpoint and labelled images, evaluate(ckpt, data), or features=FILE.")
    from odcft.evaluation.any_protocol import evaluate_any

    options = {**load, "arch_args": parse_arch_args(arch_args), "reader": reader}
    with _ranks_joined(accelerator):
        results = evaluate_any(
            *(texts_of(ckpt), text_of(data), text_of(test), protocols),
            layers=layers,
            per_class=per_class,
            progress=shown,
            **options,
        )
    return cast(dict[str, Any], json_values(results))


@checked
def embed(
    ckpt: StrPath,
    data: StrPath,
    out: StrPath | None = None,
    *,
    size: int | None = None,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    input: str | None = None,
    part: str | None = None,
    allow_partial: bool = False,
    reader: Reader | None = None,
    overwrite: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
) -> "Embedding":
    """Compute the backbone's features of all images that can be read.

    Args:
        ckpt: what `load_backbone` takes.
        data: what `find_images` takes.
        out: a .npz or .parquet file to write them to; by default none.
        size: image size in pixels; by default that of the RUN or the network.
        arch, arch_args, input, part, allow_partial: how to load the checkpoint, as for `load_backbone`.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        overwrite: replace a file that `embed` wrote.
        accelerator: auto, cpu, cuda, mps or xpu.
        progress: show progress.

    Returns:
        `features` (N, F) float32, the `paths` of the N images, their `labels` (None if there are none) and the images
        that are `unreadable`, with the reason. Under torchrun, of all images on rank 0 and of none on the others.

    Raises:
        OdcftError: a checkpoint or images that cannot be read, or a file that exists.
    """
    from odcft.embeddings import embed as run
    from odcft.progress import Progress

    with _ranks_joined(accelerator):
        return run(
            *(text_of(ckpt), text_of(data), path_of(out)),
            size=size,
            arch=arch,
            arch_args=parse_arch_args(arch_args),
            input=input,
            part=part,
            allow_partial=allow_partial,
            reader=reader,
            overwrite=overwrite,
            progress=Progress(quiet=not progress),
        )


@checked
def export(
    source: StrPath,
    out: StrPath,
    *,
    format: str = "timm",
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    input: str | None = None,
    part: str | None = None,
    allow_partial: bool = False,
    size: int | None = None,
    overwrite: bool = False,
) -> "Backbone":
    """Export the backbone, without neck and head, of a RUN or of anybody's checkpoint.

    Args:
        source: what `load_backbone` takes.
        out: folder (timm, transformers) or file (the others) to write.
        format: timm, transformers, torchvision, safetensors or onnx.
        arch, arch_args, input, part, allow_partial: how to load the checkpoint, as for `load_backbone`.
        size: image size in pixels, if not the one the source states.
        overwrite: replace an earlier export.

    Returns:
        The backbone that was written, read back and compared.

    Raises:
        OdcftError: a source that cannot be read, an output that exists, or a format for which it is not suited.
    """
    from odcft.exports import export as run

    arguments = parse_arch_args(arch_args)
    return run(
        text_of(source), Path(text_of(out)), format, arch, overwrite, input, allow_partial, size, arguments, part
    )


@contextmanager
def _training_alone(to_continue: str = "") -> Iterator[None]:
    """Let signals save the state, and leave torch's random numbers and settings as they were.

    Args:
        to_continue: what the message of a Stopped says to do next.

    Raises:
        OdcftError: this process already trains in another thread, or is a data worker that runs the user's script.
        Stopped: a signal asked for it; says how to continue.
    """
    import torch

    from odcft.distributed import dist, stop_signals
    from odcft.precision import tf32_restored

    if getattr(multiprocessing.current_process(), "_inheriting", False):  # forkserver and spawn import the script again
        raise OdcftError(
            'Data workers run this script again. Put the calls of odcft under `if __name__ == "__main__":`.'
        )
    if not _training.acquire(blocking=False):
        raise OdcftError("This process already trains in another thread. Wait for it, or start another process.")
    device = dist.this_device()
    try:
        with (
            stop_signals.handling_signals(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            tf32_restored(),
        ):
            yield
    except stop_signals.Stopped as stopped:
        stopped.args = (f"{str(stopped) or 'Nothing was saved.'} {to_continue}".rstrip(),)
        raise
    finally:
        _training.release()


@contextmanager
def _ranks_joined(kind: str) -> Iterator[None]:
    """For the time of a call, compute on this kind of device, and under torchrun join the other processes."""
    from odcft.distributed import accelerator, dist

    with accelerator.chosen(kind):
        mine = dist.join()
        yield
        if mine:  # after an error the other ranks are not in the same place, and would not answer
            dist.leave()


@checked
def clusters(
    run: StrPath,
    *,
    out: StrPath | None = None,
    folders: StrPath | None = None,
    links: str = "absolute",
    sheets: StrPath | None = None,
    most: int | None = None,
    near_duplicates: bool = False,
    threshold: float | None = None,
    data: StrPath | None = None,
    reader: Reader | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Say what the clusters of a RUN or a memory are, and write them; or find groups of nearly identical images.

    Args:
        run: a RUN, which may still train, or a folder written by `init_memory`.
        out: a .csv or .parquet file to write: path, cluster, distance; of near-duplicates group, path, similarity.
        folders: a folder to fill with one for each cluster, with links to its images.
        links: absolute, relative, or copy; images in shards are always copied.
        sheets: a folder to fill with contact sheets, and with label_first.csv: which images to label first.
        most: sheets to draw at most, of the largest first; by default 200.
        near_duplicates: find groups of nearly identical images, by the features of the fine-tuned backbone.
        threshold: of near-duplicates: the least similarity, 0.5 to 1; by default 0.85.
        data: where the images are now; by default where they were.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        overwrite: replace what this function wrote there earlier.
        progress: show progress.

    Returns:
        What `odcft clusters --json` prints: `images`, `clusters`, `per_cluster` …, or `groups`, `in_groups`, `left` …

    Raises:
        OdcftError: not a RUN or a memory, images that cannot be found, or an output that may not be written.
    """
    from odcft.progress import Progress

    most = in_range("most", most, 1, 1 << 20)
    threshold = in_range("threshold", threshold, 0.5, 1)
    given: dict[str, Any] = {"out": path_of(out), "sheets": path_of(sheets), "data": text_of(data)}
    given |= {"reader": reader, "overwrite": overwrite, "progress": Progress(quiet=not progress)}
    given |= {} if most is None else {"most": most}
    if near_duplicates:
        from odcft.duplicate_groups import near_duplicates as find

        if folders is not None:
            raise OdcftError("--folders is for clusters; with --near-duplicates use --sheets or --out.")
        given |= {} if threshold is None else {"threshold": threshold}
        return find(Path(text_of(run)), **given)
    from odcft.cluster_listing import clusters as list_clusters

    if threshold is not None:
        raise OdcftError("--threshold belongs to --near-duplicates. Add that, or drop it.")
    return list_clusters(Path(text_of(run)), folders=path_of(folders), links=links, **given)


@checked
def report(
    run: StrPath,
    other: StrPath | None = None,
    *,
    data: StrPath | None = None,
    labels: StrPath | None = None,
    evaluation: StrPath | Mapping[str, Any] | None = None,
    sample: int = 2000,
    megabytes: float = 30.0,
    all_pictures: bool = False,
    out: StrPath | None = None,
    reader: Reader | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a page that shows what a run has learned, or that compares two runs.

    Args:
        run: the RUN, finished or not.
        other: a second RUN, to compare the first with.
        data: where the images are now; by default where they were.
        labels: the same images with labels, to set the clusters beside the classes.
        evaluation: labelled images to judge the backbone by, as `evaluate` does; or what `evaluate` returned, or a
            file that `odcft evaluate --json` printed.
        sample: images among which neighbours are looked for; 0 for none.
        megabytes: size of the page, at most: as many thumbnails as fit.
        all_pictures: write the thumbnails that do not fit into a folder beside the page.
        out: the page to write; by default report.html in the RUN. Of two runs it must be given.
        reader: your own function that reads an image, or its name as MODULE:FUNCTION.
        overwrite: replace an earlier report at `out`.
        progress: show progress.

    Returns:
        What `odcft report --json` prints: `out`, `bytes`, `images`, `pictures`, `notes` …

    Raises:
        OdcftError: not a RUN, damaged files, or a page that cannot be written.
    """
    from odcft.progress import Progress

    shared: dict[str, Any] = {"data": text_of(data), "reader": reader, "overwrite": overwrite}
    shared |= {"megabytes": in_range("megabytes", megabytes, 1, 1000), "progress": Progress(quiet=not progress)}
    sample = in_range("sample", sample, 0, 50_000)
    if other is not None:
        from odcft.reports.two_runs import compare_runs

        if out is None:
            raise OdcftError("A comparison of two runs belongs to neither: pass --out FILE.html.")
        if labels is not None or evaluation is not None or all_pictures:
            raise OdcftError("--labels, --evaluation and --all-pictures are for the report of one run. Drop them.")
        return compare_runs(Path(text_of(run)), Path(text_of(other)), Path(text_of(out)), **shared)
    from odcft.reports.run_report import report as write

    if evaluation is not None and not isinstance(evaluation, Mapping):
        evaluation = text_of(evaluation)
    own: dict[str, Any] = {"labels": text_of(labels), "evaluation": evaluation, "sample": sample}
    return write(Path(text_of(run)), out=path_of(out), all_pictures=all_pictures, **own, **shared)
