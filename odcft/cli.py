"""The command line: parse, call, print.

Everything heavy is imported inside the commands, so that --help answers at once.
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
from odcft.distributed import stop_signals
from odcft.errors import OdcftError
from odcft.text import shown

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a self-supervised vision checkpoint on unlabelled images, by Online Deep Clustering.",
)

Ckpt = Annotated[
    str, typer.Argument(metavar="CKPT", help="Checkpoint file, timm folder, RUN, or timm:NAME, scratch:NAME.")
]
Data = Annotated[str, typer.Argument(metavar="DATA", help="Folder of images, or a list file (.txt, .csv, .tsv).")]
Arch = Annotated[str | None, typer.Option(help="The architecture, where the checkpoint does not tell.")]
ArchArgs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=VALUE,…", help="What the network is built with besides its name, for example patch_size=8."
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="COLOR", help="What the network is shown: rgb, bgr, gray, lab_l or sobel; found by itself."
    ),
]
Partial = Annotated[
    bool, typer.Option("--allow-partial", help="Accept less than 90 % of the backbone; the rest starts random.")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe (`odcft recipes`) or a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="One field of the recipe, for example memory.momentum=0.3."),
]
Clusters = Annotated[str | None, typer.Option(metavar="K|auto", help="Clusters; auto is images / 128, at most 10,000.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same machine: same backbone.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what odcft wrote there before.")]
Devices = Annotated[int, typer.Option(min=1, help="Processes on this machine: GPUs, or shares of the CPU.")]

LOST = 5.0  # seconds: who launched the processes ends this one before it has said what another says better
MOST_EPOCHS, LARGEST_SIDE = 1_000_000, 4096  # as in recipe.py, which is slow to import
DEFAULT_RECIPE, DC_RECIPE = "odc_r50_finetune", "dc_r50_finetune"


def _recipe(
    name: str,
    overrides: list[str] | None,
    clusters: str | None,
    seed: int | None,
    input: str | None = None,
    allow_partial: bool = False,
    arch_args: str | None = None,
) -> Any:
    from odcft.recipe import load_recipe

    given = {"memory.clusters": clusters, "seed": seed, "backbone.input": input}
    given["backbone.allow_partial"] = "true" if allow_partial else None
    given["backbone.arch_args"] = None if arch_args is None else json.dumps(_arguments(arch_args))
    return load_recipe(name, [*(overrides or []), *(f"{k}={v}" for k, v in given.items() if v is not None)])


def _arguments(arch_args: str | None) -> dict[str, Any]:
    from odcft.backbone.metadata import parse_arguments

    return parse_arguments(arch_args) if arch_args else {}


def _join(devices: int) -> None:
    """Start the other processes, or join those that torchrun has started."""
    from odcft.distributed.launch import relaunch

    if devices > 1 and "RANK" not in os.environ:
        raise SystemExit(relaunch(devices))
    if "RANK" in os.environ:
        import torch

        from odcft.distributed import dist

        gpu = torch.cuda.is_available()
        if gpu and dist.local_rank() >= torch.cuda.device_count():
            raise OdcftError(f"{devices} processes need as many GPUs; this machine has {torch.cuda.device_count()}.")
        dist.start(torch.device("cuda", dist.local_rank()) if gpu else torch.device("cpu"))


def _tell(values: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """The end of a command: for people on stderr, or one JSON object on stdout; from rank 0 only."""
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
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("odcft-demo"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The whole story on 1,797 real images that need no download: checkpoint, memory, ODC and DC, before and after."""
    from odcft.demo import run_demo

    values, lines = run_demo(out, overwrite)
    _tell(values, as_json, lines)


@app.command()
def inspect(
    ckpt: Ckpt,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    allow_partial: Partial = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint is: family, architecture, input, and how much of the backbone is matched."""
    from odcft.backbone.inspection import describe
    from odcft.backbone.load import load_backbone

    loaded = load_backbone(ckpt, arch, input, allow_partial, arch_args=_arguments(arch_args), finite=False)
    values, lines = describe(loaded)
    recipe = "odc_vit" if loaded.backbone.is_transformer else None
    given = {"arch": arch, "arch_args": arch_args, "input": input, "allow_partial": allow_partial, "recipe": recipe}
    if not loaded.not_finite:
        lines.append(f"Fine-tune it:   {command('finetune', ckpt, 'IMAGES/', out='RUN', **given)}")
    _tell(values, as_json, lines)


@app.command("init-memory")
def init_memory(
    ckpt: Ckpt,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    clusters: Clusters = None,
    overrides: Set = None,
    seed: Seed = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    allow_partial: Partial = False,
    devices: Devices = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Features of all images, K-Means, and both memories on disk."""
    resolved = _recipe(recipe, overrides, clusters, seed, input, allow_partial, arch_args)
    _join(devices)
    from odcft.first_memory import init_memory as run

    values = run(ckpt, data, out, resolved, arch=arch, overwrite=overwrite)
    lines = [
        (
            f"Memory      {out}: {values['images']:,} images, "
            f"{values['clusters']:,} clusters of {values['smallest']:,} … {values['largest']:,}"
        )
    ]
    given = {"recipe": recipe if recipe != DEFAULT_RECIPE else None, "set": overrides, "seed": seed, "arch": arch}
    given |= {"arch_args": arch_args, "input": input, "allow_partial": allow_partial}
    lines.append(f"Go on:      {command('finetune', ckpt, data, memory=out, out='RUN', **given)}")
    _tell(values, as_json, lines)


@app.command()
def finetune(
    ckpts: Annotated[
        list[str], typer.Argument(metavar="CKPT… DATA", help="The checkpoint (codc: one a member), then the images.")
    ],
    out: Annotated[Path, typer.Option(help="The RUN folder to write.")],
    method: Annotated[str | None, typer.Option(help="odc, dc or codc; odc unless the recipe says.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A shipped recipe or a YAML file.",
            show_default=f"{DEFAULT_RECIPE}, with --method dc {DC_RECIPE}; resumed: the RUN's own",
        ),
    ] = None,
    overrides: Set = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_EPOCHS, help="Instead of the recipe's; may also prolong a resumed run."),
    ] = None,
    clusters: Clusters = None,
    memory: Annotated[Path | None, typer.Option(help="A folder of `odcft init-memory` to start from.")] = None,
    devices: Devices = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the RUN in --out.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    allow_partial: Partial = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a checkpoint on unlabelled images: the main job."""
    if len(ckpts) < 2:
        raise OdcftError("finetune takes a checkpoint and then the images: odcft finetune CKPT DATA --out RUN.")
    *ckpts, data = ckpts
    overrides = [*(overrides or []), *([f"method={method}"] if method else [])]
    if recipe is None:
        usual = DC_RECIPE if "method=dc" in overrides else DEFAULT_RECIPE
        own = out / "recipe.yaml"
        recipe = str(own) if resume and os.path.isfile(own) and not os.path.islink(own) else usual
    resolved = _recipe(recipe, overrides, clusters, seed, input, allow_partial, arch_args)
    _join(devices)
    from odcft.text import duration
    from odcft.train import fine_tune

    try:
        values = fine_tune(
            *(ckpts, data, out, resolved), arch=arch, memory=memory, resume=resume, overwrite=overwrite, epochs=epochs
        )
    except stop_signals.Stopped as stopped:
        stopped.args = (f"{stopped} Go on with: {_resuming(sys.argv)}",)
        raise
    lines = [
        f"Done in {duration(values['seconds'])}. Backbone: {', '.join(values.get('backbones', [values['backbone']]))}",
        f"  {values['load']}",
        f"Did it get better?    {command('evaluate', out, 'LABELLED_IMAGES/', protocol='svm,knn')}",
    ]
    _tell(values, as_json, lines)


def _resuming(argv: list[str]) -> str:
    """The command that goes on where this one was stopped."""
    words = shlex.join(["odcft", *(a for a in argv[1:] if a not in ("--overwrite", "--resume")), "--resume"])
    return f"the same torchrun …, now with --resume ({words})" if "TORCHELASTIC_RUN_ID" in os.environ else words


def command(verb: str, *words: object, **options: Any) -> str:
    """A command that can be pasted into a shell, whatever its paths are.

    Args:
        verb: of odcft.
        words: its arguments.
        options: by their names; None, False and empty lists are left out, True is a flag, a list comes several times.
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
    source: Annotated[str, typer.Argument(metavar="RUN|CKPT")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder (timm) or file (other formats).")],
    format: Annotated[str, typer.Option(help="timm, torchvision, safetensors or onnx.")] = "timm",
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    allow_partial: Partial = False,
    size: Annotated[
        int | None, typer.Option(min=8, max=LARGEST_SIDE, help="Pixels it is shown, where its source does not tell.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The backbone without neck and head, also straight from somebody else's checkpoint."""
    from odcft.backbone.model_card import loading_line
    from odcft.data.view import seen_as
    from odcft.exports import export as run

    backbone = run(source, out, format, arch, overwrite, input, allow_partial, size, _arguments(arch_args))
    seen = backbone.input
    lines = [f"Wrote {out} ({format}), read back and compared.", f"Images      {seen_as(seen.view)}"]
    if format != "onnx":
        lines.append(f"  {loading_line(backbone, str(out), folder=format == 'timm')}")
    if seen.color != "rgb" and format != "onnx":
        lines.append(f"Note        It is shown {seen.color}, not RGB: odcft does that by itself, others do not.")
    lines += [
        f"It is the first of several members; another is {other}." for other in sorted(Path(source).glob("backbone_*"))
    ]
    _tell({"out": str(out), "format": format}, as_json, lines)


@app.command()
def evaluate(
    ckpt: Annotated[
        str | None, typer.Argument(metavar="CKPT", help="Checkpoint or RUN; a RUN is set beside what it started from.")
    ] = None,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Labelled images: a folder a class, or a list with labels.")
    ] = None,
    protocol: Annotated[str, typer.Option(metavar="P[,P…]", help="svm, knn")] = "svm,knn",
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images to test on; by default a half is held out.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Features made elsewhere, instead of CKPT and DATA.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=8, max=LARGEST_SIDE, help="Pixels; by default the RUN's or the network's own.")
    ] = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    input: Input = None,
    allow_partial: Partial = False,
    as_json: Json = False,
) -> None:
    """How good a backbone's features are: VOC07 SVM mAP, nearest neighbours."""
    from odcft.evaluation.feature_files import evaluate_file
    from odcft.evaluation.protocols import check_protocols
    from odcft.evaluation.table import lines, public, summary
    from odcft.progress import Progress

    protocols = check_protocols(protocol)
    if features is not None:
        results = evaluate_file(features, protocols, Progress())
    elif ckpt is None or data is None:
        raise OdcftError(
            "evaluate takes a checkpoint and labelled images (odcft evaluate CKPT DATA), or --features FILE.npz."
        )
    else:
        from odcft.evaluation.comparison import evaluate as run

        args = _arguments(arch_args)
        results = run(ckpt, data, test, protocols, arch, size, input, allow_partial, arch_args=args)
    members = results.get("members", [])
    said = [summary(results), *([f"All {len(members)} members side by side:"] if members else []), *lines(results)]
    for member in members:
        said += [f"{member['source']} alone:", *lines(member)]
    _tell(public(results), as_json, said)


@app.command()
def pretext(
    task: Annotated[str, typer.Argument(metavar="TASK", help="rotation, jigsaw or colorization")],
    data: Data,
    arch: Annotated[str, typer.Option(help="A timm architecture, for example resnet18.")],
    out: Annotated[Path, typer.Option(metavar="FILE.pth", help="The checkpoint to write.")],
    recipe: RecipeName = "pretext",
    overrides: Set = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=MOST_EPOCHS, help="Instead of the recipe's.")] = None,
    devices: Devices = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --out, from its last epoch.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Train a pretext task: a checkpoint to start from where there is none."""
    resolved = _recipe(recipe, overrides, None, seed)
    if epochs is not None:
        resolved.optim.epochs = epochs
    _join(devices)
    from odcft.pretexts.training import train_pretext
    from odcft.text import duration

    values = train_pretext(task, data, arch, out, resolved, overwrite=overwrite, resume=resume)
    lines = [
        f"Done in {duration(values['seconds'])}: {values['accuracy']:.0%} right in the last epoch, "
        f"by chance {values['chance']:.1%}. Checkpoint: {out}",
        f"Go on:      {command('finetune', out, data, out='RUN', recipe=values['recipe'])}",
    ]
    _tell(values, as_json, lines)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(metavar="NAME")] = None, as_json: Json = False) -> None:
    """List the shipped recipes, or print one."""
    from odcft.recipe import dump, load_recipe, shipped

    known = shipped()
    if name is None:
        firsts = {recipe: text.splitlines()[0].lstrip("# ") for recipe, text in known.items()}
        if as_json:
            _tell(firsts, True, [])
        else:
            for recipe, line in firsts.items():
                typer.echo(f"{recipe:<18} {line}")
        return
    loaded = load_recipe(name)
    if as_json:
        _tell(loaded.model_dump(mode="json"), True, [])
    else:
        text = known[name] if name in known else Path(name).read_text(encoding="utf-8")
        typer.echo("\n".join(shown(line.expandtabs()) for line in text.rstrip().splitlines()))
        typer.echo(f"\n# With every default written out:\n{_commented(dump(loaded))}")


def _commented(text: str) -> str:
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


def _in_a_line(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
    """A warning of a library, as it is printed."""
    kind = "Warning" if category is UserWarning else category.__name__
    return f"{kind:<11} {shown(message)}\n"


def _lost_another(error: Exception) -> str:
    """What there is to say where another process is gone or cannot be reached, or ""."""
    if "RANK" not in os.environ:
        return ""
    from odcft.distributed import dist

    if not dist.lost_another(error):
        return ""
    return f"process {dist.rank()} has lost another ({shown(str(error).splitlines()[0])}). --resume goes on."


def main() -> NoReturn:
    """Run the command line and leave with its exit code: 0 done, 2 the user can fix it, 75 stopped, 1 anything else."""
    code, lost = 0, ""
    warnings.formatwarning = _in_a_line  # type: ignore[assignment]
    with stop_signals.listening():
        try:
            app()
        except SystemExit as end:  # how typer returns
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except OdcftError as error:
            print(f"odcft: {shown(error)}", file=sys.stderr)
            code = 2
        except stop_signals.Stopped as stopped:
            with suppress(OSError):  # the terminal may be gone
                if os.environ.get("RANK", "0") == "0":
                    how = str(stopped) or "Nothing was saved. Start it again with the same command."
                    print(f"odcft: {stop_signals.asked()}: stopped. {shown(how)}", file=sys.stderr, flush=True)
            os._exit(stop_signals.EXIT)  # without waiting for data workers that are in the middle of reading
        except Exception as error:  # a fault of ours, or of another process
            code, lost = 1, _lost_another(error)
            for line in traceback.format_exc().splitlines() if not lost else ():
                print(shown(line), file=sys.stderr)
    if lost:
        time.sleep(LOST)
        print(f"odcft: {lost}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        from odcft.distributed import dist

        dist.leave(code)
    sys.exit(code)
