"""Better, worse, or cannot tell: what measures without labels say, calibrated on runs whose labels are known.

The table of these runs, unlabelled_calibration.json, is written by benchmarks/unlabelled_calibration.py. Which half of
them was used to find the rule below, and how it does on the other, is in docs/unlabelled.md.
"""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"
TABLE = Path(__file__).with_name("unlabelled_calibration.json")
RATIOS = ("effective_rank", "lidar")  # measures that change by a factor; the others by a difference
FALLING = ("spectrum_decay", "dead_share")  # measures that fall as features get better


class Rule(NamedTuple):
    """Thresholds of the verdict.

    Attributes:
        neighbours: better if the agreement of neighbours rose by more, worse if it fell by more (as a share, 0..1).
        rank_lost: worse if less than this share of the effective rank is left.
        rank_kept: better only if at least this share of the effective rank is left.
    """

    neighbours: float = 0.01
    rank_lost: float = 2 / 3
    rank_kept: float = 0.8


RULE = Rule()
Measures = Mapping[str, float | None]


def change_of(name: str, before: Measures, after: Measures) -> float:
    """How much a measure changed: the logarithm of the ratio (of RATIOS) or the difference; 0 if that is not finite."""
    old, new = before[name], after[name]
    if old is None or new is None:  # as JSON writes what is not finite
        return 0.0
    change = math.log(max(new, 1e-9) / max(old, 1e-9)) if name in RATIOS else new - old
    return change if math.isfinite(change) else 0.0


def verdict(before: Measures, after: Measures, rule: Rule = RULE) -> str:
    """What the measures (`unlabelled.measure`) of the same images say, before and after.

    Features that lost rank got worse, whatever else they gained. If they did not, they got better or worse as an
    image's neighbours are kept or lost when it is augmented. Small changes are not enough to tell.
    """
    neighbours = change_of("neighbour_agreement", before, after)
    rank = math.exp(change_of("effective_rank", before, after))
    if rank < rule.rank_lost or neighbours < -rule.neighbours:
        return WORSE
    return BETTER if neighbours > rule.neighbours and rank >= rule.rank_kept else CANNOT_TELL


def judge(before: Measures, after: Measures) -> tuple[str, str]:
    """The verdict, and a sentence: what it is based on, and how often it was right in runs held back from the rule."""
    found = verdict(before, after)
    alike = [pair["svm"]["change"] for pair in calibration() if pair["held_back"] and said_of(pair) == found]
    rose, count = sum(change > 0 for change in alike), len(alike)
    if found == CANNOT_TELL:
        why = "the measures changed too little, or disagree"
        return found, f"{why}. In {rose} of our {count} runs like this, the labelled score rose."
    if found == BETTER:
        why = "more of an image's neighbours stay when it is augmented, and the features kept their rank"
        return found, f"{why}. In {rose} of our {count} runs like this, the labelled score rose too."
    lost = math.exp(change_of("effective_rank", before, after)) < RULE.rank_lost
    why = "the features lost rank" if lost else "fewer of an image's neighbours stay when it is augmented"
    return found, f"{why}. In {count - rose} of our {count} runs with this verdict, the labelled score fell too."


def said_of(pair: Mapping[str, Any]) -> str:
    """The verdict on a pair of the table."""
    return verdict(pair["measures"]["before"], pair["measures"]["after"])


@cache
def calibration() -> list[dict[str, Any]]:
    """The runs with known labels."""
    return json.loads(TABLE.read_text())["pairs"]
