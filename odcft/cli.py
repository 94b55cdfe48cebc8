"""The command line: parse the arguments, call the library, print the result.

Everything slow to import is imported inside the commands, so that --help answers at once.
"""

import json
import os
import shlex
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from odcft import __version__, completion
from odcft.cli_options import (
    MAX_IMAGE_SIZE,
    Accelerator,
    Arch,
    ArchArgs,
    Ckpt,
    Clusters,
    Data,
    Devices,
    Input,
    Json,
    Overwrite,
    Part,
    Partial,
    Parts,
    Preset,
    ReaderName,
    RecipeName,
    Seed,
    Set,
    Size,
)
from odcft.data.missing_paths import refuse_missing
from odcft.distributed import stop_signals
from odcft.errors import OdcftError
from odcft.recipe_choice import DC_RECIPE, DEFAULT_RECIPE, choose_recipe, parse_arch_args
from odcft.text import command, printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a self-supervised vision checkpoint on unlabelled images with Online Deep Clustering (ODC).",
)

LOST_PEER_DELAY = 5.0  # seconds: the launcher usually ends this process before it repeats what another says better
MOST_EPOCHS = 1_000_000  # same as in recipe.py, which is slow to import


def _parts(given: list[str] | None) -> str | list[str | None] | None:
    """What --part gives the recipe: one part for all checkpoints, or a list with one for each."""
    if not given:
        return None
    return given[0] if len(given) == 1 else [part or None for part in given]


def _start_processes(devices: int, kind: str) -> None:
    """Launch one process per device, or join the others if a launcher started this one.

    Args:
        devices: of this machine.
        kind: of device (`--accelerator`).
    """
    from odcft.distributed.launch import run_ranks

    if devices > 1 and "RANK" not in os.environ:
        raise SystemExit(run_ranks(devices))
    if kind == "auto" and "RANK" not in os.environ:
        return
    from odcft.distributed import accelerator, dist

    accelerator.choose(kind)
    if "RANK" in os.environ:
        dist.join()


def _say_preset(preset: str | None, progress: Any = None) -> None:
    """Print what a preset changes, and why."""
    if preset is not None:
        from odcft.presets import PRESETS
        from odcft.progress import Progress

        (progress or Progress()).say(f"Preset      {preset}: {PRESETS[preset].what}")


def _report(values: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print the result of a command on rank 0: lines for people on stderr, and with --json one object on stdout."""
    from odcft.distributed import dist
    from odcft.progress import Progress, print_json

    if dist.rank() > 0:
        return
    progress = Progress()
    for line in lines:
        progress.say(line)
    if as_json:
        print_json(values)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write everything to.")] = Path("odcft-demo"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Try odcft without a download: fine-tune a small network on 1,797 digits by ODC and by DeepCluster."""
    from odcft.demo import run_demo

    values, lines = run_demo(out, overwrite)
    _report(values, as_json, lines)


@app.command()
def inspect(
    ckpt: Ckpt,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    part: Part = None,
    allow_partial: Partial = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: its origin, architecture, input, and how much of the backbone it contains."""
    refuse_missing([ckpt])
    from odcft.backbone.inspection import describe
    from odcft.backbone.load import load_backbone
    from odcft.progress import Progress

    loaded = load_backbone(
        ckpt, arch, input, allow_partial, arch_args=parse_arch_args(arch_args), finite=False, part=part
    )
    values, drawing = describe(loaded)
    recipe = "small_vit" if loaded.backbone.is_transformer else "small"
    given = {"arch": arch, "arch_args": arch_args, "input": input, "allow_partial": allow_partial, "recipe": recipe}
    given |= {"part": part}
    line = f"Fine-tune it:   {command('finetune', ckpt, 'IMAGES/', out='RUN', **given)}"
    many = "without --recipe" if recipe == "small" else "--recipe odc_vit"
    line += f"   # more than 100,000 images: {many}"
    if loaded.not_finite:
        line = (
            "It cannot be fine-tuned, because weights that are not finite give no features. Use an earlier checkpoint."
        )
    Progress().draw(drawing)
    _report(values, as_json, [line])


@app.command("check-data")
def check_data(
    data: Data,
    duplicates: Annotated[
        bool,
        typer.Option(
            "--duplicates",
            help="List the images that are copies of each other, byte for byte. `odcft clusters RUN --near-duplicates` "
            "also finds resized and re-encoded ones.",
        ),
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Examine only so many images, spread over the set; all by default.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe that says the image size and the number of clusters.",
            show_default="the one that fits",
            autocompletion=completion.recipes,
        ),
    ] = None,
    overrides: Set = None,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Say what a set of images is, which of them cannot be read, and whether they are enough. Nothing is written."""
    refuse_missing(data=[data])
    from odcft.check_data import check_data as run
    from odcft.check_data import describe

    values = run(data, recipe=recipe, overrides=overrides, sample=sample, reader=reader)
    lines = describe(values, duplicates)
    if values["usable"]:
        given = {"recipe": values["recipe"] if values["recipe"] != DEFAULT_RECIPE else None, "set": overrides}
        given |= {"preset": values["preset"], "reader": reader}
        lines.append(f"Next:       {command('finetune', 'CKPT', data, out='RUN', **given)} --dry-run")
    _report(values, as_json, lines)
    if not values["usable"]:
        raise typer.Exit(2)


@app.command("init-memory")
def init_memory(
    ckpt: Ckpt,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write the memories to.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    clusters: Clusters = None,
    preset: Preset = None,
    overrides: Set = None,
    seed: Seed = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    part: Part = None,
    allow_partial: Partial = False,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    overwrite: Overwrite = False,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Extract features of all images, cluster them by K-Means, and save the memories that `finetune` starts from."""
    resolved = choose_recipe(
        recipe,
        preset=preset,
        set=overrides,
        clusters=clusters,
        seed=seed,
        input=input,
        part=part,
        allow_partial=allow_partial,
        arch_args=arch_args,
    )
    _start_processes(devices, accelerator)
    _say_preset(preset)
    from odcft.first_memory import init_memory as run

    values = run(ckpt, data, out, resolved, arch=arch, reader=reader, overwrite=overwrite)
    lines = [
        (
            f"Memory      {out}: {values['images']:,} images, "
            f"{values['clusters']:,} clusters of {values['smallest']:,} … {values['largest']:,}"
        )
    ]
    given = {"recipe": recipe if recipe != DEFAULT_RECIPE else None, "set": overrides, "seed": seed, "arch": arch}
    given |= {"arch_args": arch_args, "input": input, "allow_partial": allow_partial, "part": part}
    given |= {"reader": reader, "preset": preset}
    lines.append(f"Next:       {command('finetune', ckpt, data, memory=out, out='RUN', **given)}")
    _report(values, as_json, lines)


@app.command()
def finetune(
    ckpts: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT… DATA", help="The checkpoint (for codc, one per member), then the folder or list of images."
        ),
    ],
    out: Annotated[Path, typer.Option(help="RUN folder to write.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="odc, dc (DeepCluster) or codc (collaborative ODC); by default the recipe's.",
            autocompletion=completion.choices("odc", "dc", "codc"),
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a shipped recipe (see `odcft recipes`) or a YAML file.",
            show_default=f"{DEFAULT_RECIPE}; {DC_RECIPE} with --method dc; the RUN's own with --resume",
            autocompletion=completion.recipes,
        ),
    ] = None,
    preset: Preset = None,
    overrides: Set = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_EPOCHS,
            help="Number of epochs, instead of the recipe's; can also prolong a run with --resume.",
        ),
    ] = None,
    clusters: Clusters = None,
    memory: Annotated[Path | None, typer.Option(help="Folder written by `odcft init-memory` to start from.")] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="DATA",
            help="Labelled images to measure nearest-neighbour accuracy on after an epoch; training never sees the "
            "labels. The best epoch's backbone is kept in RUN/backbone_best.",
        ),
    ] = None,
    eval_every: Annotated[int, typer.Option(min=1, metavar="n", help="Epochs between two measurements of --eval.")] = 1,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do, need and take; write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the RUN in --out from its last saved state.")
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    part: Parts = None,
    allow_partial: Partial = False,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a checkpoint on unlabelled images. This is the main command."""
    if len(ckpts) < 2:
        raise OdcftError("finetune takes a checkpoint and then the images: odcft finetune CKPT DATA --out RUN.")
    *ckpts, data = ckpts
    resolved = choose_recipe(
        recipe,
        method=method,
        resume_from=out if resume else None,
        preset=preset,
        set=overrides,
        clusters=clusters,
        seed=seed,
        input=input,
        part=_parts(part),
        allow_partial=allow_partial,
        arch_args=arch_args,
    )
    if dry_run and resume:
        raise OdcftError("--dry-run says what a new run would do; --resume continues one. Drop one of them.")
    _start_processes(devices, accelerator)
    from odcft.doctor import machine_line
    from odcft.progress import Progress

    progress = Progress(opening=machine_line(resolved, out))
    _say_preset(preset, progress)
    if dry_run:
        if eval_data is not None:
            from odcft.data.custom_reader import make_reader
            from odcft.evaluation.during_training import load_images_to_evaluate

            load_images_to_evaluate(eval_data, make_reader(reader))  # refused here as in the run
        options = {"arch": arch, "reader": reader, "memory": memory, "overwrite": overwrite, "progress": progress}
        _dry_run(ckpts, data, out, resolved, as_json, epochs=epochs, recipe_given=recipe is not None, **options)
        return
    from odcft.text import duration
    from odcft.train import fine_tune

    restarted = not resume and _restarted_by_torchrun()
    try:
        values = fine_tune(
            *(ckpts, data, out, resolved),
            arch=arch,
            reader=reader,
            memory=memory,
            resume=resume or restarted,
            overwrite=overwrite and not restarted,
            progress=progress,
            epochs=epochs,
            eval_data=eval_data,
            eval_every=eval_every,
        )
    except stop_signals.Stopped as stopped:
        stopped.args = (f"{stopped} Continue with: {_resume_command(sys.argv)}",)
        raise
    lines = [
        f"Done in {duration(values['seconds'])}. Backbone: {', '.join(values.get('backbones', [values['backbone']]))}",
        f"  {values['load']}",
        *([f"Look at the clusters: {values['report']}"] if "report" in values else []),
        f"Did it get better?    {command('evaluate', out, 'LABELLED_IMAGES/', protocol='svm,knn', reader=reader)}",
    ]
    _report(values, as_json, lines)


def _dry_run(
    ckpts: list[str],
    data: str,
    out: Path,
    recipe: Any,
    as_json: bool,
    *,
    epochs: int | None,
    recipe_given: bool,
    **options: Any,
) -> None:
    """Say what the run would do, need and take; exit with 2 if it does not fit."""
    from odcft.dry_run import describe
    from odcft.dry_run import dry_run as run

    if epochs is not None:
        recipe.optim.epochs = epochs
    values = run(ckpts, data, out, recipe, **options)
    words = shlex.join(["odcft", *(word for word in sys.argv[1:] if word not in ("--dry-run", "--json"))])
    lines = describe(values)
    if values["better_recipe"] and not recipe_given:
        lines.append(f"Try first:  {words} --recipe {values['better_recipe']} --dry-run   # made for such a set")
    _report(values, as_json, [*lines, *([f"Start it:   {words}"] if values["fits"] else [])])
    if not values["fits"]:
        raise typer.Exit(2)


def _restarted_by_torchrun() -> bool:
    """Whether torchrun (`--max-restarts`) has started this command again after a failure, which is then said."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    from odcft.distributed import dist
    from odcft.progress import Progress

    restarted = dist.was_restarted()
    if restarted:
        Progress().say("Note        torchrun has started the processes again: the run goes on from its last state.")
    return restarted


def _resume_command(argv: list[str]) -> str:
    """The command that continues where this one was stopped."""
    words = shlex.join(["odcft", *(a for a in argv[1:] if a not in ("--overwrite", "--resume")), "--resume"])
    return f"the same torchrun …, now with --resume ({words})" if "TORCHELASTIC_RUN_ID" in os.environ else words


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="RUN to export, or any checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder (timm, transformers) or file (others) to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="timm, transformers, torchvision, safetensors or onnx.",
            autocompletion=completion.choices("timm", "transformers", "torchvision", "safetensors", "onnx"),
        ),
    ] = "timm",
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    part: Part = None,
    allow_partial: Partial = False,
    size: Annotated[
        int | None,
        typer.Option(min=8, max=MAX_IMAGE_SIZE, help="Image size in pixels, if not the one the source states."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export the backbone, without neck and head, of a RUN or of anybody's checkpoint."""
    refuse_missing([source])
    from odcft.backbone import transformers_export
    from odcft.backbone.model_card import loading_code
    from odcft.exports import export as run

    backbone = run(source, out, format, arch, overwrite, input, allow_partial, size, parse_arch_args(arch_args), part)
    seen = backbone.input
    lines = [f"Wrote {out} ({format}), read back and compared.", f"Images      {seen.describe_view()}"]
    if format == "transformers":
        lines.append(f"  {transformers_export.loading_code(backbone, str(out))}")
        if seen.intensity is not None:
            lines.append(
                "Note        transformers does not know which values are black and white: give it images of 8 bits."
            )
    elif format == "onnx":
        lines.append(f"  import onnxruntime; net = onnxruntime.InferenceSession({json.dumps(str(out))})")
    else:
        lines.append(f"  {loading_code(backbone, str(out), folder=format == 'timm')}")
    if seen.color != "rgb" and format not in ("onnx", "transformers"):
        lines.append(
            f"Note        Its input is {seen.color}, not RGB: odcft converts images itself, other software does not."
        )
    lines += [
        f"This is the first of several members; another is {other}."
        for other in sorted(Path(source).glob("backbone_[0-9]"))
    ]
    _report({"out": str(out), "format": format}, as_json, lines)


@app.command()
def evaluate(
    ckpts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CKPT… DATA",
            help="Checkpoint or RUN, then labelled images: one folder per class, or a list, .tar or .parquet with "
            "labels (a RUN is compared with the checkpoint it was started from; of several, each with the last).",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="P[,P…]",
            help="Some of svm, low-shot, linear, knn, semi, clusters; or unlabelled.",
            autocompletion=completion.protocols,
        ),
    ] = "svm,knn",
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Labelled images to test on; by default half of DATA is held out."),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Features computed elsewhere or written by `odcft embed`, instead of CKPT and DATA.",
        ),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            metavar="last|all|best",
            help="Layer to evaluate: the last, the one that cross-validation on the training images prefers, or all.",
            autocompletion=completion.choices("last", "all", "best"),
        ),
    ] = "last",
    crop: Annotated[
        str, typer.Option(help="centre, or squash: the whole image, as in the published results on VOC07.")
    ] = "centre",
    size: Size = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    part: Part = None,
    allow_partial: Partial = False,
    reader: ReaderName = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also show the figures of each class.")] = False,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    as_json: Json = False,
) -> None:
    """Measure how good a backbone's features are, by the field's protocols."""
    if features is None and ckpts and len(ckpts) > 1:
        refuse_missing(ckpts[:-1], [ckpts[-1], test])
    from odcft.data.view import CROPS
    from odcft.evaluation.any_protocol import all_lines, evaluate_any
    from odcft.evaluation.feature_files import evaluate_file
    from odcft.evaluation.protocols import check_protocols, with_labels
    from odcft.evaluation.results_table import json_values
    from odcft.progress import Progress

    protocols = check_protocols(protocol)
    with_labels(protocols, features=features is not None, test=test, layers=layers)  # refuses before processes start
    if crop not in CROPS:
        raise OdcftError(f"--crop {crop}: choose {' or '.join(CROPS)}.")
    if features is not None:
        if ckpts:
            raise OdcftError("--features takes the place of checkpoint and images. Drop one or the other.")
        if accelerator != "auto":
            _start_processes(1, accelerator)
        results = evaluate_file(features, protocols, Progress(), test=Path(test) if test else None, per_class=per_class)
    elif not ckpts or len(ckpts) < 2:
        raise OdcftError(
            "evaluate takes a checkpoint and labelled images (odcft evaluate CKPT DATA), or --features FILE.npz."
        )
    else:
        _start_processes(devices, accelerator)
        *sources, data = ckpts
        load: dict[str, Any] = {"arch": arch, "input": input, "allow_partial": allow_partial, "part": part}
        options = {**load, "arch_args": parse_arch_args(arch_args), "size": size, "crop": crop, "reader": reader}
        source = sources if len(sources) > 1 else sources[0]
        results = evaluate_any(source, data, test, protocols, layers=layers, per_class=per_class, **options)
        if not results:  # rank 0 has them
            return
    lines = all_lines(results, protocols)
    _report(json_values(results), as_json, lines)


@app.command()
def embed(
    ckpt: Ckpt,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="FILE.(npz|parquet)", help="File to write.")],
    size: Size = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    part: Part = None,
    allow_partial: Partial = False,
    reader: ReaderName = None,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the backbone's features of all images, with their paths, and labels if there are any."""
    refuse_missing([ckpt], [data])
    _start_processes(devices, accelerator)
    from odcft.embeddings import embed as run

    args = parse_arch_args(arch_args)
    options: dict[str, Any] = {
        "arch": arch,
        "arch_args": args,
        "input": input,
        "part": part,
        "allow_partial": allow_partial,
    }
    made = run(ckpt, data, out, size=size, reader=reader, overwrite=overwrite, **options)
    if not made["images"]:  # rank 0 has them
        return
    values = {k: v for k, v in made.items() if k not in ("features", "paths", "labels")}
    lines = [f"Wrote {out}: {made['images']:,} images, {made['width']:,} features each."]
    for name, why in list(made["unreadable"].items())[:1]:
        lines.append(f"Left out    {len(made['unreadable']):,} that cannot be read; the first is {name} ({why}).")
    _report(values, as_json, lines)


@app.command()
def clusters(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder that `finetune` wrote, finished or not; or the memory of `init-memory`."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.(csv|parquet)",
            help="Table to write: path, cluster, distance; with --near-duplicates group, path, similarity.",
        ),
    ] = None,
    folders: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a folder for each cluster, with links to its images.")
    ] = None,
    links: Annotated[
        str, typer.Option(help="In --folders: absolute or relative links, or copy. Images in shards are copied.")
    ] = "absolute",
    sheets: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write contact sheets as PNG, and label_first.csv: which images to label first.",
        ),
    ] = None,
    most: Annotated[
        int | None, typer.Option(min=1, help="Sheets to draw at most, of the largest first.", show_default="200")
    ] = None,
    near_duplicates: Annotated[
        bool,
        typer.Option(
            "--near-duplicates",
            help="Instead of clusters: groups of nearly identical images, by the features of the fine-tuned backbone.",
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.5, max=1.0, help="Of --near-duplicates: the least similarity.", show_default="0.85"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Where the images are now; by default where they were.")
    ] = None,
    reader: ReaderName = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show the clusters of a RUN; write them as a table, folders of links, or contact sheets; find near-duplicates."""
    from odcft import api

    given: dict[str, Any] = {"near_duplicates": near_duplicates, "threshold": threshold, "data": data, "reader": reader}
    outputs: dict[str, Any] = {"out": out, "folders": folders, "sheets": sheets}
    values = api.clusters(run, links=links, most=most, overwrite=overwrite, **outputs, **given)
    if near_duplicates:
        from odcft.duplicate_groups import describe as describe_groups

        _report(values, as_json, describe_groups(values))
        return
    from odcft.cluster_listing import describe

    lines = describe(values)
    if not (folders or sheets):
        others = "--folders, --out" + (", --near-duplicates" if (run / "run.json").exists() else "")
        lines.append(f"Next:       {command('clusters', run, sheets='SHEETS/')}   # or {others}")
    _report(values, as_json, lines)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `finetune` wrote, finished or not.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="RUN_B", help="A second RUN, to compare the first with.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Where the run's images are now; by default where they were.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="The same images with labels, to set the clusters beside the classes."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|FILE.json",
            help="Labelled images to judge the backbone by; or what `odcft evaluate RUN … --json` printed.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, max=50_000, help="Images among which neighbours are looked for; 0 for none.")
    ] = 2000,
    megabytes: Annotated[
        float, typer.Option(min=1, max=1000, help="Size of the page, at most: as many thumbnails as fit.")
    ] = 30.0,
    all_pictures: Annotated[
        bool, typer.Option("--all-pictures", help="Write the thumbnails that do not fit into a folder beside the page.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", show_default="report.html in the RUN", help="Page to write."),
    ] = None,
    reader: ReaderName = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show what a run has learned: one HTML page with its curves, clusters and neighbours before and after."""
    from odcft import api

    options: dict[str, Any] = {"data": data, "megabytes": megabytes, "reader": reader, "overwrite": overwrite}
    options |= {"labels": labels, "evaluation": evaluation, "sample": sample, "all_pictures": all_pictures}
    values = api.report(run, other, out=out, **options)
    if other is not None:
        from odcft.reports.two_runs import describe
    else:
        from odcft.reports.run_report import describe
    _report(values, as_json, describe(values))


@app.command()
def pretext(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="rotation, jigsaw or colorization.",
            autocompletion=completion.choices("rotation", "jigsaw", "colorization"),
        ),
    ],
    data: Data,
    arch: Annotated[str, typer.Option(help="Architecture by its timm name, for example resnet18.")],
    out: Annotated[Path, typer.Option(metavar="FILE.pth", help="Checkpoint to write.")],
    recipe: RecipeName = "pretext",
    overrides: Set = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MOST_EPOCHS, help="Number of epochs, instead of the recipe's.")
    ] = None,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the training in --out after its last finished epoch.")
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Train a network on a pretext task, to have a checkpoint to fine-tune if you have none."""
    resolved = choose_recipe(recipe, set=overrides, seed=seed)
    if epochs is not None:
        resolved.optim.epochs = epochs
    _start_processes(devices, accelerator)
    from odcft.pretexts.training import train_pretext
    from odcft.text import duration

    values = train_pretext(task, data, arch, out, resolved, overwrite=overwrite, resume=resume, reader=reader)
    lines = [
        f"Done in {duration(values['seconds'])}: {values['accuracy']:.0%} correct in the last epoch "
        f"(chance: {values['chance']:.1%}). Checkpoint: {out}",
        f"Next:       {command('finetune', out, data, out='RUN', recipe=values['recipe'], reader=reader)}",
    ]
    _report(values, as_json, lines)


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Recipe to print: a shipped one or a YAML file.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one with all its fields."""
    from odcft.recipe import dump, load_recipe, shipped

    known = shipped()
    if name is None:
        firsts = {recipe: text.splitlines()[0].lstrip("# ") for recipe, text in known.items()}
        if as_json:
            _report(firsts, True, [])
        else:
            for recipe, line in firsts.items():
                typer.echo(f"{recipe:<18} {line}")
        return
    loaded = load_recipe(name)
    if as_json:
        _report(loaded.model_dump(mode="json"), True, [])
    else:
        text = known[name] if name in known else Path(name).read_text(encoding="utf-8")
        typer.echo("\n".join(printable(line.expandtabs()) for line in text.rstrip().splitlines()))
        typer.echo(f"\n# The same with every default filled in:\n{_as_comment(dump(loaded))}")


@app.command()
def doctor(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Where RUN folders will go: its disk is tried.")
    ] = ".",
    as_json: Json = False,
) -> None:
    """Check this machine: libraries, GPUs, shared memory, cores, disk; and say how to fix what is wrong."""
    from odcft.doctor import check_machine, describe
    from odcft.progress import Progress, print_json

    progress = Progress()
    with progress.waiting("Checking this machine …"):
        values = check_machine(folder)
    for line in describe(values):
        progress.say(line, style={"warn": "yellow", "fail": "bold red"}.get(line.partition(" ")[0], ""))
    if as_json:
        print_json(values)
    if not values["usable"]:
        raise typer.Exit(2)


def _as_comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in text.rstrip().splitlines())


def _version(show: bool) -> None:
    if show:
        typer.echo(f"odcft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _format_warning(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
    """One printed line for a warning that a library gives."""
    kind = "Warning" if category is UserWarning else category.__name__
    return f"{kind:<11} {printable(message)}\n"


def _lost_peer_message(error: Exception) -> str:
    """The message for an error caused by losing another process; "" for any other error."""
    if "RANK" not in os.environ:
        return ""
    from odcft.distributed import dist

    if not dist.is_lost_peer_error(error):
        return ""
    return (
        f"process {dist.rank()} lost another process ({printable(str(error).splitlines()[0])}). Continue with --resume."
    )


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 a mistake the user can fix, 75 stopped by a signal, 1 anything else."""
    code, lost = 0, ""
    warnings.formatwarning = _format_warning  # type: ignore[assignment]
    with stop_signals.handling_signals():
        try:
            with completion.words_of_bash():
                app(prog_name="odcft")  # also where it was started as python -m odcft
        except SystemExit as end:  # the way typer returns
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except OdcftError as error:
            print(f"odcft: {printable(error)}", file=sys.stderr)
            code = 2
        except stop_signals.Stopped as stopped:
            with suppress(OSError):  # the terminal may be gone
                if os.environ.get("RANK", "0") == "0":
                    how = str(stopped) or "Nothing was saved. Start it again with the same command."
                    print(
                        f"odcft: {stop_signals.stop_requested()}: stopped. {printable(how)}",
                        file=sys.stderr,
                        flush=True,
                    )
            os._exit(stop_signals.EXIT_STOPPED)  # without waiting for data workers that are still reading
        except Exception as error:  # a bug of ours, or the loss of another process
            code, lost = 1, _lost_peer_message(error)
            for line in traceback.format_exc().splitlines() if not lost else ():
                print(printable(line), file=sys.stderr)
    if lost:
        time.sleep(LOST_PEER_DELAY)
        print(f"odcft: {lost}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        from odcft.distributed import dist

        dist.exit_process(code)
    sys.exit(code)
