"""The paper's Table 4 on your data: checkpoints before and after fine-tuning by DC, ODC and collaborative ODC.

    python benchmarks/fine_tuning.py CKPT [CKPT…] DATA --test DATA [--out DIR] [--methods odc,dc] [--seeds 0,1]
        [--recipe small] [--dc-recipe dc_small] [--epochs 12] [--set FIELD=VALUE]… [--codc CKPT,CKPT]… [--json]

Every run is `odcft finetune` on DATA in its own process, evaluated by `odcft evaluate` on --test, half of it held out:
SVM mAP and kNN, of the last layer and of the best, which cross-validation on the other half chooses (results/ also has
the layer that is best on the test images, which the paper reports). All methods get the same overrides and --epochs; DC
has its own recipe. --codc adds a run of several checkpoints together, one per member. The column with all their names
is for their features side by side; it also has the checkpoints and the separate ODC runs side by side.

DIR keeps the runs, a JSON file for each (results/), table.json, and two pictures: loss_curves.png (fig. 1b) and
label_changes.png (fig. 5). To continue after an interruption, run the same command again: finished runs are skipped,
interrupted ones resumed. The first seed of every cell is run first, and the table is written after every run.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import runs
from runs import name_of

from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation.labels import load_labelled_images

PROTOCOLS = {"svm": "mAP", "knn": "top1"}
FIGURES = ("svm", "svm_best", "knn", "knn_best")
TIMES = ("seconds", "cpu_seconds")
COLOURS = {"odc": "tab:blue", "dc": "tab:orange", "codc": "tab:green"}


def main() -> None:
    args = parse_arguments()
    summed = table(run_all(args))
    print(json.dumps(summed) if args.json else as_text(summed))


def run_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Do all runs and evaluations that have not been done; return the results by name."""
    *ckpts, data = args.inputs
    for ckpt in ckpts:
        run_once(args.out, f"{name_of(ckpt)}-original", partial(evaluated, ckpt, args))
    for seed in args.seeds.split(","):
        for ckpt in ckpts:
            for method in args.methods.split(","):
                run = f"{name_of(ckpt)}-{method}-{seed}"
                run_once(args.out, run, partial(fine_tuned, args, run, [ckpt], data, method, seed))
    for together in args.codc:
        run_codc(args, together.split(","), data)
    return read(args.out)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read these words, or the command line; refuse what would only fail hours later, before anything is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="CKPT… DATA", help="checkpoints, then unlabelled images")
    parser.add_argument("--test", required=True, help="labelled images, one folder per class")
    parser.add_argument(
        "--out", type=Path, default=Path("fine_tuning"), help="folder for all output (default: fine_tuning)"
    )
    parser.add_argument("--methods", default="odc,dc", help="odc, dc or both (default: odc,dc)")
    parser.add_argument("--seeds", default="0,1", help="seeds of the runs (default: 0,1)")
    parser.add_argument("--recipe", default="small", help="recipe for ODC and CODC (default: small)")
    parser.add_argument(
        "--dc-recipe",
        help="recipe for DC, with the same number of epochs unless --epochs is given (default beside small: dc_small)",
    )
    parser.add_argument("--epochs", type=int, help="epochs of every run, instead of the recipe's")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help="change a recipe field"
    )
    parser.add_argument(
        "--codc", action="append", default=[], metavar="CKPT,CKPT", help="also fine-tune these checkpoints together"
    )
    parser.add_argument("--labelled", help="labelled images to train SVM and kNN on, instead of half of --test")
    parser.add_argument(
        "--crop", choices=("squash",), help="squash test images, as published, instead of cropping them"
    )
    parser.add_argument("--devices", type=int, default=1, help="processes of every run, one per GPU")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args(words)
    *ckpts, data = args.inputs
    if not ckpts:
        parser.error("give one or more checkpoints, and then the images")
    if len({name_of(ckpt) for ckpt in ckpts}) < len(ckpts):
        parser.error("two checkpoints have the same file name up to the first dot: rename or link one")
    if "dc" in args.methods.split(",") and not args.dc_recipe:
        if args.recipe != "small":
            parser.error(f"which recipe should DC use to compare with {args.recipe}? Give --dc-recipe NAME")
        args.dc_recipe = "dc_small"
    for together in args.codc:
        if len(together.split(",")) < 2:
            parser.error(f"--codc {together}: give several checkpoints, separated by commas")
    try:
        find_images(data)
        load_labelled_images(*data_of(args))
    except OdcftError as error:
        parser.error(str(error))
    names = ("test", "labelled", "recipe", "dc_recipe", "epochs", "overrides", "crop")
    settings = {name: getattr(args, name) for name in names}
    if said := runs.refuse_other_settings(args.out / "settings.json", {**settings, "data": data}):
        parser.error(said)
    return args


def run_codc(args: argparse.Namespace, members: list[str], data: str) -> None:
    """Fine-tune several checkpoints together; also evaluate the checkpoints, and their ODC runs, side by side."""
    name = "+".join(map(name_of, members))
    run_once(args.out, f"{name}-original", partial(evaluated, members, args))
    for seed in args.seeds.split(","):
        run = f"{name}-codc-{seed}"
        run_once(args.out, run, partial(fine_tuned, args, run, members, data, "codc", seed))
        separate = [args.out / f"{name_of(ckpt)}-odc-{seed}" / "backbone" for ckpt in members]
        if all(backbone.exists() for backbone in separate):
            run_once(args.out, f"{name}-odc-{seed}", partial(evaluated, [str(path) for path in separate], args))


def run_once(out: Path, name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Do a piece of work unless its result exists, then write the table and pictures of all results so far."""
    path = out / "results" / f"{name}.json"
    if not path.exists():
        runs.once(path, work)
        results = read(out)
        (out / "table.json").write_text(json.dumps(table(results), indent=1))
        print(as_text(table(results)), file=sys.stderr)
        draw(out, results)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """All results so far, by name: CHECKPOINT-original, CHECKPOINT-METHOD-SEED."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))}


def evaluated(backbone: str | list[str], args: argparse.Namespace) -> dict[str, Any]:
    """SVM mAP and kNN accuracy of a backbone, or of several side by side and each alone.

    `svm` is of the last layer; `svm_best` of the layer that cross-validation on the training half prefers, and `layers`
    says which that is and which one is best on the test half (what the paper reports). Likewise for kNN.
    """
    from odcft.evaluation.comparison import evaluate

    results = evaluate(backbone, *data_of(args), list(PROTOCOLS), layers="all", crop=args.crop or "centre")
    figures = [_figures(one) for one in (results, *results.get("members", []))]
    return {**figures[0], **({"members": figures[1:]} if len(figures) > 1 else {})}


def data_of(args: argparse.Namespace) -> tuple[str, str | None]:
    """DATA and --test of `odcft evaluate`."""
    return (args.labelled, args.test) if args.labelled else (args.test, None)


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {"layers": {}}
    for protocol, metric in PROTOCOLS.items():
        result = results[protocol]
        figures[protocol] = result[metric]
        if "per_layer" in result:
            chosen = max(result["per_layer"], key=lambda layer: result["per_layer"][layer]["cv"])
            figures[f"{protocol}_best"] = result["per_layer"][chosen][metric]
            figures["layers"][protocol] = {"chosen": chosen, "best_on_test": result["best_on_test"]}
    return figures


def fine_tuned(
    args: argparse.Namespace, name: str, ckpts: list[str], data: str, method: str, seed: str
) -> dict[str, Any]:
    """Do one run; return its evaluation and the wall-clock and CPU seconds it took."""
    run = args.out / name
    recipe = args.dc_recipe if method == "dc" else args.recipe
    options = ["--recipe", recipe, "--method", method, "--seed", seed, "--devices", args.devices]
    options += ["--epochs", args.epochs] if args.epochs else []
    options += [part for override in args.overrides for part in ("--set", override)]
    done = runs.fine_tune(run, ckpts, data, options)
    backbones = sorted(str(backbone) for backbone in run.glob("backbone*"))
    return {
        **evaluated(backbones if len(backbones) > 1 else backbones[0], args),
        **done,
        "method": method,
        "seed": int(seed),
        "recipe": recipe,
        "overrides": args.overrides,
    }


def table(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (highest minus lowest) of every cell: {checkpoint: {row: {figure: …}}}.

    The members of a CODC run also count in the columns of their checkpoints.
    """
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, result in results.items():
        column, row, *_ = re.split(r"-(?=original$|(?:dc|odc|codc)-\d+$)|-(?=\d+$)", name)
        cells.setdefault(column, {}).setdefault(row, []).append(result)
        if row == "codc":
            for place, member in zip(column.split("+"), result["members"], strict=True):
                cells.setdefault(place, {}).setdefault(row, []).append(member)
    summed: dict[str, Any] = {}
    for column, rows in cells.items():
        for row, cell_runs in rows.items():
            cell: dict[str, Any] = {"runs": len(cell_runs)}
            for figure in (*FIGURES, *TIMES):  # the times of a resumed run cover only its last part
                whole = [run for run in cell_runs if figure in FIGURES or not run.get("resumed")]
                values = [run[figure] for run in whole if figure in run]
                if values:
                    cell[figure] = statistics.mean(values)
                    cell[f"{figure}_spread"] = max(values) - min(values)
            summed.setdefault(column, {})[row] = cell
    return summed


def as_text(summed: dict[str, Any]) -> str:
    """The table as text: mean, ± half the spread if there are several runs, and gain over the checkpoint."""
    titles = ("SVM mAP", "best layer", "kNN", "best layer")
    lines = [f"{'':<36}{'':<10}" + "".join(f"{t:>14}{'gain':>7}" for t in titles) + f"{'minutes':>9}{'CPU min':>9}"]
    for column, rows in summed.items():
        for row in sorted(rows, key=lambda r: ["original", "dc", "odc", "codc"].index(r)):
            cell, text = rows[row], f"{column:<36}{row:<10}"
            for figure in FIGURES:
                spread = f" ±{cell[f'{figure}_spread'] / 2:.1f}" if cell["runs"] > 1 and figure in cell else ""
                text += f"{f'{cell[figure]:.1f}{spread}' if figure in cell else '':>14}"
                before = rows.get("original", {}).get(figure) if figure in cell else None
                text += f"{cell[figure] - before:>+7.1f}" if before is not None and row != "original" else f"{'':>7}"
            for figure in TIMES:
                text += f"{cell[figure] / 60:>9.1f}" if figure in cell else ""
            lines.append(text)
    return "\n".join(lines)


def draw(out: Path, results: dict[str, dict[str, Any]]) -> None:
    """Draw fig. 1b (loss of DC and ODC) and fig. 5 (share of labels that change) from the metrics of the runs."""
    done = {name: result for name, result in results.items() if "summary" in result}
    for file, figure, label, methods in (
        ("loss_curves.png", "loss_over_ln_k", "loss / ln K", ("odc", "dc")),
        ("label_changes.png", "change_ratio", "labels that change", ("odc", "codc")),
    ):
        panels: dict[str, list[runs.Curve]] = {}
        for name, run in sorted(done.items()):
            if run["method"] in methods:
                title = run["method"].upper() if run["seed"] == 0 else None
                curve = runs.curve_of_run(out / name, figure, title, COLOURS[run["method"]])
                panels.setdefault(name.rsplit("-", 2)[0], []).append(curve)
        if panels:
            runs.draw(out / file, panels, x="epoch", y=label, bottom=0)


if __name__ == "__main__":
    main()
