"""The health of a run in words: what is fine, what is not, and what to change."""

from collections.abc import Sequence
from dataclasses import dataclass

from odcft.reports.run_record import RunRecord
from odcft.run.collapse_warnings import CHANCE, warnings
from odcft.text import count_of

WAITING = 0.2  # share of the time that training waited for images, from which on loading images limits the speed
MOVING = 0.3  # share of labels that still change at the end, from which on a longer run may settle them
FEW = 0.1  # share of labels below which the clusters have settled
HARDLY_ANY = 0.02  # share of labels below which it does not matter whether they become more
CHANGED = 0.1  # by how much, of the figure before, a figure must differ to have risen or fallen
LATE = 0.5  # of all epochs: the best kNN accuracy before that says that the run got worse again
WORSE = 1.0  # points of kNN accuracy below the best


@dataclass(frozen=True)
class Finding:
    """One line about a run's health: whether it is fine, what it is about, and what was found."""

    fine: bool
    about: str
    text: str


def findings(record: RunRecord) -> list[Finding]:
    """What the figures of a run say, problems first; a line says what to change where something is wrong."""
    lines, clusters = record.full_lines(), record.cluster_count()
    if not lines or clusters is None:
        return [Finding(True, "Too early", "The run has not logged a line yet; there is nothing to judge.")]
    apart = record.recipe is not None and record.recipe.starts_with_layer
    problems = warnings(lines, clusters, record.method, _start_epochs(record) if apart else 0.0)
    found = [Finding(False, _TITLES[name], _sentence(text)) for name, text in problems.items()]
    found += _past_problems(record, problems)
    found += [_loss(record), *_clusters(record)] if not problems else []
    if record.method != "dc":
        found.append(_labels(record))
    found += [*_waiting(record), *_knn(record), *_images(record)]
    return sorted(found, key=lambda finding: finding.fine)


_TITLES = {"diverging": "Diverging", "chance": "Not learning", "uneven": "Uneven clusters", "alike": "Collapse"}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _past_problems(record: RunRecord, now: Sequence[str] | dict[str, str]) -> list[Finding]:
    """Warnings of the log that are over."""
    found = []
    for name, title in _TITLES.items():
        steps = [line["step"] for line in record.lines if name in line["warnings"]]
        if steps and name not in now:
            when = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
            found.append(Finding(True, title, f"The log warned of this at {when}, but not since."))
    return found


def _loss(record: RunRecord) -> Finding:
    lines = record.full_lines()
    first, last = lines[0]["loss_over_ln_k"], lines[-1]["loss_over_ln_k"]
    if last >= CHANCE:
        return Finding(True, "Loss", f"The loss is {last:.2f} of ln K, the level of guessing: too early to tell.")
    return Finding(
        True,
        "Loss",
        f"The loss went from {first:.2f} to {last:.2f} of ln K (1 is guessing): the labels can be learned.",
    )


def _clusters(record: RunRecord) -> list[Finding]:
    last = record.full_lines()[-1]
    even = min(1.0, max(0.0, last["entropy"]))
    text = f"Their sizes are {even:.0%} as even as they can be (entropy, divided by ln K; 100% if all are equal)."
    if "smallest" in last and "largest" in last:
        text = f"The clusters hold {last['smallest']:,} to {count_of(last['largest'], 'image')}. {text}"
    return [Finding(True, "Clusters", text)]


def _start_epochs(record: RunRecord) -> float:
    """In how many epochs the images keep their first labels; 0 if that is not known."""
    given = record.recipe.memory.start_epochs if record.recipe else 0.0
    return 0.0 if given == "auto" else given


def _labels(record: RunRecord) -> Finding:
    kept = _start_epochs(record)
    lines = [line for line in record.lines if not kept or line.get("epoch", kept) > kept]
    if record.lines and not lines:
        text = f"Images keep their first labels for {kept:g} epochs (memory.start_epochs), and none has changed so far."
        return Finding(True, "Labels", text)
    ratios = [line["change_ratio"] for line in lines if "change_ratio" in line]
    if not ratios:
        return Finding(True, "Labels", "The log does not say how many labels change.")
    now, before, rising = ratios[-1], *_trend(ratios)
    moving = f"{_percent(now)} of the labels change in a step"
    if now <= HARDLY_ANY:
        return Finding(True, "Labels", f"{moving}: the clusters have settled.")
    if before is not None and rising > CHANGED:
        moving += f", more and more (a quarter of the run ago it was {_percent(before)})"
    elif before is not None and rising < -CHANGED:
        moving += f", fewer and fewer (a quarter of the run ago it was {_percent(before)})"
    longer = "Train longer (odcft finetune … --resume --epochs with twice as many), or lower memory.momentum."
    if record.finished and (now > MOVING or (now > FEW and rising > CHANGED)):
        return Finding(False, "Labels", f"{moving}: the clusters have not settled. {longer}")
    if now <= FEW and rising <= CHANGED:
        return Finding(True, "Labels", f"{moving}: the clusters have settled.")
    if rising < -CHANGED:
        return Finding(True, "Labels", f"{moving}: the clusters are settling.")
    return Finding(True, "Labels", f"{moving}: the clusters have not settled yet.")


def _trend(values: Sequence[float]) -> tuple[float | None, float]:
    """The mean of the quarter before the last, and by how much of it the last quarter is higher; None if too few."""
    quarter = len(values) // 4
    if quarter < 2:
        return None, 0.0
    before = sum(values[-2 * quarter : -quarter]) / quarter
    last = sum(values[-quarter:]) / quarter
    return before, (last - before) / max(before, 1e-9)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _waiting(record: RunRecord) -> list[Finding]:
    waits = [line["data_wait"] for line in record.lines[-50:] if "data_wait" in line]
    if not waits:
        return []
    mean = sum(waits) / len(waits)
    if mean > WAITING:
        return [
            Finding(
                False,
                "Speed",
                f"Training waited for images {mean:.0%} of the time. More loader processes (--set data.workers=…), "
                "smaller files, or a faster disk would speed it up (docs/scaling.md).",
            )
        ]
    return [Finding(True, "Speed", f"Training waited for images {mean:.0%} of the time.")]


def _knn(record: RunRecord) -> list[Finding]:
    measured = [(line["knn"], line.get("epoch", 0.0)) for line in record.lines if "knn" in line]
    if len(measured) < 2:
        return []
    best, when = max(measured, key=lambda pair: (pair[0], -pair[1]))
    last, end = measured[-1]
    if best - last > WORSE and when <= LATE * end:
        return [
            Finding(
                False,
                "kNN",
                f"Nearest-neighbour accuracy was best in epoch {when:.0f} ({best:.1f}) and is {last:.1f} now. The "
                f"backbone of that epoch is in backbone_best; next time --epochs {max(1, round(when)):.0f} is enough.",
            )
        ]
    return [Finding(True, "kNN", f"Nearest-neighbour accuracy went from {measured[0][0]:.1f} to {last:.1f}.")]


def _images(record: RunRecord) -> list[Finding]:
    if not record.unreadable:
        return []
    total = record.image_count()
    share = "" if total is None else f" (of {total + len(record.unreadable):,})"
    return [
        Finding(
            False,
            "Images",
            f"{count_of(len(record.unreadable), 'image')}{share} could not be read and were left out: see "
            "quarantine.csv in the RUN.",
        )
    ]
