"""The tables and figures of the ODC paper (Zhan et al., CVPR 2020) on your images, one command each.

    python benchmarks/paper.py TARGET --data DATA --scale full|tiny [--labelled DATA [--test DATA]]… [--ckpt CKPT]…
        [--out DIR] [--images N] [--per-class N] [--epochs E] [--set FIELD=VALUE]… [--seed S] [--devices N] [--json]

TARGET is table1, table2, table3, table4, fig1b, fig3, fig4, fig5, fig6 or fig7. DATA are the images to train on;
networks are evaluated on --labelled (by default DATA itself), half of it held out unless --test gives other images.
Tables 1 and 2 take several --labelled. `full` is what the paper did: its recipes, ResNet-50 and AlexNet, days on GPUs.
`tiny` does the same with a few hundred images in minutes on a CPU, and its figures mean nothing: it shows that a target
works. --images, --per-class, --epochs and --set make it larger.

DIR keeps runs/, results/ and TARGET.json with TARGET.md (tables) or TARGET.png (figures). Targets share runs: use one
DIR for all. To continue after an interruption, run the same command again. docs/paper.md says what each shows.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fine_tuning
import long_tail
import numpy as np
import runs
from runs import Curve, name_of

from odcft import files
from odcft.backbone.layers import LayerFeatures
from odcft.backbone.load import load_backbone
from odcft.data.host_memory import free_host_memory
from odcft.data.image_decoding import read_image
from odcft.data.missing_paths import refuse_missing
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation.labels import load_labelled_images
from odcft.evaluation.voc_folder import find_voc_folder
from odcft.recipe import load_recipe

PAPER: dict[str, Any] = {  # what the paper reports
    "table1": {
        "Random": [[11.6, 17.1, 16.9, 16.3, 14.1], [15.7, 20.3, 19.8, 19.1, 17.5]],
        "DC": [[12.9, 29.2, 38.2, 39.8, 36.1], [18.6, 30.8, 37.0, 37.5, 33.1]],
        "ODC": [[19.6, 32.8, 40.4, 41.4, 37.3], [24.0, 33.2, 38.3, 38.4, 35.5]],
    },
    "table2": {
        "Random": [[9.6, 13.7, 12.0, 8.0, 5.6], [12.9, 16.6, 15.5, 11.6, 9.0]],
        "DC": [[14.4, 29.6, 39.9, 52.2, 50.3], [19.3, 31.9, 39.0, 46.1, 43.6]],
        "ODC": [[14.8, 31.6, 42.5, 55.7, 57.6], [21.4, 35.0, 41.3, 47.4, 49.3]],
    },
    "table3": {"Random": (9.6, 12.7), "DC": (69.1, 46.9), "ODC": (78.2, 57.1)},
    "table4": {
        "original": {"colorization": 55.6, "jigsaw": 64.5, "rotation": 67.4, "dc": 69.1},
        "dc": {"colorization": 61.2, "jigsaw": 68.5, "rotation": 68.6, "dc": 70.0},
        "odc": {"colorization": 72.3, "jigsaw": 74.4, "rotation": 74.5, "dc": 77.0},
    },
    "fig1b": {"final loss": {"ODC": 2.0, "DC": 2.9}},
}
PER_CLUSTER = 25  # images to a cluster, at least: no run starts with fewer than min_cluster, 20
FEW_IMAGES = 5_000  # labelled images whose features fit into the memory of any machine
COPIES = 2  # of the features: of all images, and of those to train and to test on
ON_LAYERS = {  # targets that evaluate every layer, and the network
    "table1": "alexnet",
    **dict.fromkeys(("table2", "table3", "table4", "fig3", "fig4", "fig6"), "resnet"),
}
COLOURS = {"ODC": "tab:blue", "DC": "tab:orange", "Random": "tab:gray"}


@dataclass(frozen=True)
class Scale:
    """What differs between `full` and `tiny`. Recipes and overrides are by network, then by method."""

    networks: Mapping[str, str]
    recipes: Mapping[str, Mapping[str, tuple[str, ...]]]  # a recipe, then fields that it is changed by
    fine_tuning: tuple[str, str]  # recipes of ODC and DC
    both: tuple[str, ...]  # fields for all runs
    images: int | None  # to train on; None: all
    classes: int | None
    per_class: int | None  # images of each class to evaluate on
    subsets: tuple[int, int]  # images of the subsets of figs. 4 and 6
    subset_classes: int  # their classes
    clusters: int  # K for them
    intervals: tuple[int, ...]
    thresholds: tuple[int, ...]
    ratios: tuple[int, ...]
    first_epochs: int | None  # that fig. 1b shows
    crop: str  # of images for SVMs
    sizes: Mapping[str, int]  # of images to evaluate on, by network; a checkpoint's own if there is none
    run_clusters: int | None = None  # K of runs on all images; None: the recipe's


_ODC, _DC = "odc_r50_scratch", "dc_r50_scratch"
_SOBEL = "backbone.input=sobel"
SCALES = {
    "full": Scale(
        networks={"resnet": "scratch:resnet50", "alexnet": "scratch:alexnet"},
        recipes={
            "resnet": {"odc": (_ODC,), "dc": (_DC,)},
            "alexnet": {"odc": ("odc_alexnet",), "dc": (_DC, "optim.lr=0.05")},  # the rate of Caron et al. 2018
        },
        fine_tuning=("odc_r50_finetune", "dc_r50_finetune"),
        both=(),
        images=None,
        classes=None,
        per_class=None,
        subsets=(90_000, 100_000),
        subset_classes=300,
        clusters=3_000,
        intervals=(1, 5, 10, 20, 50, 100),
        thresholds=(5, 10, 20, 40, 80, 160),
        ratios=(1, 2, 4, 8, 16, 32, 64),
        first_epochs=32,
        crop="squash",
        sizes={"resnet": 224, "alexnet": 224, "ckpt": 224},
    ),
    "tiny": Scale(
        networks={"resnet": "scratch:resnet18", "alexnet": "scratch:alexnet"},
        recipes={
            "resnet": {"odc": ("odc_small", "data.size=32"), "dc": ("dc_small", "data.size=32", _SOBEL)},
            "alexnet": {"odc": ("odc_small", "data.size=64"), "dc": ("dc_small", "data.size=64", _SOBEL)},
        },
        fine_tuning=("odc_small", "dc_small"),
        both=(
            *("optim.batch_size=64", "optim.epochs=3", "log.interval=1", "log.tensorboard=false"),
            # the paper's DC, of which dc_small is more
            *("memory.start_layer=last", "optim.freeze=0", "optim.skip_padding=false"),
        ),
        images=400,
        classes=5,
        per_class=20,
        subsets=(400, 400),
        subset_classes=5,
        clusters=16,
        intervals=(1, 10),
        thresholds=(5, 20, 40),
        ratios=(1, 8, 64),
        first_epochs=None,
        crop="centre",
        sizes={"resnet": 32, "alexnet": 64},
        run_clusters=16,
    ),
}


def main() -> None:
    args = parse_arguments()
    try:
        work = prepare(args)
        refuse_too_little_memory(work, args.target)
        results = TARGETS[args.target](work)
    except (OdcftError, OSError) as error:
        sys.exit(long_tail.refused(error))
    except KeyboardInterrupt:
        print("\npaper.py: stopped. Continue with the same command.", file=sys.stderr)
        sys.exit(runs.EXIT_STOPPED)
    files.write_text_atomically(args.out / f"{args.target}.json", json.dumps(results, indent=1))
    if args.json:
        print(json.dumps(results))
        return
    table = args.out / f"{args.target}.md"
    if args.target.startswith("table"):
        print(table.read_text(encoding="utf-8"))
    print(f"Wrote {args.out / args.target}.json and {table.name if table.exists() else f'{args.target}.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--data", required=True, help="images to train on; figs. 4 and 6 need labels for subsets")
    parser.add_argument(
        "--labelled", action="append", default=[], metavar="DATA", help="labelled images to evaluate on (default: DATA)"
    )
    parser.add_argument(
        "--test", action="append", default=[], metavar="DATA", help="images to test on, one for each --labelled"
    )
    parser.add_argument(
        "--ckpt", action="append", default=[], metavar="CKPT", help="table3, fig3: another row; table4: a column"
    )
    parser.add_argument("--scale", required=True, choices=SCALES)
    parser.add_argument("--out", type=Path, default=Path("paper"), metavar="DIR", help="default: paper")
    parser.add_argument("--images", type=int, help="train on so many images, instead of the scale's number")
    parser.add_argument("--per-class", type=int, metavar="N", help="evaluate on so many labelled images of each class")
    parser.add_argument("--epochs", type=int, help="epochs of every run, instead of the recipe's")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1, help="processes of every run, one per GPU")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    args.labelled = args.labelled or [args.data]
    if args.test and len(args.test) != len(args.labelled):
        parser.error(f"{len(args.test)} --test for {len(args.labelled)} --labelled: give one for each, or none")
    if len(args.labelled) > 1 and args.target not in ("table1", "table2"):
        parser.error(f"{args.target} takes one --labelled; table1 and table2 take several")
    if len({name_of(ckpt) for ckpt in args.ckpt}) < len(args.ckpt):
        parser.error("two --ckpt have the same file name up to the first dot: rename or link one")
    if args.target == "table4" and args.scale == "full" and not args.ckpt:
        parser.error("table4 fine-tunes checkpoints: give one or more --ckpt, for example rotation.pth.tar")
    for name, least in (("images", 1), ("per_class", 4), ("epochs", 1), ("devices", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    if args.target.startswith("fig") and importlib.util.find_spec("matplotlib") is None:
        parser.error("the figures need matplotlib: pip install matplotlib")
    return args


# ---------------------------------------------------------------- runs and evaluations


@dataclass
class Work:
    """The output folder of one set of images and settings, and what is done in it.

    Attributes:
        out: the folder.
        data: images to train on.
        labelled: by name, images to evaluate on, and to test on if they are others.
        source: DATA as the user gave it, of which figs. 4 and 6 take other subsets.
        images: how many to train on, if the user said so.
    """

    out: Path
    scale: Scale
    data: str
    source: str
    labelled: dict[str, tuple[str, str | None]]
    overrides: list[str]
    ckpts: dict[str, str]
    seed: int
    devices: int
    images: int | None

    def run(self, name: str, network: str, method: str, *fields: str, data: str | None = None) -> Path:
        """The RUN of this name; train it from random weights if it is not finished."""
        recipe, *changes = self.scale.recipes[network][method]
        folder = self.out / "runs" / name
        changed = [*self.scale.both, *changes, *fields, *self.overrides]
        options: list[object] = ["--recipe", recipe, "--seed", self.seed, "--devices", self.devices]
        options += [word for one in changed for word in ("--set", one)]
        train = partial(runs.fine_tune, folder, [self.scale.networks[network]], data or self.data, options)
        result = self.out / "results" / f"run-{name}.json"
        runs.once(result, train)
        if not (folder / "metrics.jsonl").exists():
            raise OdcftError(
                f"{folder} is gone, although {result} says it was finished. Delete that file to train again."
            )
        return folder

    def evaluated(
        self, name: str, source: str | Path, labelled: str, protocols: list[str], layers: str, network: str = "resnet"
    ) -> Any:
        """The result of `odcft evaluate` for a checkpoint, or for the backbone of a RUN."""
        from odcft.evaluation.comparison import evaluate
        from odcft.evaluation.results_table import json_values

        data, test = self.labelled[labelled]
        crop = self.scale.crop if "svm" in protocols else "centre"
        backbone = str(source / "backbone" if isinstance(source, Path) else source)
        keep = self.out / "results" / f"{name}-{labelled}-{'-'.join(protocols)}.json"
        options: dict[str, Any] = {"size": self.scale.sizes.get(network), "layers": layers, "crop": crop}
        return runs.once(keep, lambda: json_values(evaluate(backbone, data, test, protocols, **options)))

    def only_labelled(self) -> str:
        """The name of the one set to evaluate on."""
        (name,) = self.labelled
        return name

    def write_table(
        self, target: str, rows: Sequence[Sequence[str]], paper: Sequence[Sequence[str]], note: str
    ) -> None:
        """Write a table and the paper's (the first row of each is its header), and a note between them."""
        parts = [_markdown(rows), note, f"The paper ({target}):", _markdown(paper)]
        files.write_text_atomically(self.out / f"{target}.md", "\n\n".join(parts) + "\n")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *others))


def prepare(args: argparse.Namespace) -> Work:
    """Refuse what cannot work, and make the lists of the images that a small scale uses.

    Raises:
        OdcftError: images that do not exist or have no labels, a wrong --set, or a DIR of other settings.
    """
    if args.out.exists() and not args.out.is_dir():
        raise OdcftError(f"--out {args.out} is not a folder. Choose another place.")
    refuse_missing(args.ckpt)
    scale, images = SCALES[args.scale], find_images(args.data)
    if args.per_class:
        scale = replace(scale, per_class=args.per_class)
    names: dict[str, tuple[str, str | None]] = {}
    for one, test in zip(args.labelled, args.test or [None] * len(args.labelled), strict=True):
        load_labelled_images(one, test)
        names[name_of(one) if name_of(one) not in names else f"{name_of(one)}{len(names)}"] = (one, test)
    ckpts = {name_of(ckpt): ckpt for ckpt in args.ckpt}
    overrides = [*args.overrides, *([f"optim.epochs={args.epochs}"] if args.epochs else [])]
    for recipe, *changes in (recipe for by_method in scale.recipes.values() for recipe in by_method.values()):
        load_recipe(recipe, [*scale.both, *changes, *overrides])  # refuse a wrong --set before anything is written
    _keep_settings(args, names, ckpts)
    data, count = args.data, args.images or scale.images
    if count is not None and count < len(images):
        data = str(args.out / "lists" / "train.csv")
        rows = _sample(_classes_of(images, scale.classes, args.seed), count, args.seed)
        runs.once_file(Path(data), lambda path: long_tail.write_list(images, rows, path))
    if scale.run_clusters is not None:
        trained_on = len(images) if data == args.data else len(rows)
        clusters = clusters_for(trained_on, scale.run_clusters)
        scale = replace(scale, both=(*scale.both, f"memory.clusters={clusters}"))
    if scale.per_class is not None:
        lists = args.out / "lists"
        names = {
            name: tuple(_few(one, lists / f"{name}-{i}.csv", scale, args.seed) for i, one in enumerate(pair))
            for name, pair in names.items()
        }
    return Work(args.out, scale, data, args.data, names, overrides, ckpts, args.seed, args.devices, args.images)


def clusters_for(images: int, most: int) -> int:
    """So many clusters; fewer where they would have fewer than PER_CLUSTER images on average."""
    return max(2, min(most, images // PER_CLUSTER))


def refuse_too_little_memory(work: Work, target: str) -> None:
    """Refuse to start what would end, days later, for want of memory: features of all layers of many images.

    Raises:
        OdcftError: says how much is needed, and how many images of each class would fit.
    """
    if target not in ON_LAYERS:
        return
    for data, test in work.labelled.values():
        labels = load_labelled_images(data, test)
        if len(labels.images) <= FEW_IMAGES:
            continue
        network = ON_LAYERS[target]
        backbone = load_backbone(work.scale.networks[network]).backbone.eval()
        width = sum(LayerFeatures(backbone, work.scale.sizes[network]).widths)
        needed, free = COPIES * 4 * width * len(labels.images), free_host_memory()
        if free is not None and needed > free:
            fits = int(0.8 * free / (COPIES * 4 * width) / (len(labels.classes) * len(labels.sets)))
            raise OdcftError(
                f"{target} keeps the features of every layer of {len(labels.images):,} labelled images in memory: "
                f"about {needed / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB are free. Evaluate on fewer images of each "
                f"class (--per-class {max(4, fits)}), or use a machine with more memory."
            )


def _keep_settings(args: argparse.Namespace, labelled: Mapping[str, Any], ckpts: Mapping[str, str]) -> None:
    """Keep what the results in DIR are of, by their names, and refuse others."""
    settings = {name: getattr(args, name) for name in ("data", "scale", "images", "epochs", "overrides", "seed")}
    if args.per_class:
        settings["per_class"] = args.per_class
    kept: dict[str, dict[str, Any]] = {"settings": settings}
    kept |= {f"labelled-{name}": {"images": pair} for name, pair in labelled.items()}
    kept |= {f"ckpt-{name}": {"path": os.path.abspath(ckpt)} for name, ckpt in ckpts.items()}
    for name, values in kept.items():
        if said := runs.refuse_other_settings(args.out / "settings" / f"{name}.json", values):
            raise OdcftError(f"{said}.")


def _classes_of(images: Any, classes: int | None, seed: int) -> np.ndarray:
    """The numbers of the images of so many random classes; of all images if they have no classes."""
    try:
        chosen = long_tail.random_classes(long_tail.rows_by_class(images)[0], classes, seed)
    except OdcftError:
        return np.arange(len(images))
    return np.concatenate(list(chosen.values()))


def _sample(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 3)).permutation(rows)[:count]


def _few(data: str | None, path: Path, scale: Scale, seed: int) -> str | None:
    """A list of a few images of each of a few classes, which are the same for every set with the same class names.

    A PASCAL VOC folder is used whole.
    """
    if data is None or find_voc_folder(data) is not None:
        return data
    images = find_images(data)
    by_class, _ = long_tail.rows_by_class(images)
    chosen = long_tail.random_classes(by_class, scale.classes, seed)
    rows = np.concatenate([_sample(rows, scale.per_class or len(rows), seed) for rows in chosen.values()])
    runs.once_file(path, lambda unfinished: long_tail.write_list(images, rows, unfinished))
    return str(path)


def from_scratch(work: Work, network: str) -> dict[str, str | Path]:
    """A network with random weights, and trained by DC and by ODC."""
    trained = {method.upper(): work.run(f"{network}-{method}", network, method) for method in ("dc", "odc")}
    return {"Random": work.scale.networks[network], **trained}


# ---------------------------------------------------------------- tables


def linear_table(work: Work, target: str, network: str) -> dict[str, Any]:
    """Tables 1 and 2: accuracy of a linear classifier on every layer."""
    found: dict[str, Any] = {}
    for title, source in from_scratch(work, network).items():
        for labelled in work.labelled:
            result = work.evaluated(f"{network}-{title.lower()}", source, labelled, ["linear"], "all", network)
            found.setdefault(title, {})[labelled] = {
                layer: figures["top1"] for layer, figures in result["linear"]["per_layer"].items()
            }
    layers = list(next(iter(found["ODC"].values())))
    titles = [*(f"conv{i}" for i in range(1, len(layers))), "pooled"]
    header = ["top-1", *(f"{labelled} {title}" for labelled in work.labelled for title in titles)]
    rows = [
        [title, *(f"{top1:.1f}" for by_layer in sets.values() for top1 in by_layer.values())]
        for title, sets in found.items()
    ]
    sets = [f"{name} conv{i}" for name in ("ImageNet", "Places205") for i in range(1, 6)]
    paper = [[title, *map(str, [*one, *other])] for title, (one, other) in PAPER[target].items()]
    work.write_table(target, [header, *rows], [["top-1", *sets], *paper], f"Layers: {', '.join(layers)}.")
    return {"top1": found, "paper": PAPER[target]}


def table3(work: Work) -> dict[str, Any]:
    """SVM and low-shot SVM at the best layer."""
    found: dict[str, Any] = {}
    for title, result in svm_of_all(work).items():
        svm, low = result["svm"], result["low_shot"]
        found[title] = {"layer": svm["layer"], "svm": svm["mAP"], "best_on_test": svm["best_on_test"]}
        found[title] |= {"low_shot": low["mAP"], "low_shot_best_cost": low["oracle"]["mAP"]}
    header = ["", "layer", "SVM mAP", "best layer on test", "its mAP", "low-shot mAP", "with the best cost on test"]
    rows = [
        [title, one["layer"], f"{one['svm']:.1f}", one["best_on_test"]["layer"], f"{one['best_on_test']['mAP']:.1f}"]
        + [f"{one[figure]:.1f}" for figure in ("low_shot", "low_shot_best_cost")]
        for title, one in found.items()
    ]
    paper = [["", "SVM mAP", "low-shot mAP"], *([title, *map(str, both)] for title, both in PAPER["table3"].items())]
    note = "Published tables choose the layer, and for low-shot the cost, on the test images, as the paper does below."
    work.write_table("table3", [header, *rows], paper, note)
    return {**found, "paper": PAPER["table3"]}


def svm_of_all(work: Work) -> dict[str, Any]:
    """SVM and low-shot SVM of the networks from scratch and of the given checkpoints, for table 3 and fig. 3."""
    protocols, labelled = ["svm", "low-shot"], work.only_labelled()
    found = {
        title: work.evaluated(f"resnet-{title.lower()}", source, labelled, protocols, "best")
        for title, source in from_scratch(work, "resnet").items()
    }
    for name, ckpt in work.ckpts.items():
        found[name] = work.evaluated(f"ckpt-{name}", ckpt, labelled, protocols, "best", "ckpt")
    return found


def table4(work: Work) -> dict[str, Any]:
    """Checkpoints before and after fine-tuning by DC and ODC: benchmarks/fine_tuning.py."""
    ckpts = list(work.ckpts.values()) or [pretext(work, task) for task in ("rotation", "jigsaw", "colorization")]
    data, test = work.labelled[work.only_labelled()]
    odc, dc = work.scale.fine_tuning
    words = [*ckpts, work.data, "--test", test or data, *(["--labelled", data] if test else [])]
    words += ["--out", work.out / "table4", "--recipe", odc, "--dc-recipe", dc, "--seeds", work.seed]
    words += ["--devices", work.devices, *(["--crop", "squash"] if work.scale.crop == "squash" else [])]
    words += [word for one in [*work.scale.both, *work.overrides] for word in ("--set", one)]
    args = fine_tuning.parse_arguments([str(word) for word in words])
    summed = fine_tuning.table(fine_tuning.run_all(args), args)

    def cell(figures: dict[str, float]) -> str:
        return " / ".join(f"{figures[name]:.1f}" for name in ("svm", "svm_best") if name in figures)

    rows = [[row, *(cell(cells[row]) for cells in summed.values())] for row in ("original", "dc", "odc")]
    paper = [["", *PAPER["table4"]["odc"]], *([row, *map(str, by.values())] for row, by in PAPER["table4"].items())]
    note = "SVM mAP of the last layer / of the layer that cross-validation chooses."
    work.write_table("table4", [["", *summed], *rows], paper, note)
    return {"cells": summed, "paper": PAPER["table4"]}


def pretext(work: Work, task: str) -> str:
    """A small checkpoint that was trained on this task, where none is given."""
    path, arch = work.out / f"{task}.pth", work.scale.networks["resnet"].removeprefix("scratch:")
    changes = [one for one in [*work.scale.both, *work.overrides] if not one.startswith("memory.")]
    words = [word for one in [*changes, "data.size=32"] for word in ("--set", one)]
    train = partial(runs.odcft, "pretext", task, work.data, "--arch", arch, "--out", path, "--overwrite", *words)
    runs.once(work.out / "results" / f"pretext-{task}.json", train)
    return str(path)


# ---------------------------------------------------------------- figures


def fig1b(work: Work) -> dict[str, Any]:
    """Loss of DC and ODC over the first epochs."""
    trained = {title: work.run(f"resnet-{title.lower()}", "resnet", title.lower()) for title in ("ODC", "DC")}
    curves = [runs.curve_of_run(run, "loss", title, COLOURS[title]) for title, run in trained.items()]
    final = {curve.label: curve.y[-1] for curve in curves}
    if (most := work.scale.first_epochs) is not None:
        curves = [_until(curve, most) for curve in curves]
    runs.draw(work.out / "fig1b.png", {"": curves}, x="epoch", y="loss", bottom=0)
    return {"final loss": final, "curves": _as_json(curves), "paper": PAPER["fig1b"]}


def _until(curve: Curve, epoch: float) -> Curve:
    kept = sum(x <= epoch for x in curve.x)
    return Curve(curve.x[:kept], curve.y[:kept], curve.label, curve.colour)


def _as_json(curves: Sequence[Curve]) -> dict[str, Any]:
    return {str(curve.label): {"x": curve.x, "y": curve.y} for curve in curves}


def fig3(work: Work) -> dict[str, Any]:
    """Low-shot SVM for each number of images."""
    found = {title: result["low_shot"] for title, result in svm_of_all(work).items()}
    panels = {
        title: [
            Curve([float(k) for k in part["per_k"]], list(part["per_k"].values()), name, COLOURS.get(name), "o")
            for name, part in parts.items()
        ]
        for title, parts in (
            ("cost chosen on training images", found),
            ("cost chosen on test, as published", {name: low["oracle"] for name, low in found.items()}),
        )
    }
    runs.draw(work.out / "fig3.png", panels, x="images of each class", y="mAP", log_x=True)
    return {title: _as_json(curves) for title, curves in panels.items()}


def fig4(work: Work) -> dict[str, Any]:
    """SVM after training on a subset with other centroid intervals, and with other thresholds for small clusters."""
    images = find_images(work.source)
    count = work.images or work.scale.subsets[0]
    data = work.out / "lists" / "fig4.csv"
    rows = _sample(_classes_of(images, work.scale.subset_classes, work.seed), count, work.seed)
    runs.once_file(data, lambda path: long_tail.write_list(images, rows, path))

    def trained(interval: int = 10, threshold: int = 20) -> dict[str, float]:
        fields = [f"memory.centroid_interval={interval}", f"memory.min_cluster={threshold}"]
        return _svm_on(work, f"fig4-{interval}-{threshold}", data, len(rows), *fields)

    found = {
        "centroids every n steps": {n: trained(interval=n) for n in work.scale.intervals},
        "smallest cluster": {n: trained(threshold=n) for n in work.scale.thresholds},
    }
    panels = {title: _sweep(points) for title, points in found.items()}
    runs.draw(
        work.out / "fig4.png",
        panels,
        x={"centroids every n steps": "n", "smallest cluster": "images"},
        y="mAP",
        log_x=True,
    )
    return {**found, "images": len(rows), "clusters": clusters_for(len(rows), work.scale.clusters)}


def fig6(work: Work) -> dict[str, Any]:
    """SVM after training on subsets of the same size that are more and more long-tailed."""
    images = find_images(work.source)
    by_class = long_tail.random_classes(long_tail.rows_by_class(images)[0], work.scale.subset_classes, work.seed)
    sizes = [len(rows) for rows in by_class.values()]
    count = min(
        work.images or work.scale.subsets[1], *(long_tail.most_images(sizes, ratio) for ratio in work.scale.ratios)
    )
    found = {}
    for ratio in work.scale.ratios:
        data = work.out / "lists" / f"fig6-{ratio}.csv"
        rows = long_tail.long_tail(by_class, ratio, count, work.seed)
        all_rows = np.concatenate(list(rows.values()))
        runs.once_file(data, lambda path, rows=all_rows: long_tail.write_list(images, rows, path))
        figures = _svm_on(work, f"fig6-{ratio}", data, len(all_rows))
        found[ratio] = {**figures, "sizes": [len(one) for one in rows.values()]}
    runs.draw(work.out / "fig6.png", {"": _sweep(found)}, x="largest class : smallest class", y="mAP", log_x=True)
    return {"ratios": found, "images": count, "clusters": clusters_for(count, work.scale.clusters)}


def _svm_on(work: Work, name: str, data: Path, images: int, *fields: str) -> dict[str, Any]:
    """Train a ResNet by ODC on so many images; the SVM's mAP at the layer cross-validation prefers, and at the best."""
    clusters = clusters_for(images, work.scale.clusters)
    run = work.run(name, "resnet", "odc", f"memory.clusters={clusters}", *fields, data=str(data))
    svm = work.evaluated(name, run, work.only_labelled(), ["svm"], "best")["svm"]
    return {"layer": svm["layer"], "mAP": svm["mAP"], "best_on_test": svm["best_on_test"]["mAP"]}


def _sweep(points: Mapping[int, Mapping[str, Any]]) -> list[Curve]:
    """The mAP over the values of a setting, with the layer chosen either way."""
    x = [float(value) for value in points]
    titles = {"mAP": "layer chosen on training images", "best_on_test": "on test, as published"}
    return [Curve(x, [point[key] for point in points.values()], title, None, "o") for key, title in titles.items()]


def fig5(work: Work) -> dict[str, Any]:
    """Share of labels that change in a batch, while two networks are trained from scratch by ODC."""
    curves = [
        runs.curve_of_run(work.run(f"{network}-odc", network, "odc"), "change_ratio", title)
        for network, title in (("resnet", "ResNet"), ("alexnet", "AlexNet"))
    ]
    runs.draw(work.out / "fig5.png", {"": curves}, x="epoch", y="labels that change", bottom=0)
    return {"curves": _as_json(curves)}


def fig7(work: Work, clusters: int = 8, columns: int = 10) -> dict[str, Any]:
    """Clusters as rows of images: the tightest ones, each with the images nearest to its centroid."""
    import pyarrow.parquet as pq

    table = pq.read_table(work.run("resnet-odc", "resnet", "odc") / "clusters.parquet").to_pydict()
    cluster_N, distance_N = np.array(table["cluster"]), np.array(table["distance"])
    images = find_images(work.data)
    row_of = {os.fsencode(name).decode("utf-8", "backslashreplace"): row for row, name in enumerate(images.names)}
    labels = list(images.class_labels())
    label_N = np.array([labels[row_of[name]] for name in table["path"]])
    large = [c for c in np.unique(cluster_N).tolist() if (cluster_N == c).sum() >= columns] or np.unique(cluster_N)
    tight = sorted(large, key=lambda c: distance_N[cluster_N == c].mean())[:clusters]
    shown = []
    for c in tight:
        members = np.flatnonzero(cluster_N == c)
        names, counts = np.unique(label_N[members], return_counts=True)
        nearest = members[np.argsort(distance_N[members], kind="stable")][:columns]
        most = {"label": str(names[counts.argmax()]), "purity": float(100 * counts.max() / len(members))}
        paths = [table["path"][i] for i in nearest]
        shown.append({"cluster": c, "images": len(members), **(most if any(names) else {}), "nearest": paths})
    _draw_rows(work.out / "fig7.png", shown, lambda name: read_image(images.read(row_of[name])), columns)
    return {"clusters": shown, **_against_labels(cluster_N, label_N)}


def _against_labels(cluster_N: np.ndarray, label_N: np.ndarray) -> dict[str, Any]:
    """NMI, purity and accuracy of the clusters against the labels of the training images, if they have several."""
    from odcft.evaluation.clusters import agreement

    if len(np.unique(label_N)) < 2:
        return {}
    compared = agreement(cluster_N, label_N)
    return {name: compared[name] for name in ("nmi", "purity", "accuracy")}


def _draw_rows(path: Path, shown: list[dict[str, Any]], read: Callable[[str], Any], columns: int) -> None:
    """Draw the images that are nearest to each centroid, a row for each cluster; `read` gives a Pillow image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(len(shown), columns, figsize=(columns + 2, len(shown)), squeeze=False)
    for row, one in zip(axes, shown, strict=True):
        for axis, name in zip(row, one["nearest"], strict=False):
            axis.imshow(read(name).resize((96, 96)))
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.axis("off")
        purity = f"\n{one['label'].split('/')[-1][:14]} {one['purity']:.0f} %" if "label" in one else ""
        title = f"{one['cluster']}: {one['images']}{purity}"
        row[0].text(-0.1, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
    picture.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(picture)


TARGETS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "table1": lambda work: linear_table(work, "table1", "alexnet"),
    "table2": lambda work: linear_table(work, "table2", "resnet"),
    **{"table3": table3, "table4": table4, "fig1b": fig1b, "fig3": fig3, "fig4": fig4},
    **{"fig5": fig5, "fig6": fig6, "fig7": fig7},
}


if __name__ == "__main__":
    main()
