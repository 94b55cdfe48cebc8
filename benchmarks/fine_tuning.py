"""The paper's Table 4 on your data: checkpoints before and after fine-tuning by DC, ODC and collaborative ODC.

    python benchmarks/fine_tuning.py CKPT [CKPT…] DATA --test DATA [--out DIR] [--methods odc,dc] [--seeds 0,1]
        [--recipe small] [--dc-recipe dc_small] [--epochs 12] [--set FIELD=VALUE]… [--codc CKPT,CKPT]…
        [--layers last|best] [--evaluate-again] [--json]

Every run is `odcft finetune` on DATA in its own process, evaluated by `odcft evaluate` on --test, half of it held out:
SVM mAP and kNN, of three layers. `last`: the backbone's features. `best`: of every network the layer that
cross-validation on the training half prefers. `best*`: the layer that is best on the test images, as in published
tables, also the paper's; that flatters. All methods get the same overrides and --epochs; DC has its own recipe. --codc
adds a run of several checkpoints together, one per member. The column with all their names is for their features side
by side; it also has the checkpoints and the separate ODC runs side by side.

Below the table, each run is compared with its checkpoint, and ODC with DC: paired bootstrap intervals over the test
images, and the verdict of `odcft evaluate`.

DIR keeps the runs, two files for each (results/: the figures, and the scores of the test images), table.json, and two
pictures: loss_curves.png (fig. 1b) and label_changes.png (fig. 5). To continue after an interruption, run the same
command again: finished runs are skipped, interrupted ones resumed. --evaluate-again evaluates the runs of DIR afresh
and trains none that is finished. The first seed of every cell is run first, and the table is written after every run.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import runs
from runs import name_of

from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.evaluation.confidence_intervals import changes_with_intervals
from odcft.evaluation.labels import load_labelled_images
from odcft.evaluation.results_table import METRICS
from odcft.evaluation.verdict import verdict_line
from odcft.exports import export
from odcft.run.folder import BACKBONES

PROTOCOLS = ("svm", "knn")
LAYERS = {"last": "", "best": "_best", "best*": "_published"}  # which layer is reported, to the ending of its figures
FIGURES = tuple(f"{protocol}{ending}" for ending in LAYERS.values() for protocol in PROTOCOLS)
TIMES = ("seconds", "cpu_seconds")
COLOURS = {"odc": "tab:blue", "dc": "tab:orange", "codc": "tab:green"}


def main() -> None:
    args = parse_arguments()
    summed = table(run_all(args), args)
    print(json.dumps(summed) if args.json else as_text(summed))


def run_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Do all runs and evaluations that have not been done; return the results by name."""
    *ckpts, data = args.inputs
    for ckpt in ckpts:
        run_once(args, f"{name_of(ckpt)}-original", [ckpt])
    for seed in args.seeds.split(","):
        for ckpt in ckpts:
            for method in args.methods.split(","):
                run = f"{name_of(ckpt)}-{method}-{seed}"
                train = partial(fine_tuned, args, run, [ckpt], data, method, seed)
                run_once(args, run, backbones_of(args.out / run), train)
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
    parser.add_argument("--layers", choices=("last", "best"), default="best", help="last is quicker (default: best)")
    parser.add_argument("--evaluate-again", action="store_true", help="evaluate finished runs afresh")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args(words)
    *ckpts, data = args.inputs
    if not ckpts:
        parser.error("give one or more checkpoints, and then the images")
    if len({name_of(ckpt) for ckpt in ckpts}) < len(ckpts):
        parser.error("two checkpoints have the same file name up to the first dot: rename or link one")
    if unknown := [method for method in args.methods.split(",") if method not in ("odc", "dc")]:
        parser.error(f"--methods {args.methods}: {unknown[0]!r} is neither odc nor dc")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is not a folder")
    if "dc" in args.methods.split(",") and not args.dc_recipe:
        if args.recipe not in ("small", "odc_small"):
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
    run_once(args, f"{name}-original", members)
    for seed in args.seeds.split(","):
        run = f"{name}-codc-{seed}"
        run_once(
            *(args, run, backbones_of(args.out / run, len(members))),
            partial(fine_tuned, args, run, members, data, "codc", seed),
        )
        separate = [args.out / f"{name_of(ckpt)}-odc-{seed}" / BACKBONES[0] for ckpt in members]
        if all(backbone.exists() for backbone in separate):
            run_once(args, f"{name}-odc-{seed}", [str(path) for path in separate])


def backbones_of(run: Path, members: int = 1) -> list[str]:
    """The backbones that a run of so many members ends with."""
    return [str(run / name) for name in BACKBONES[:members]]


def run_once(
    args: argparse.Namespace, name: str, backbones: list[str], train: Callable[[], dict[str, Any]] | None = None
) -> None:
    """Train and evaluate what has not been yet, then write the table and pictures of all results so far."""
    path = args.out / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else train() if train else {}
    path.write_text(json.dumps(record, indent=1))  # a run need not be repeated if its evaluation is interrupted
    wanted = "svm" if args.layers == "last" else "svm_best"
    if args.evaluate_again or wanted not in record:
        figures, arrays = evaluated(args, name, backbones)
        np.savez(path.with_suffix(".npz"), **arrays)
        path.write_text(json.dumps(record | figures, indent=1))
        results = read(args.out)
        summed = table(results, args)
        (args.out / "table.json").write_text(json.dumps(summed, indent=1))
        print(as_text(summed), file=sys.stderr)
        draw(args.out, results)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """All results so far, by name: CHECKPOINT-original, CHECKPOINT-METHOD-SEED."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))}
    return {name: result for name, result in found.items() if "svm" in result}


def evaluated(
    args: argparse.Namespace, name: str, backbones: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The figures of FIGURES and their `layers`, also of each of several `members`; and what intervals need."""
    source = backbones[0] if len(backbones) == 1 else side_by_side(args.out / "side_by_side" / name, backbones)
    measure = partial(evaluate, source, *data_of(args), PROTOCOLS, crop=args.crop or "centre")
    best = measure(layers="best") if args.layers == "best" else None
    last = measure()
    arrays = {}
    for ending, one in (("", last), ("_best", best)):
        if one is not None:
            per_class = [np.nan if value is None else value for value in one["svm"]["per_class"]]
            arrays |= {f"scores{ending}": one["svm"]["scores"], f"per_class{ending}": np.array(per_class)}
            arrays[f"predicted{ending}"] = one["knn"]["predicted"]
    pairs = [(last, best), *zip(last.get("members", ()), (best or last).get("members", ()), strict=True)]
    figures = [figures_of(one, other if best else None) for one, other in pairs]
    return {**figures[0], **({"members": figures[1:]} if len(figures) > 1 else {})}, arrays


def data_of(args: argparse.Namespace) -> tuple[str, str | None]:
    """DATA and --test of `odcft evaluate`."""
    return (args.labelled, args.test) if args.labelled else (args.test, None)


def figures_of(last: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of one network, from its evaluations at the last and at the best layer."""
    found: dict[str, Any] = {"layers": {}}
    for protocol in PROTOCOLS:
        metric = METRICS[protocol][1]
        found[protocol] = last[protocol][metric]
        if best is not None:
            chosen, published = best[protocol], best[protocol]["best_on_test"]
            found |= {f"{protocol}_best": chosen[metric], f"{protocol}_published": published[metric]}
            found["layers"] |= {f"{protocol}_best": chosen["layer"], f"{protocol}_published": published["layer"]}
    return found


def side_by_side(folder: Path, backbones: list[str]) -> str:
    """A folder that `evaluate` takes for a run of several members: links to backbones, or checkpoints exported."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in zip(BACKBONES, backbones, strict=False):
        if (folder / name).exists():
            continue
        if Path(source).is_dir():
            (folder / name).symlink_to(Path(source).resolve())
        else:
            export(source, folder / name)
    return str(folder)


def fine_tuned(
    args: argparse.Namespace, name: str, ckpts: list[str], data: str, method: str, seed: str
) -> dict[str, Any]:
    """Do one run; return its evaluation and the wall-clock and CPU seconds it took."""
    run = args.out / name
    kept = all(Path(path, "config.json").exists() for path in backbones_of(run, len(ckpts)))
    recipe = args.dc_recipe if method == "dc" else args.recipe
    if method == "codc" and recipe in ("small", "fast"):  # whose start and instance loss are for a single network
        recipe = "odc_small"
    options = ["--recipe", recipe, "--method", method, "--seed", seed, "--devices", args.devices]
    options += ["--epochs", args.epochs] if args.epochs else []
    options += [part for override in args.overrides for part in ("--set", override)]
    record = {"method": method, "seed": int(seed), "recipe": recipe, "overrides": args.overrides}
    if kept:  # by hand, or its result was removed: what it took is not known
        return {**record, "resumed": True, "summary": {}}
    return {**record, **runs.fine_tune(run, ckpts, data, options)}


def table(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Mean and spread (highest minus lowest) of every cell: {checkpoint: {row: {figure: …}}}.

    The members of a CODC run also count in the columns of their checkpoints. `layers` are those of the figures,
    `verdicts` what the intervals say, in sentences.
    """
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, result in results.items():
        column, row = column_and_row(name)
        cells.setdefault(column, {}).setdefault(row, []).append(result)
        if row == "codc":
            for place, member in zip(column.split("+"), result["members"], strict=True):
                cells.setdefault(place, {}).setdefault(row, []).append(member)
    summed: dict[str, Any] = {}
    for column, rows in cells.items():
        for row, cell_runs in rows.items():
            cell: dict[str, Any] = {"runs": len(cell_runs), "layers": [run.get("layers", {}) for run in cell_runs]}
            for figure in (*FIGURES, *TIMES):  # the times of a resumed run cover only its last part
                whole = [run for run in cell_runs if figure in FIGURES or not run.get("resumed")]
                values = [run[figure] for run in whole if figure in run]
                if values:
                    cell[figure] = statistics.mean(values)
                    cell[f"{figure}_spread"] = max(values) - min(values)
            summed.setdefault(column, {})[row] = cell
    for name in results:
        column, row = column_and_row(name)
        summed[column][row].setdefault("verdicts", []).extend(verdicts(name, set(results), args))
    return summed


def column_and_row(name: str) -> tuple[str, str]:
    """CHECKPOINT and METHOD of the name of a result."""
    column, row, *_ = re.split(r"-(?=original$|(?:dc|odc|codc)-\d+$)|-(?=\d+$)", name)
    return column, row


def verdicts(name: str, known: set[str], args: argparse.Namespace) -> list[str]:
    """How a run compares with its checkpoint, and ODC with DC, at the last and the best layer, in sentences."""
    column, row = column_and_row(name)
    if row == "original":
        return []
    others = {f"{column}-original": "the checkpoint"}
    if row != "dc":
        others[name.replace(f"-{row}-", "-dc-")] = "DC"
    lines = []
    for other, than in others.items():
        for layer, ending in (("last", ""), ("best", "_best")):
            pair = [result_arrays(args.out, one, ending) for one in (other, name)] if other in known else [None]
            targets = test_targets(*data_of(args))
            if None in pair or any(len(one["knn"]["predicted"]) != len(targets) for one in pair if one):
                continue
            changes = changes_with_intervals(*pair, targets)
            figures = ", ".join(
                "{} {change:+.1f} ({low:+.1f} … {high:+.1f})".format(METRICS[protocol][0], **change)
                for protocol, change in changes.items()
            )
            lines.append(f"{name}, {layer} layer: {verdict_line(changes, len(targets), than)} {figures}.")
    return lines


def result_arrays(out: Path, name: str, ending: str) -> dict[str, Any] | None:
    """What intervals need of a result, as `evaluate` returns it; None if it was not evaluated at that layer."""
    path = out / "results" / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        if f"scores{ending}" not in arrays:
            return None
        per_class = [None if np.isnan(value) else float(value) for value in arrays[f"per_class{ending}"]]
        scores, predicted = arrays[f"scores{ending}"], arrays[f"predicted{ending}"]
    figures = json.loads(path.with_suffix(".json").read_text())
    return {
        "svm": {"mAP": figures[f"svm{ending}"], "per_class": per_class, "scores": scores},
        "knn": {"top1": figures[f"knn{ending}"], "predicted": predicted},
    }


@cache
def test_targets(data: str, test: str | None) -> np.ndarray:
    """Targets (N, C) of the images that are tested on."""
    labels = load_labelled_images(data, test)
    return labels.targets[labels.test_rows]


def as_text(summed: dict[str, Any]) -> str:
    """The table as text: mean, ± half the spread if there are several runs, and gain over the checkpoint."""
    lines = [
        f"{'':<36}{'':<10}{'layer':<7}{'SVM mAP':>14}{'gain':>7}{'kNN':>14}{'gain':>7}{'minutes':>9}{'CPU min':>9}"
    ]
    said: list[str] = []
    for column, rows in summed.items():
        for row in sorted(rows, key=lambda r: ["original", "dc", "odc", "codc"].index(r)):
            cell = rows[row]
            said += cell.get("verdicts", [])
            for layer, ending in LAYERS.items():
                if f"svm{ending}" not in cell:
                    continue
                text = f"{column:<36}{row:<10}{layer:<7}" if not ending else f"{'':<46}{layer:<7}"
                for figure in (f"{protocol}{ending}" for protocol in PROTOCOLS):
                    spread = f" ±{cell[f'{figure}_spread'] / 2:.1f}" if cell["runs"] > 1 else ""
                    text += f"{f'{cell[figure]:.1f}{spread}':>14}"
                    before = rows.get("original", {}).get(figure)
                    shown = before is not None and row != "original"
                    text += f"{cell[figure] - before:>+7.1f}" if shown else f"{'':>7}"
                for figure in TIMES if not ending else ():
                    text += f"{cell[figure] / 60:>9.1f}" if figure in cell else ""
                lines.append(text)
    lines.append(
        "best: the layer that cross-validation on the training half prefers; best*: the best on the test images"
    )
    return "\n".join([*lines, *said])


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
