"""How much better is a checkpoint after so many minutes on one core? Recipes compared at equal time, over seeds.

    python benchmarks/budget.py CKPT DATA --test DATA [--minutes 5,10,20] [--recipes small,dc_small] [--seeds 0,1,2]
        [--layers last|best] [--set FIELD=VALUE]… [--core N] [--out DIR] [--json]

First every recipe is timed: `odcft finetune --dry-run` with one thread on one core, several times, of which the
quickest counts. Start it while the machine is quiet. Minutes then become epochs, at least one, and the run trains for
those: from here on, other work on the machine changes nothing. Every run is evaluated by SVM and kNN on --test, half of
it held out, at the last and at the best layer (`--layers last` is quicker). A recipe may be a YAML file.

DIR keeps timings, runs (backbones without states) and results; a second call does what is missing. It prints a table:
mean and, over several seeds, half the width of the 95 % interval (Student's t); table.json has all figures, gain.png
draws the gain against the minutes. A condition is checked: nothing may end below the checkpoint.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import runs
from fine_tuning import FIGURES, evaluated
from runs import Curve, name_of

TIMED_EPOCHS = 20  # of the dry run
SHOWN = {"svm": "SVM mAP", "svm_best": "SVM, best layer", "knn": "kNN", "knn_best": "kNN, best layer"}
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def main() -> None:
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    recipes = {name_of(recipe): recipe for recipe in args.recipes.split(",")}
    results = {"original": runs.once(args.out / "results" / "original.json", partial(_evaluated, args, [args.ckpt]))}
    times = {name: time_of(args, name, recipe) for name, recipe in recipes.items()}
    for seed in args.seeds.split(","):  # first all cells with one seed
        for minutes in args.minutes.split(","):
            for name, recipe in recipes.items():
                epochs = epochs_within(float(minutes), times[name])
                run = f"{name}-{minutes}-{seed}"
                work = partial(trained, args, run, recipe, epochs, seed)
                results[run] = runs.once(args.out / "results" / f"{run}.json", work)
                summed = table(results)
                (args.out / "table.json").write_text(json.dumps(summed, indent=1))
                draw(args.out / "gain.png", summed)
                print(as_text(summed), file=sys.stderr)
    print(json.dumps(table(results)) if args.json else as_text(table(results)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; refuse what would only fail later."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="the checkpoint")
    parser.add_argument("data", help="unlabelled images")
    parser.add_argument("--test", required=True, help="labelled images")
    parser.add_argument("--minutes", default="5,10,20", help="budgets, on one core (default: 5,10,20)")
    parser.add_argument("--recipes", default="small,dc_small", help="names or files (default: small,dc_small)")
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--core", type=int, help="number of the core to run on")
    parser.add_argument("--layers", choices=("last", "best"), default="best", help="last is quicker (default: best)")
    parser.add_argument("--timings", type=int, default=3, help="how often each recipe is timed (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("budget"), help="folder for all output (default: budget)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    args.labelled, args.crop = None, None  # what `fine_tuning.evaluated` looks at
    try:
        usable = all(float(minutes) > 0 for minutes in args.minutes.split(","))
    except ValueError:
        usable = False
    if not usable:
        parser.error(f"--minutes {args.minutes}: give minutes, separated by commas")
    if args.timings < 1:
        parser.error(f"--timings {args.timings}: give at least 1")
    if args.core is not None and args.core not in os.sched_getaffinity(0):
        parser.error(f"--core {args.core}: this process may use {sorted(os.sched_getaffinity(0))}")
    settings = {name: getattr(args, name) for name in ("ckpt", "data", "test", "overrides", "layers")}
    if said := runs.refuse_other_settings(args.out / "settings.json", settings):
        parser.error(said)
    return args


def options_of(args: argparse.Namespace, recipe: str) -> list[str]:
    """Options of `finetune` that timing and training share."""
    return ["--recipe", recipe, *(word for override in args.overrides for word in ("--set", override))]


def time_of(args: argparse.Namespace, name: str, recipe: str) -> dict[str, float]:
    """Seconds that a run takes before its first epoch (`start`), and for each epoch (`epoch`), on a quiet core."""

    def measure() -> dict[str, float]:
        options = ["--out", args.out / "not_written", "--epochs", TIMED_EPOCHS, *options_of(args, recipe), "--dry-run"]
        timings = [runs.odcft("finetune", args.ckpt, args.data, *options)["seconds"] for _ in range(args.timings)]
        training = min(seconds["training"] for seconds in timings)
        return {"start": min(s["total"] - s["training"] for s in timings), "epoch": training / TIMED_EPOCHS}

    times: dict[str, float] = runs.once(args.out / "timings" / f"{name}.json", measure)
    return times


def epochs_within(minutes: float, times: dict[str, float]) -> int:
    """How many whole epochs fit, at least one."""
    return max(1, math.floor((60 * minutes - times["start"]) / times["epoch"]))


def trained(args: argparse.Namespace, name: str, recipe: str, epochs: int, seed: str) -> dict[str, Any]:
    """Do one run; return its figures and what it took."""
    run = args.out / "runs" / name
    done = runs.fine_tune(run, [args.ckpt], args.data, [*options_of(args, recipe), "--epochs", epochs, "--seed", seed])
    figures = _evaluated(args, [str(run / "backbone")])
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return {**figures, "epochs": epochs, **{name: done[name] for name in ("seconds", "cpu_seconds", "resumed")}}


def _evaluated(args: argparse.Namespace, backbones: list[str]) -> dict[str, Any]:
    return evaluated(args, "", backbones)[0]


def table(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of every cell: {recipe: {minutes: {figure: mean, figure_interval: …, gain…}}}, and `original`."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, result in results.items():
        if name != "original":
            recipe, minutes, _ = name.rsplit("-", 2)
            cells.setdefault(recipe, {}).setdefault(minutes, []).append(result)
    original = {figure: results["original"][figure] for figure in FIGURES if figure in results["original"]}
    summed: dict[str, Any] = {"original": original}
    for recipe, budgets in cells.items():
        for minutes, found in budgets.items():
            cell: dict[str, Any] = {"seeds": len(found), "epochs": found[0]["epochs"]}
            for figure in original:
                values = [result[figure] for result in found]
                cell[figure] = statistics.mean(values)
                cell[f"{figure}_gain"] = cell[figure] - original[figure]
                cell[f"{figure}_worst_gain"] = min(values) - original[figure]
                if len(values) > 1:
                    t = T_975.get(len(values) - 1, 2.0)
                    cell[f"{figure}_interval"] = t * statistics.stdev(values) / math.sqrt(len(values))
            summed.setdefault(recipe, {})[minutes] = cell
    return summed


def as_text(summed: dict[str, Any]) -> str:
    """The table as text."""
    original = summed["original"]
    shown = {figure: title for figure, title in SHOWN.items() if figure in original}
    lines = [f"{'':<24}{'minutes':>8}{'epochs':>8}{'seeds':>7}" + "".join(f"{title:>20}" for title in shown.values())]
    lines.append(f"{'the checkpoint':<47}" + "".join(f"{original[figure]:>20.1f}" for figure in shown))
    below = []
    for recipe, budgets in summed.items():
        for minutes, cell in budgets.items() if recipe != "original" else ():
            text = f"{recipe:<24}{minutes:>8}{cell['epochs']:>8}{cell['seeds']:>7}"
            for figure in shown:
                interval = f" ±{cell[f'{figure}_interval']:.1f}" if f"{figure}_interval" in cell else ""
                gain = cell[f"{figure}_gain"]
                text += f"{f'{cell[figure]:.1f}{interval} ({gain:+.1f})':>20}"
                if cell[f"{figure}_worst_gain"] < 0:
                    below.append(f"{recipe} at {minutes} minutes ({SHOWN[figure]})")
            lines.append(text)
    if below:
        lines.append(f"A run ended below the checkpoint: {'; '.join(below)}.")
    return "\n".join(lines)


def draw(path: Path, summed: dict[str, Any]) -> None:
    """The gain of every recipe against the minutes."""
    shown = {figure: title for figure, title in SHOWN.items() if figure in summed["original"]}
    panels: dict[str, list[Curve]] = {title: [] for title in shown.values()}
    for recipe, budgets in summed.items():
        if recipe != "original":
            order = sorted(budgets, key=float)
            for figure, title in shown.items():
                gains = [budgets[minutes][f"{figure}_gain"] for minutes in order]
                panels[title].append(Curve([float(minutes) for minutes in order], gains, recipe, marker="o"))
    runs.draw(path, panels, x="minutes on one core", y="gain over the checkpoint")


if __name__ == "__main__":
    main()
