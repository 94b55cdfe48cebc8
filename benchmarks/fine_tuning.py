"""The paper's Table 4 on given data: the checkpoints, and what DC, ODC and collaborative ODC make of them.

    python benchmarks/fine_tuning.py CKPT [CKPT…] DATA --test DATA [--out DIR] [--methods odc,dc] [--seeds 0,1]
        [--recipe small] [--dc-recipe dc_small] [--epochs 12] [--set FIELD=VALUE]… [--codc CKPT,CKPT]… [--json]

Every run is `odcft finetune` on DATA in a process of its own, and is judged by `odcft evaluate` on --test, half of it
held out: SVM mAP and kNN. All methods have the same overrides and --epochs; DC has a recipe of its own. --codc
adds a run of several checkpoints together, a member each; as a column of their names it stands for their features side
by side, and the checkpoints and the separate ODC runs, side by side, stand above it.

DIR keeps the runs, a JSON of each (results/), table.json, and two pictures: loss_curves.png (fig. 1b) and
label_changes.png (fig. 5). A run that is finished is not done again, one that was interrupted is gone on with: start
the same command again. The first seed of every cell comes first, and the table is written after every run.
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
from odcft.evaluation.labels import labelled

FIGURES = ("svm", "knn")
TIMES = ("seconds", "cpu_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="CKPT… DATA", help="checkpoints, then unlabelled images")
    parser.add_argument("--test", required=True, help="labelled images, a folder a class")
    parser.add_argument("--out", type=Path, default=Path("fine_tuning"), help="where all is kept; ./fine_tuning")
    parser.add_argument("--methods", default="odc,dc")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--dc-recipe", help="DC's; of as many epochs, or say --epochs; dc_small beside small")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--codc", action="append", default=[], metavar="CKPT,CKPT", help="several together, too")
    parser.add_argument("--json", action="store_true", help="the table as JSON on stdout")
    args = parser.parse_args()
    *ckpts, data = args.inputs
    if not ckpts:
        parser.error("give a checkpoint or several, and then the images")
    if len({named(ckpt) for ckpt in ckpts}) < len(ckpts):
        parser.error("two checkpoints have the same file name up to the first dot: rename or link one")
    seeds, methods = args.seeds.split(","), args.methods.split(",")
    if "dc" in methods and not args.dc_recipe:
        if args.recipe != "small":
            parser.error(f"which recipe is DC to have beside {args.recipe}? --dc-recipe NAME")
        args.dc_recipe = "dc_small"
    for together in args.codc:
        if len(together.split(",")) < 2:
            parser.error(f"--codc {together}: give several checkpoints, with commas between")
    try:  # before anything is written, and hours before it would be noticed
        find_images(data)
        labelled(args.test, None)
    except OdcftError as error:
        parser.error(str(error))
    refuse_other_settings(parser, args)

    for ckpt in ckpts:
        keep(args.out, f"{named(ckpt)}-original", partial(judged, ckpt, args.test))
    for seed in seeds:
        for ckpt in ckpts:
            for method in methods:
                run = f"{named(ckpt)}-{method}-{seed}"
                keep(args.out, run, partial(fine_tuned, args, run, [ckpt], data, method, seed))
    for members in (together.split(",") for together in args.codc):
        name = "+".join(map(named, members))
        keep(args.out, f"{name}-original", partial(judged, members, args.test))
        for seed in seeds:
            keep(
                args.out,
                f"{name}-codc-{seed}",
                partial(fine_tuned, args, f"{name}-codc-{seed}", members, data, "codc", seed),
            )
            apart = [args.out / f"{named(ckpt)}-odc-{seed}" / "backbone" for ckpt in members]
            if all(backbone.exists() for backbone in apart):
                keep(args.out, f"{name}-odc-{seed}", partial(judged, [str(backbone) for backbone in apart], args.test))
    results = read(args.out)
    if args.json:
        print(json.dumps(table(results)))
    else:
        print(as_text(table(results)))


def refuse_other_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Results of other settings must not end in one table; more checkpoints, seeds and methods may."""
    settings = {name: getattr(args, name) for name in ("test", "recipe", "dc_recipe", "epochs", "overrides")}
    settings["data"] = args.inputs[-1]
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    path = args.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        parser.error(f"{path} is of other settings: choose another --out")
    path.write_text(json.dumps(settings))


def named(ckpt: str) -> str:
    """A checkpoint's column: its file's name up to the first dot."""
    return Path(ckpt).name.split(".")[0]


def keep(out: Path, name: str, work: Any) -> None:
    """Do a piece of work unless its result is there, and write table and pictures of what there is."""
    path = out / "results" / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(work(), indent=1))
        results = read(out)
        (out / "table.json").write_text(json.dumps(table(results), indent=1))
        print(as_text(table(results)), file=sys.stderr)
        draw(out, results)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """All results there are, by name: CHECKPOINT-original, CHECKPOINT-METHOD-SEED."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))}


def judged(backbone: str | list[str], test: str) -> dict[str, Any]:
    """SVM and nearest neighbours of a backbone, or of several side by side and each alone."""
    from odcft.evaluation.comparison import evaluate

    results = evaluate(backbone, test, None, ["svm", "knn"])
    figures = [{"svm": one["svm"]["mAP"], "knn": one["knn"]["top1"]} for one in (results, *results.get("members", []))]
    return {**figures[0], **({"members": figures[1:]} if len(figures) > 1 else {})}


def fine_tuned(
    args: argparse.Namespace, name: str, ckpts: list[str], data: str, method: str, seed: str
) -> dict[str, Any]:
    """One run and its judgement, with the seconds it took: of the clock, and of the processor."""
    run = args.out / name
    recipe = args.dc_recipe if method == "dc" else args.recipe
    words = ["--recipe", recipe, "--method", method, "--seed", seed]
    words += ["--epochs", args.epochs] if args.epochs else []
    words += [word for override in args.overrides for word in ("--set", override)]
    words += ["--resume"] if (run / "run.json").exists() else []
    began, used = time.monotonic(), _cpu_seconds()
    command = [sys.executable, "-m", "odcft", "finetune", *ckpts, data, "--out", run, *words, "--json"]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    times = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - used}
    backbones = sorted(str(backbone) for backbone in run.glob("backbone*"))
    return {
        **judged(backbones if len(backbones) > 1 else backbones[0], args.test),
        **times,
        "resumed": "--resume" in words,
        "method": method,
        "seed": int(seed),
        "recipe": recipe,
        "overrides": args.overrides,
        "summary": json.loads(done.stdout),
    }


def _cpu_seconds() -> float:
    """Of all processes that have ended: what a run costs, whoever else is on the machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (highest less lowest) of every cell: {checkpoint: {row: {figure: …}}}.

    The members of a CODC run count in their checkpoints' columns.
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
            for figure in (*FIGURES, *TIMES):  # an interrupted run's times are those of its last piece only
                values = [run[figure] for run in runs if figure in FIGURES or (figure in run and not run["resumed"])]
                if values:
                    cell[figure] = statistics.mean(values)
                    cell[f"{figure}_spread"] = max(values) - min(values)
            summed.setdefault(column, {})[row] = cell
    return summed


def as_text(summed: dict[str, Any]) -> str:
    """The table for people: mean, half the spread where there are several runs, and gain over the checkpoint."""
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
    """Fig. 1b (loss of DC and ODC) and fig. 5 (share of labels that change), from the metrics of the runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: result for name, result in results.items() if "summary" in result}
    for file, figure, label, methods in (
        ("loss_curves.png", "loss_over_ln_k", "loss, of ln K", ("odc", "dc")),
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
        axes[0][0].set(ylabel=label, ylim=(0, None))  # of all: the axis is shared
        picture.tight_layout()
        picture.savefig(out / file, dpi=150)
        plt.close(picture)


if __name__ == "__main__":
    main()
