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

from odcft import __version__
from odcft.cli_options import (
    MAX_IMAGE_SIZE,
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
from odcft.distributed import stop_signals
from odcft.errors import OdcftError
from odcft.text import printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a self-supervised vision checkpoint on unlabelled images with Online Deep Clustering (ODC).",
)

LOST_PEER_DELAY = 5.0  # seconds: the launcher usually ends this process before it repeats what another says better
MOST_EPOCHS = 1_000_000  # same as in recipe.py, which is slow to import
DEFAULT_RECIPE, DC_RECIPE = "odc_r50_finetune", "dc_r50_finetune"


def _load_recipe(
    name: str,
    overrides: list[str] | None,
    clusters: str | None,
    seed: int | None,
    input: str | None = None,
    allow_partial: bool = False,
    arch_args: str | None = None,
    part: str | list[str | None] | None = None,
    preset: str | None = None,
) -> Any:
    from odcft.recipe import load_recipe

    given = {"memory.clusters": clusters, "seed": seed, "backbone.input": input}
    given["backbone.allow_partial"] = "true" if allow_partial else None
    given["backbone.part"] = None if part is None else json.dumps(part)
    given["backbone.arch_args"] = None if arch_args is None else json.dumps(_parse_arch_args(arch_args))
    overrides = [*(overrides or []), *(f"{k}={v}" for k, v in given.items() if v is not None)]
    return load_recipe(name, overrides, preset=preset)


def _parts(given: list[str] | None) -> str | list[str | None] | None:
    """What --part gives the recipe: one part for all checkpoints, or a list with one for each."""
    if not given:
        return None
    return given[0] if len(given) == 1 else [part or None for part in given]


def _parse_arch_args(arch_args: str | None) -> dict[str, Any]:
    from odcft.backbone.checkpoint_metadata import parse_arguments

    return parse_arguments(arch_args) if arch_args else {}


def _start_processes(devices: int) -> None:
    """Launch one process per device, or join the others if a launcher started this one."""
    from odcft.distributed.launch import run_ranks

    if devices > 1 and "RANK" not in os.environ:
        raise SystemExit(run_ranks(devices))
    if "RANK" in os.environ:
        import torch

        from odcft.distributed import dist

        gpu = torch.cuda.is_available()
        if gpu and dist.local_rank() >= torch.cuda.device_count():
            raise OdcftError(
                f"{devices} processes need as many GPUs, but this machine has {torch.cuda.device_count()}."
            )
        dist.start(torch.device("cuda", dist.local_rank()) if gpu else torch.device("cpu"))


def _say_preset(preset: str | None) -> None:
    """Print what a preset changes, and why."""
    if preset is not None:
        from odcft.presets import PRESETS
        from odcft.progress import Progress

        Progress().say(f"Preset      {preset}: {PRESETS[preset].what}")


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
    from odcft.backbone.inspection import describe
    from odcft.backbone.load import load_backbone
    from odcft.progress import Progress

    loaded = load_backbone(
        ckpt, arch, input, allow_partial, arch_args=_parse_arch_args(arch_args), finite=False, part=part
    )
    values, drawing = describe(loaded)
    recipe = "odc_vit" if loaded.backbone.is_transformer else None
    given = {"arch": arch, "arch_args": arch_args, "input": input, "allow_partial": allow_partial, "recipe": recipe}
    given |= {"part": part}
    line = f"Fine-tune it:   {command('finetune', ckpt, 'IMAGES/', out='RUN', **given)}"
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
        bool, typer.Option("--duplicates", help="List the images that are copies of each other.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Examine only so many images, spread over the set; all by default.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe that says the image size and the number of clusters.", show_default="the one that fits"
        ),
    ] = None,
    overrides: Set = None,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Say what a set of images is, which of them cannot be read, and whether they are enough. Nothing is written."""
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
    overwrite: Overwrite = False,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Extract features of all images, cluster them by K-Means, and save the memories that `finetune` starts from."""
    resolved = _load_recipe(recipe, overrides, clusters, seed, input, allow_partial, arch_args, part, preset)
    _start_processes(devices)
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
        str | None, typer.Option(help="odc, dc (DeepCluster) or codc (collaborative ODC); by default the recipe's.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a shipped recipe (see `odcft recipes`) or a YAML file.",
            show_default=f"{DEFAULT_RECIPE}; {DC_RECIPE} with --method dc; the RUN's own with --resume",
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
    overrides = [*(overrides or []), *([f"method={method}"] if method else [])]
    if recipe is None:
        usual = DC_RECIPE if "method=dc" in overrides else DEFAULT_RECIPE
        own = out / "recipe.yaml"
        recipe = str(own) if resume and os.path.isfile(own) and not os.path.islink(own) else usual
    parts = _parts(part)
    resolved = _load_recipe(recipe, overrides, clusters, seed, input, allow_partial, arch_args, parts, preset)
    if dry_run and resume:
        raise OdcftError("--dry-run says what a new run would do; --resume continues one. Drop one of them.")
    _start_processes(devices)
    _say_preset(preset)
    if dry_run:
        if eval_data is not None:
            from odcft.data.custom_reader import make_reader
            from odcft.evaluation.during_training import load_images_to_evaluate

            load_images_to_evaluate(eval_data, make_reader(reader))  # refused here as in the run
        options = {"arch": arch, "reader": reader, "memory": memory, "overwrite": overwrite}
        _dry_run(ckpts, data, out, resolved, as_json, epochs=epochs, **options)
        return
    from odcft.text import duration
    from odcft.train import fine_tune

    try:
        values = fine_tune(
            *(ckpts, data, out, resolved),
            arch=arch,
            reader=reader,
            memory=memory,
            resume=resume,
            overwrite=overwrite,
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
        f"Did it get better?    {command('evaluate', out, 'LABELLED_IMAGES/', protocol='svm,knn', reader=reader)}",
    ]
    _report(values, as_json, lines)


def _dry_run(
    ckpts: list[str], data: str, out: Path, recipe: Any, as_json: bool, *, epochs: int | None, **options: Any
) -> None:
    """Say what the run would do, need and take; exit with 2 if it does not fit."""
    from odcft.dry_run import describe
    from odcft.dry_run import dry_run as run

    if epochs is not None:
        recipe.optim.epochs = epochs
    values = run(ckpts, data, out, recipe, **options)
    words = shlex.join(["odcft", *(word for word in sys.argv[1:] if word not in ("--dry-run", "--json"))])
    _report(values, as_json, [*describe(values), *([f"Start it:   {words}"] if values["fits"] else [])])
    if not values["fits"]:
        raise typer.Exit(2)


def _resume_command(argv: list[str]) -> str:
    """The command that continues where this one was stopped."""
    words = shlex.join(["odcft", *(a for a in argv[1:] if a not in ("--overwrite", "--resume")), "--resume"])
    return f"the same torchrun …, now with --resume ({words})" if "TORCHELASTIC_RUN_ID" in os.environ else words


def command(verb: str, *words: object, **options: Any) -> str:
    """An odcft command that can be pasted into a shell, whatever characters its paths contain.

    Args:
        verb: the subcommand.
        words: its arguments.
        options: by name; None, False and empty lists are left out, True gives a flag, a list repeats the option.
    """
    parts = ["odcft", verb, *map(str, words)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one is not False:
                parts += [flag] if one is True else [flag, str(one)]
    return shlex.join(parts)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="RUN to export, or any checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder (timm, transformers) or file (others) to write.")],
    format: Annotated[str, typer.Option(help="timm, transformers, torchvision, safetensors or onnx.")] = "timm",
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
    from odcft.backbone import transformers_export
    from odcft.backbone.model_card import loading_code
    from odcft.exports import export as run

    backbone = run(source, out, format, arch, overwrite, input, allow_partial, size, _parse_arch_args(arch_args), part)
    seen = backbone.input
    lines = [f"Wrote {out} ({format}), read back and compared.", f"Images      {seen.describe_view()}"]
    if format == "transformers":
        lines.append(f"  {transformers_export.loading_code(backbone, str(out))}")
        if seen.intensity is not None:
            lines.append(
                "Note        transformers does not know which values are black and white: give it images of 8 bits."
            )
    elif format != "onnx":
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
        str, typer.Option(metavar="P[,P…]", help="Some of svm, low-shot, linear, knn, clusters; or unlabelled.")
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
    devices: Devices = 1,
    as_json: Json = False,
) -> None:
    """Measure how good a backbone's features are, by the field's protocols."""
    from odcft.data.view import CROPS
    from odcft.evaluation.feature_files import evaluate_file
    from odcft.evaluation.protocols import check_protocols, with_labels
    from odcft.evaluation.results_table import json_values, report_lines
    from odcft.evaluation.unlabelled_table import unlabelled_lines
    from odcft.progress import Progress

    wanted = check_protocols(protocol)
    protocols = with_labels(wanted, features=features is not None, test=test, layers=layers)
    unlabelled = len(protocols) < len(wanted)
    found: dict[str, Any] = {}  # without labels
    if crop not in CROPS:
        raise OdcftError(f"--crop {crop}: choose {' or '.join(CROPS)}.")
    if features is not None:
        if ckpts:
            raise OdcftError("--features takes the place of checkpoint and images. Drop one or the other.")
        results = evaluate_file(features, protocols, Progress(), test=Path(test) if test else None)
    elif not ckpts or len(ckpts) < 2:
        raise OdcftError(
            "evaluate takes a checkpoint and labelled images (odcft evaluate CKPT DATA), or --features FILE.npz."
        )
    else:
        _start_processes(devices)
        from odcft.evaluation.comparison import evaluate as run
        from odcft.evaluation.unlabelled_comparison import evaluate_unlabelled

        *sources, data = ckpts
        args = _parse_arch_args(arch_args)
        source = sources if len(sources) > 1 else sources[0]
        load: dict[str, Any] = {"arch": arch, "input": input, "allow_partial": allow_partial, "arch_args": args}
        options = {**load, "part": part, "size": size, "crop": crop, "reader": reader}
        found = evaluate_unlabelled(source, data, **options) if unlabelled else {}
        results = run(source, data, test, protocols, layers=layers, **options) if protocols else {}
        if not found and not results:  # rank 0 has them
            return
    lines = report_lines(results) if protocols else []
    if found:
        lines += unlabelled_lines(found)
        results |= {"unlabelled_images": results["unlabelled"]} if protocols else {}
        results["unlabelled"] = found
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
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the backbone's features of all images, with their paths, and labels if there are any."""
    _start_processes(devices)
    from odcft.embeddings import embed as run

    args = _parse_arch_args(arch_args)
    options: dict[str, Any] = {
        "arch": arch,
        "arch_args": args,
        "input": input,
        "part": part,
        "allow_partial": allow_partial,
    }
    values = run(ckpt, data, out, size=size, reader=reader, overwrite=overwrite, **options)
    if not values:  # rank 0 has them
        return
    lines = [f"Wrote {out}: {values['images']:,} images, {values['width']:,} features each."]
    for name, why in list(values["unreadable"].items())[:1]:
        lines.append(f"Left out    {len(values['unreadable']):,} that cannot be read; the first is {name} ({why}).")
    _report(values, as_json, lines)


@app.command()
def pretext(
    task: Annotated[str, typer.Argument(metavar="TASK", help="rotation, jigsaw or colorization.")],
    data: Data,
    arch: Annotated[str, typer.Option(help="Architecture by its timm name, for example resnet18.")],
    out: Annotated[Path, typer.Option(metavar="FILE.pth", help="Checkpoint to write.")],
    recipe: RecipeName = "pretext",
    overrides: Set = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MOST_EPOCHS, help="Number of epochs, instead of the recipe's.")
    ] = None,
    devices: Devices = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the training in --out after its last finished epoch.")
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    reader: ReaderName = None,
    as_json: Json = False,
) -> None:
    """Train a network on a pretext task, to have a checkpoint to fine-tune if you have none."""
    resolved = _load_recipe(recipe, overrides, None, seed)
    if epochs is not None:
        resolved.optim.epochs = epochs
    _start_processes(devices)
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
        str | None, typer.Argument(metavar="NAME", help="Recipe to print: a shipped one or a YAML file.")
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
            app()
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
