"""How far can measures without labels be trusted? Many runs, good and bad, judged with and without labels.

    python benchmarks/unlabelled_calibration.py --data cifar10=CIFAR10/train --data digits=DIGITS \
        --ckpt rotation=rotation.pth.tar --ckpt scratch=scratch:resnet18 \
        --pretext cifar10/jigsaw=jigsaw:resnet18:4 --out DIR [--minutes 70] [--table FILE] [--json]

DATA are folders of labelled images, one sub-folder for each class. Every run fine-tunes a checkpoint (--ckpt NAME=CKPT,
or one that a pretext task makes first: --pretext DATA/NAME=TASK:ARCH:EPOCHS) on the images of a data set, never its
labels, by one of SETTINGS. Then the checkpoint and the result are compared by the svm and knn of `odcft evaluate` on
labelled images, and by its measures without labels. The order of the runs is random but fixed, and every second run of
each checkpoint is held back from finding the rule of the verdict.

DIR keeps the runs and a JSON file for each (results/): the same command goes on where it was interrupted, and finished
runs are never repeated. --table writes all pairs to FILE: odcft/evaluation/unlabelled_calibration.json is one.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from odcft.backbone.load import load_backbone
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation.confidence_intervals import changes_with_intervals
from odcft.evaluation.features import features_of
from odcft.evaluation.labels import load_labelled_images
from odcft.evaluation.protocols import Split, evaluate_arrays
from odcft.evaluation.random_views import random_views
from odcft.evaluation.unlabelled import measure
from odcft.evaluation.unlabelled_comparison import MOST, VIEWS
from odcft.evaluation.unlabelled_verdict import (
    BETTER,
    CANNOT_TELL,
    FALLING,
    RULE,
    WORSE,
    Rule,
    change_of,
    verdict,
)
from odcft.files import read_json, write_table, write_text_atomically
from odcft.plan import view_for_evaluation
from odcft.pretexts.training import TASKS, train_pretext
from odcft.progress import Progress
from odcft.recipe import load_recipe
from odcft.run import output_checks
from odcft.train import fine_tune

SIZE, QUIET = 32, Progress(quiet=True)
TRAINED, LABELLED = 4000, 3000  # images to train on, and to judge by
CLASSES, LEARNED = 20, 1000  # the most frequent classes; labelled images that the SVMs learn from
FIGURES = ("svm", "knn")
# dc_small as it was when the runs of docs/unlabelled.md were made
PLAIN_DC = ("memory.start_layer=last", "optim.freeze=0", "optim.skip_padding=false")
AS_THEY_ARE = ["augment.crop_scale=[1.0,1.0]", "augment.flip=0", "augment.rotation=0", "augment.brightness=0"]
AS_THEY_ARE += ["augment.contrast=0", "augment.saturation=0", "augment.hue=0", "augment.gray=0"]
FULL_JITTER = ["augment.brightness=0.4", "augment.contrast=0.4", "augment.saturation=1.0", "augment.hue=0.5"]
FULL_JITTER += ["augment.crop_scale=[0.08,1.0]"]
SETTINGS: dict[str, tuple[str, list[str]]] = {  # name to recipe and overrides
    "odc": ("odc_small", ["optim.epochs=4"]),
    "odc_long": ("odc_small", ["optim.epochs=7"]),
    "odc_short": ("odc_small", ["optim.epochs=1"]),
    "odc_seed1": ("odc_small", ["optim.epochs=3", "seed=1"]),
    "odc_seed2": ("odc_small", ["optim.epochs=2", "seed=2"]),
    "dc": ("dc_small", [*PLAIN_DC, "optim.epochs=4"]),
    "dc_seed1": ("dc_small", [*PLAIN_DC, "optim.epochs=3", "seed=1"]),
    "dc_lr_high": ("dc_small", [*PLAIN_DC, "optim.epochs=2", "optim.lr=0.5"]),
    "lr_tiny": ("odc_small", ["optim.epochs=1", "optim.lr=0.0003"]),
    "lr_high": ("odc_small", ["optim.epochs=2", "optim.lr=0.3"]),
    "lr_far_too_high": ("odc_small", ["optim.epochs=2", "optim.lr=2"]),
    "constant_lr_full_jitter": (
        "odc_small",
        ["optim.epochs=3", "optim.lr=0.06", "optim.schedule=step", "optim.final_epochs=0", *FULL_JITTER],
    ),
    "tiny_crops": ("odc_small", ["optim.epochs=2", "augment.crop_scale=[0.02,0.1]"]),
    "few_clusters": ("odc_small", ["optim.epochs=3", "memory.clusters=3"]),
    "many_clusters": ("odc_small", ["optim.epochs=3", "memory.clusters=120"]),
    "no_augmentation": ("odc_small", ["optim.epochs=3", *AS_THEY_ARE]),
    "wrong_normalisation": ("odc_small", ["optim.epochs=2", "data.mean=[0.0,0.9,0.2]", "data.std=[2.0,0.05,1.0]"]),
    "weight_decay": ("odc_small", ["optim.epochs=3", "optim.weight_decay=0.03"]),
    "collapse": ("odc_small", ["optim.epochs=3", "memory.clusters=2", "optim.lr=0.3", "optim.weight_decay=0.05"]),
}
LONGER: dict[str, tuple[str, list[str]]] = {  # come after all of these: most of the short runs change little
    "odc_8": ("odc_small", ["optim.epochs=8"]),
    "dc_8": ("dc_small", [*PLAIN_DC, "optim.epochs=8"]),
    "odc_8_seed1": ("odc_small", ["optim.epochs=8", "seed=1"]),
    "demo": ("demo", []),
    "demo_seed1": ("demo", ["seed=1"]),
    "demo_dc": ("demo", ["method=dc", "optim.schedule=step"]),
    "demo_10": ("demo", ["optim.epochs=10"]),
    "demo_10_dc": ("demo", ["optim.epochs=10", "method=dc", "optim.schedule=step"]),
    "demo_lr_high": ("demo", ["optim.epochs=10", "optim.lr=0.5"]),
    "demo_no_augmentation": ("demo", ["optim.epochs=10", *AS_THEY_ARE]),
}


class Run(NamedTuple):
    """One run: a checkpoint, by name, fine-tuned on a data set by a setting; held back from the rule, or not."""

    data: str
    start: str
    setting: str
    held_back: bool

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.data}-{self.start.split('/')[-1]}-{self.setting}"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    refuse_places(args)
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    data = {name: lists_of(args.out, name, folder) for name, folder in named(args.data).items()}
    for name, about in named(args.pretext).items():
        parts_of(name, about, data)  # refused before anything is trained
    ckpts = {**named(args.ckpt), **make_checkpoints(args, data)}
    if not ckpts:
        raise OdcftError("There is nothing to start from: give --ckpt NAME=CKPT or --pretext.")
    began, rows = time.monotonic(), []
    for run in planned(ckpts, list(data)):
        path = args.out / "results" / f"{run.name}.json"
        if not path.exists() and (time.monotonic() - began) / 60 < args.minutes:
            say(run.name)
            write_result(path, partial(one_run, args.out, run, ckpts[run.start], data[run.data]))
        if path.exists():
            rows.append({**json.loads(path.read_text()), "held_back": run.held_back})
    pairs = [row for row in rows if "failed" not in row]
    table = {"pairs": [rounded(row) for row in pairs], "failed": [row["name"] for row in rows if "failed" in row]}
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(args.table, one_pair_a_line(table))
    found = summary(pairs)
    if found and not args.json:
        print("\n".join(as_text(found)))
    elif args.json:
        print(json.dumps(found))
    else:
        say(f"{len(pairs)} pairs so far: there is a summary from three on")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER", help="labelled images")
    parser.add_argument(
        "--ckpt", action="append", default=[], metavar="NAME=CKPT", help="a checkpoint to start from, on every data set"
    )
    parser.add_argument(
        "--pretext",
        action="append",
        default=[],
        metavar="DATA/NAME=TASK:ARCH:EPOCHS",
        help="make a checkpoint on a data set, to start from on it",
    )
    parser.add_argument("--out", type=Path, default=Path("unlabelled_calibration"), help="folder for all output")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so many minutes")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the measured pairs as JSON")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser.parse_args()


def refuse_places(args: argparse.Namespace) -> None:
    """Refuse checkpoints that do not exist, and outputs that cannot be written or are something else."""
    if args.out.exists() and not args.out.is_dir():
        raise OdcftError(f"--out {args.out} is not a folder.")
    for ckpt in named(args.ckpt).values():  # else each of its runs would be kept as one that failed
        if ":" not in ckpt and not Path(ckpt).exists():
            raise OdcftError(f"--ckpt {ckpt} does not exist.")
    if args.table is None:
        return
    output_checks.refuse_unwritable(args.table)
    if args.table.exists() and not {"pairs", "failed"} <= set(read_json(args.table)):
        raise OdcftError(f"--table {args.table} exists, and is not a table of this script. Choose another place.")


def named(pairs: list[str]) -> dict[str, str]:
    """Options of the form NAME=VALUE."""
    if odd := [pair for pair in pairs if "=" not in pair]:
        raise OdcftError(f"{odd[0]}: write NAME=VALUE.")
    return dict(pair.split("=", 1) for pair in pairs)


def say(line: str) -> None:
    QUIET.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)


# ---------------------------------------------------------------- what to run


def lists_of(out: Path, name: str, folder: str) -> dict[str, str]:
    """List files of a data set: `train` without labels, `measure` (some of them), and `labelled`, which are others if
    there are enough."""
    paths = sorted(path for path in Path(folder).resolve().glob("*/*") if path.is_file())
    if len(paths) < MOST:
        raise OdcftError(
            f"{folder} has {len(paths):,} images in sub-folders; give at least {MOST:,}, a sub-folder a class."
        )
    order = np.random.default_rng(0).permutation(len(paths))
    classes, counts = np.unique([path.parent.name for path in paths], return_counts=True)
    frequent = set(classes[np.argsort(-counts, kind="stable")[:CLASSES]])
    rest = order[TRAINED:] if len(order) >= TRAINED + LABELLED // 2 else order[::-1]
    labelled = [i for i in rest if paths[i].parent.name in frequent][:LABELLED]
    found = {}
    for part, rows in {"train": order[:TRAINED], "measure": order[:MOST]}.items():
        found[part] = str(out / f"{name}-{part}.txt")
        Path(found[part]).write_text("".join(f"{paths[i]}\n" for i in rows))
    found["labelled"] = str(out / f"{name}-labelled.csv")
    write_table(Path(found["labelled"]), ["path", "label"], ((paths[i], paths[i].parent.name) for i in labelled))
    return found


def parts_of(name: str, about: str, data: dict[str, Any]) -> tuple[str, str, str]:
    """The task, architecture and epochs of --pretext NAME=ABOUT, where NAME is that of a data set, / and a word."""
    task, arch, epochs = about.split(":") if about.count(":") == 2 else ("", "", "")
    if name.count("/") != 1 or name.split("/")[0] not in data or task not in TASKS or not (arch and epochs.isdecimal()):
        raise OdcftError(
            f"--pretext {name}={about}: write DATA/NAME=TASK:ARCH:EPOCHS, where DATA is the name of a --data and TASK "
            f"one of {', '.join(TASKS)}."
        )
    return task, arch, epochs


def make_checkpoints(args: argparse.Namespace, data: dict[str, dict[str, str]]) -> dict[str, str]:
    """Train the networks of --pretext, unless they exist."""
    made = {}
    for name, about in named(args.pretext).items():
        path = made[name] = str(args.out / f"{name.replace('/', '-')}.pth")
        if not Path(path).exists():
            say(path)
            task, arch, epochs = parts_of(name, about, data)
            recipe = load_recipe("pretext", [f"data.size={SIZE}", f"optim.epochs={epochs}"])
            train_pretext(task, data[name.split("/")[0]]["train"], arch, Path(path), recipe, progress=QUIET)
    return made


def planned(ckpts: dict[str, str], data: list[str]) -> list[Run]:
    """All runs in a fixed random order: the first of every checkpoint and data set, the second of each, and so on."""
    starts = [(name, one) for name in ckpts for one in data if "/" not in name or name.split("/")[0] == one]
    runs = [(*start, setting) for start in starts for setting in (*SETTINGS, *LONGER)]
    places: dict[tuple[str, str], int] = {}
    ordered = []

    def order(run: tuple[str, str, str]) -> tuple[bool, str]:
        return run[2] in LONGER, hashlib.sha256("/".join(run).encode()).hexdigest()

    for start, one, setting in sorted(runs, key=order):
        place = places[start, one] = places.get((start, one), -1) + 1
        ordered.append((place, Run(one, start, setting, held_back=place % 2 == 1)))
    return [run for _, run in sorted(ordered, key=lambda pair: pair[0])]


# ---------------------------------------------------------------- one run


def write_result(path: Path, work: Callable[[], dict[str, Any]]) -> None:
    """Write what a run found, or why it failed: that is a result, too."""
    try:
        found = work()
    except OdcftError as error:
        found = {"failed": str(error)}
    write_text_atomically(path, json.dumps({"name": path.stem, **found}, indent=1))
    say("   " + (found.get("failed") or " ".join(f"{name} {found[name]['change']:+.1f}" for name in FIGURES)))


def one_run(out: Path, run: Run, ckpt: str, data: dict[str, str]) -> dict[str, Any]:
    """Fine-tune, and judge the checkpoint and the result."""
    began, folder = time.monotonic(), out / "runs" / run.name
    if not (folder / "clusters.parquet").exists():
        recipe, overrides = {**SETTINGS, **LONGER}[run.setting]
        settings = load_recipe(recipe, [f"data.size={SIZE}", "optim.precision=bfloat16", *overrides])
        fine_tune(ckpt, data["train"], folder, settings, overwrite=folder.exists(), progress=QUIET)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    before, targets = judged(out, f"before-{run.data}-{run.start.split('/')[-1]}", ckpt, data)
    after, _ = judged(out, f"after-{run.name}", str(folder), data)
    main = {"svm": "mAP", "knn": "top1"}
    changes = changes_with_intervals(before, after, targets)
    return {
        **{"data": run.data, "checkpoint": run.start, "setting": run.setting},
        **{
            name: {"before": before[name][main[name]], "after": after[name][main[name]], **changes[name]}
            for name in FIGURES
        },
        "measures": {"before": before["measures"], "after": after["measures"]},
        "seconds": round(time.monotonic() - began),
    }


def judged(out: Path, name: str, ckpt: str, data: dict[str, str]) -> tuple[dict[str, Any], np.ndarray]:
    """The figures with labels, the measures without, and the targets (N, C) of the images tested on."""
    kept = out / "judged" / f"{name}.npz"
    labels = load_labelled_images(data["labelled"], None, QUIET)
    learned = np.concatenate([labels.train_rows[start::3] for start in range(3)])  # the first of them: of every class
    train, test = learned[:LEARNED], np.concatenate([learned[LEARNED:], labels.test_rows])
    if not kept.exists():
        loaded = load_backbone(ckpt)
        view = view_for_evaluation(loaded, labels.images, SIZE)
        rows = features_of(loaded.backbone, labels.images, view, QUIET, keep=False).layers["last"]
        images = find_images(data["measure"])
        clean = features_of(loaded.backbone, images, view, QUIET, keep=False).layers["last"]
        views = random_views(loaded.backbone, images, view, VIEWS, QUIET)
        if not all(np.isfinite(part).all() for part in (rows, clean, views)):
            raise OdcftError("its features are not finite")
        figures = evaluate_arrays(Split(rows[train], labels.targets[train], rows[test], labels.targets[test]), FIGURES)
        kept.parent.mkdir(exist_ok=True)
        arrays = {"scores": figures["svm"]["scores"], "predicted": figures["knn"]["predicted"], "clean": clean}
        about = {name: figures["svm"][name] for name in ("mAP", "per_class")}
        about |= {"top1": figures["knn"]["top1"], "measures": measure(clean, views)}
        np.savez(kept, **arrays, views=views, about=json.dumps(about))
    with np.load(kept) as file:
        about = json.loads(str(file["about"]))
        svm = {"mAP": about["mAP"], "per_class": about["per_class"], "scores": file["scores"]}
        knn = {"top1": about["top1"], "predicted": file["predicted"]}
    return {"svm": svm, "knn": knn, "measures": about["measures"]}, labels.targets[test]


# ---------------------------------------------------------------- what the pairs say


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: what the verdict and the summary need, to four digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        if isinstance(value, float):
            return float(f"{value:.4g}") if math.isfinite(value) else None
        return value

    return {key: short(value) for key, value in row.items() if key != "seconds"}


def one_pair_a_line(table: dict[str, Any]) -> str:
    """JSON that a version control system shows line by line."""
    pairs = ",\n".join("  " + json.dumps(pair) for pair in table["pairs"])
    return f'{{"failed": {json.dumps(table["failed"])},\n "pairs": [\n{pairs}\n]}}\n'


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """How each measure and the verdict do, on the half that the rule was found on, the other, and each data set."""
    groups = {
        "found on": [pair for pair in pairs if not pair["held_back"]],
        "held back": [pair for pair in pairs if pair["held_back"]],
        **{
            f"on {name}": [pair for pair in pairs if pair["data"] == name]
            for name in sorted({p["data"] for p in pairs})
        },
        "all": pairs,
    }
    found = {name: {"pairs": len(group), **figures_of(group)} for name, group in groups.items() if len(group) > 2}
    for name in sorted({pair["data"] for pair in pairs}):  # a rule found on the other data sets
        rule = best_rule([pair for pair in pairs if pair["data"] != name])
        if f"on {name}" in found:
            found[f"on {name}"]["rule of others"] = {**rule._asdict(), **verdicts_on(groups[f"on {name}"], rule)}
    return found


def best_rule(pairs: list[dict[str, Any]]) -> Rule:
    """The thresholds with most right verdicts, a wrong one counting as three; of equal ones the most careful."""

    def score(rule: Rule) -> tuple[int, float]:
        found = verdicts_on(pairs, rule)
        right = sum(found[word]["right"] for word in (BETTER, WORSE))
        said = sum(found[word]["said"] for word in (BETTER, WORSE))
        return right - 3 * (said - right), rule.neighbours - rule.rank_lost

    neighbours, ranks = (0.004, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02), (0.4, 0.5, 0.6, 2 / 3, 0.75, 0.8)
    return max((Rule(near, rank, max(rank, 0.8)) for near in neighbours for rank in ranks), key=score)


def figures_of(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of some pairs: rank correlations and sign accuracies of the measures, and counts of the verdicts."""
    scores = {name: np.array([pair[name]["change"] for pair in pairs]) for name in FIGURES}
    starts = [f"{pair['data']} {pair['checkpoint']}" for pair in pairs]
    measures = {}
    for name in pairs[0]["measures"]["after"]:
        change = np.array([change_of(name, pair["measures"]["before"], pair["measures"]["after"]) for pair in pairs])
        measures[name] = {
            **{f"rho_{figure}": correlation(change, score) for figure, score in scores.items()},
            "rho_within": within(change, scores["svm"], starts),
            "sign": float((np.sign(change) * (-1 if name in FALLING else 1) == np.sign(scores["svm"])).mean()),
        }
    return {"measures": measures, **verdicts_on(pairs, RULE)}


def within(change: np.ndarray, score: np.ndarray, starts: list[str]) -> float | None:
    """The mean rank correlation among the runs of one checkpoint, over the checkpoints with at least five runs."""
    rows = [[i for i, one in enumerate(starts) if one == start] for start in dict.fromkeys(starts)]
    found = [correlation(change[some], score[some]) for some in rows if len(some) > 4]
    return float(np.mean(found)) if found else None


def correlation(change: np.ndarray, score: np.ndarray) -> float:
    """Spearman's rank correlation; 0 if one of them is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(change, score).statistic) if np.ptp(change) and np.ptp(score) else 0.0


def verdicts_on(pairs: list[dict[str, Any]], rule: Rule) -> dict[str, Any]:
    """How often a rule says better and worse, how often the SVM agrees (surely: its interval has one sign)."""
    said = [verdict(pair["measures"]["before"], pair["measures"]["after"], rule) for pair in pairs]
    found: dict[str, Any] = {}
    for word, sign in ((BETTER, 1), (WORSE, -1)):
        chosen = [pair["svm"] for pair, one in zip(pairs, said, strict=True) if one == word]
        found[word] = {
            "said": len(chosen),
            "right": sum(sign * one["change"] > 0 for one in chosen),
            "surely right": sum(min(sign * one["low"], sign * one["high"]) > 0 for one in chosen),
            "surely wrong": sum(max(sign * one["low"], sign * one["high"]) < 0 for one in chosen),
        }
    return {**found, CANNOT_TELL: said.count(CANNOT_TELL)}


def as_text(found: dict[str, Any]) -> Iterator[str]:
    """The summary as tables."""
    names = list(found["all"]["measures"])
    yield "rank correlation of the changes with those of the SVM (and kNN), and how often their sign is right"
    yield f"{'':<22}" + "".join(f"{group} ({about['pairs']})".rjust(24) for group, about in found.items())
    for name in names:
        cells = (
            f"{about['measures'][name]['rho_svm']:+.2f} ({about['measures'][name]['rho_knn']:+.2f}) "
            f"{about['measures'][name]['sign']:.0%}"
            for about in found.values()
        )
        yield f"{name:<22}" + "".join(cell.rjust(24) for cell in cells)
    yield "the verdict: said, of which right by sign, surely right and surely wrong (by the 95 % interval)"
    for word in (BETTER, WORSE):
        yield f"{word:<22}" + "".join(
            "{said} {right} {surely right} {surely wrong}".format(**about[word]).rjust(24) for about in found.values()
        )
    yield f"{'cannot tell':<22}" + "".join(str(about[CANNOT_TELL]).rjust(24) for about in found.values())
    if (measures := found["all"]["measures"])[names[0]]["rho_within"] is not None:
        among = ", ".join(f"{name} {about['rho_within']:+.2f}" for name, about in measures.items())
        yield f"mean rank correlation among the runs of one checkpoint: {among}"
    for name, about in found.items():
        if rule := about.get("rule of others"):
            told = "; ".join(f"{word} {rule[word]['said']}, right {rule[word]['right']}" for word in (BETTER, WORSE))
            which = f"{rule['neighbours']:g}, {rule['rank_lost']:.2f}"
            yield f"{name} with the rule of the other data sets ({which}): {told}"


if __name__ == "__main__":
    try:
        main()
    except OdcftError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. Continue with the same command.", file=sys.stderr)
        sys.exit(75)
