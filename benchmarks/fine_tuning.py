"""The paper's Table 4 on your data: checkpoints before and after fine-tuning by DC, ODC and collaborative ODC.

    python benchmarks/fine_tuning.py CKPT [CKPT…] DATA --test DATA [--out DIR] [--methods odc,dc] [--seeds 0,1]
        [--recipe small] [--dc-recipe dc_small] [--epochs 12] [--set FIELD=VALUE]… [--codc CKPT,CKPT]… [--json]

Every run is `odcft finetune` on DATA in its own process, evaluated by `odcft evaluate` on --test, half of it held out:
SVM mAP and kNN. All methods get the same overrides and --epochs; DC has its own recipe. --codc adds a run of several
checkpoints together, one per member. The column with all their names is for their features side by side; it also has
the checkpoints and the separate ODC runs side by side.

DIR keeps the runs, a JSON file for each (results/), table.json, and two pictures: loss_curves.png (fig. 1b) and
label_changes.png (fig. 5). To continue after an interruption, run the same command again: finished runs are skipped,
interrupted ones resumed. The first seed of every cell is run first, and the table is written after every run.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation.labels import load_labelled_images

FIGURES = ("svm", "knn")
TIMES = ("seconds", "cpu_seconds")


def main() -> None:
    parser, args = parse_arguments()
    *ckpts, data = args.inputs
    refuse_other_settings(parser, args)
    for ckpt in ckpts:
        run_once(args.out, f"{column_of(ckpt)}-original", partial(evaluated, ckpt, args.test))
    for seed in args.seeds.split(","):
        for ckpt in ckpts:
            for method in args.methods.split(","):
                run = f"{column_of(ckpt)}-{method}-{seed}"
                run_once(args.out, run, partial(fine_tuned, args, run, [ckpt], data, method, seed))
    for together in args.codc:
        run_codc(args, together.split(","), data)
    results = read(args.out)
    print(json.dumps(table(results)) if args.json else as_text(table(results)))


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line and refuse what would only fail hours later, before anything is written."""
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
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    *ckpts, data = args.inputs
    if not ckpts:
        parser.error("give one or more checkpoints, and then the images")
    if len({column_of(ckpt) for ckpt in ckpts}) < len(ckpts):
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
        load_labelled_images(args.test, None)
    except OdcftError as error:
        parser.error(str(error))
    return parser, args


def run_codc(args: argparse.Namespace, members: list[str], data: str) -> None:
    """Fine-tune several checkpoints together; also evaluate the checkpoints, and their ODC runs, side by side."""
    name = "+".join(map(column_of, members))
    run_once(args.out, f"{name}-original", partial(evaluated, members, args.test))
    for seed in args.seeds.split(","):
        run = f"{name}-codc-{seed}"
        run_once(args.out, run, partial(fine_tuned, args, run, members, data, "codc", seed))
        separate = [args.out / f"{column_of(ckpt)}-odc-{seed}" / "backbone" for ckpt in members]
        if all(backbone.exists() for backbone in separate):
            run_once(args.out, f"{name}-odc-{seed}", partial(evaluated, [str(path) for path in separate], args.test))


def refuse_other_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse to mix results of different settings in one table; checkpoints, seeds and methods may be added."""
    settings = {name: getattr(args, name) for name in ("test", "recipe", "dc_recipe", "epochs", "overrides")}
    settings["data"] = args.inputs[-1]
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    path = args.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        parser.error(f"{path} has different settings: choose another --out")
    path.write_text(json.dumps(settings))


def column_of(ckpt: str) -> str:
    """The name of a checkpoint's column: its file name up to the first dot."""
    return Path(ckpt).name.split(".")[0]


def run_once(out: Path, name: str, work: Any) -> None:
    """Do a piece of work unless its result exists, then write the table and pictures of all results so far."""
    path = out / "results" / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(work(), indent=1))
        results = read(out)
        (out / "table.json").write_text(json.dumps(table(results), indent=1))
        print(as_text(table(results)), file=sys.stderr)
        draw(out, results)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """All results so far, by name: CHECKPOINT-original, CHECKPOINT-METHOD-SEED."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))}


def evaluated(backbone: str | list[str], test: str) -> dict[str, Any]:
    """SVM mAP and kNN accuracy of a backbone, or of several side by side and each alone."""
    from odcft.evaluation.comparison import evaluate

    results = evaluate(backbone, test, None, ["svm", "knn"])
    figures = [{"svm": one["svm"]["mAP"], "knn": one["knn"]["top1"]} for one in (results, *results.get("members", []))]
    return {**figures[0], **({"members": figures[1:]} if len(figures) > 1 else {})}


def fine_tuned(
    args: argparse.Namespace, name: str, ckpts: list[str], data: str, method: str, seed: str
) -> dict[str, Any]:
    """Do one run; return its evaluation and the wall-clock and CPU seconds it took."""
    run = args.out / name
    recipe = args.dc_recipe if method == "dc" else args.recipe
    options = ["--recipe", recipe, "--method", method, "--seed", seed]
    options += ["--epochs", args.epochs] if args.epochs else []
    options += [part for override in args.overrides for part in ("--set", override)]
    options += ["--resume"] if (run / "run.json").exists() else []
    began, used = time.monotonic(), _cpu_seconds()
    command = [sys.executable, "-m", "odcft", "finetune", *ckpts, data, "--out", run, *options, "--json"]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    times = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - used}
    backbones = sorted(str(backbone) for backbone in run.glob("backbone*"))
    return {
        **evaluated(backbones if len(backbones) > 1 else backbones[0], args.test),
        **times,
        "resumed": "--resume" in options,
        "method": method,
        "seed": int(seed),
        "recipe": recipe,
        "overrides": args.overrides,
        "summary": json.loads(done.stdout),
    }


def _cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended: the cost of a run, however busy the machine is."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
        for row, runs in rows.items():
            cell: dict[str, Any] = {"runs": len(runs)}
            for figure in (*FIGURES, *TIMES):  # the times of a resumed run cover only its last part
                values = [run[figure] for run in runs if figure in FIGURES or (figure in run and not run["resumed"])]
                if values:
                    cell[figure] = statistics.mean(values)
                    cell[f"{figure}_spread"] = max(values) - min(values)
            summed.setdefault(column, {})[row] = cell
    return summed


def as_text(summed: dict[str, Any]) -> str:
    """The table as text: mean, ± half the spread if there are several runs, and gain over the checkpoint."""
    lines = [f"{'':<36}{'':<10}{'SVM mAP':>14}{'gain':>7}{'kNN':>14}{'gain':>7}{'minutes':>9}{'CPU min':>9}"]
    for column, rows in summed.items():
        for row in sorted(rows, key=lambda r: ["original", "dc", "odc", "codc"].index(r)):
            cell, text = rows[row], f"{column:<36}{row:<10}"
            for figure in FIGURES:
                spread = f" ±{cell[f'{figure}_spread'] / 2:.1f}" if cell["runs"] > 1 else ""
                text += f"{f'{cell[figure]:.1f}{spread}':>14}"
                before = rows.get("original", {}).get(figure)
                text += f"{cell[figure] - before:>+7.1f}" if before is not None and row != "original" else f"{'':>7}"
            for figure in TIMES:
                text += f"{cell[figure] / 60:>9.1f}" if figure in cell else ""
            lines.append(text)
    return "\n".join(lines)


def draw(out: Path, results: dict[str, dict[str, Any]]) -> None:
    """Draw fig. 1b (loss of DC and ODC) and fig. 5 (share of labels that change) from the metrics of the runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: result for name, result in results.items() if "summary" in result}
    for file, figure, label, methods in (
        ("loss_curves.png", "loss_over_ln_k", "loss / ln K", ("odc", "dc")),
        ("label_changes.png", "change_ratio", "labels that change", ("odc", "codc")),
    ):
        columns = sorted({name.rsplit("-", 2)[0] for name, run in runs.items() if run["method"] in methods})
        if not columns:
            continue
        picture, axes = plt.subplots(1, len(columns), figsize=(4 * len(columns), 3), sharey=True, squeeze=False)
        for axis, column in zip(axes[0], columns, strict=True):
            for name, run in runs.items():
                if name.rsplit("-", 2)[0] == column and run["method"] in methods:
                    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
                    colour = {"odc": "tab:blue", "dc": "tab:orange", "codc": "tab:green"}[run["method"]]
                    title = run["method"].upper() if run["seed"] == 0 else None
                    epochs = [line["epoch"] for line in lines]
                    axis.plot(epochs, [line[figure] for line in lines], color=colour, label=title, linewidth=1)
            axis.set(title=column, xlabel="epoch")
            axis.legend()
        axes[0][0].set(ylabel=label, ylim=(0, None))  # for all columns: the axis is shared
        picture.tight_layout()
        picture.savefig(out / file, dpi=150)
        plt.close(picture)


if __name__ == "__main__":
    main()
