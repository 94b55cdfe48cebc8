"""Arguments and options that several commands share, with their help."""

from typing import Annotated

import typer

from odcft import completion

MAX_IMAGE_SIZE = 4096  # same as in recipe.py, which is slow to import

Ckpt = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="Checkpoint file, timm folder, RUN (the folder `finetune` writes), timm:NAME or scratch:NAME.",
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder of images, list file (.txt, .csv, .tsv), shards (.tar, .parquet, or a pattern), or a URL.",
    ),
]
Arch = Annotated[
    str | None, typer.Option(help="Architecture (timm name), if it cannot be detected from the checkpoint.")
]
ArchArgs = Annotated[
    str | None,
    typer.Option(metavar="NAME=VALUE,…", help="Extra arguments to build the network with, for example patch_size=8."),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="COLOR",
        autocompletion=completion.choices("rgb", "bgr", "gray", "lab_l", "sobel"),
        help="Colours the network expects: rgb, bgr, gray, lab_l or sobel; detected by default.",
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="PATH",
        help="Which backbone to take where a file holds several, for example student; `inspect` lists them.",
    ),
]
Parts = Annotated[
    list[str] | None,
    typer.Option(
        "--part",
        metavar="PATH",
        help="Which backbone to take where a file holds several, for example student; `inspect` lists them. "
        "Of several checkpoints, one counts for all; or repeat it for each, in their order ('' for none).",
    ),
]
Partial = Annotated[
    bool,
    typer.Option(
        "--allow-partial",
        help="Accept a checkpoint with less than 90 % of the backbone; the rest starts from random weights.",
    ),
]
ReaderName = Annotated[
    str | None,
    typer.Option(
        "--reader",
        metavar="MODULE:FUNCTION",
        help="Your own function that reads an image: the file's bytes (or its `path`) to an array H x W x C.",
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="Name of a shipped recipe (see `odcft recipes`) or a YAML file.",
        autocompletion=completion.recipes,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Augmentation that suits the images: photo, gray, microscopy, satellite or document (docs/data.md).",
        autocompletion=completion.presets,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the recipe, for example memory.momentum=0.3; repeatable.",
        autocompletion=completion.fields,
    ),
]
Clusters = Annotated[
    str | None, typer.Option(metavar="K|auto", help="Number of clusters; auto means images / 128, at most 10,000.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Random seed. The same seed on the same machine gives the same backbone.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what odcft wrote there earlier.")]
Devices = Annotated[
    int,
    typer.Option(
        min=1, max=1024, help="Number of processes on this machine, one per GPU; without GPUs they share the CPU."
    ),
]
Accelerator = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="What to compute on: auto (a GPU if there is one), cpu, cuda (NVIDIA, AMD), xpu (Intel) or mps (Apple).",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(min=8, max=MAX_IMAGE_SIZE, help="Image size in pixels; by default that of the RUN or the network."),
]
