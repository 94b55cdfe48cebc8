"""Better, worse, or no difference that these images can show: what the intervals of the changes say in one line."""

from collections.abc import Mapping

from odcft.evaluation.results_table import METRICS

BETTER, WORSE, NO_DIFFERENCE, MIXED = "better", "worse", "no difference", "mixed"


def verdict(changes: Mapping[str, Mapping[str, float]]) -> str:
    """What changes with 95 % intervals say together.

    Args:
        changes: protocol to `change`, `low` and `high`.

    Returns:
        BETTER if some interval lies above zero and none below it, WORSE the other way round, MIXED if they disagree,
        NO_DIFFERENCE if every interval contains zero.
    """
    up = any(change["low"] > 0 for change in changes.values())
    down = any(change["high"] < 0 for change in changes.values())
    if up or down:
        return MIXED if up and down else BETTER if up else WORSE
    return NO_DIFFERENCE


def verdict_line(changes: Mapping[str, Mapping[str, float]], test_images: int, than: str) -> str:
    """The verdict as a sentence.

    Args:
        changes: protocol to `change`, `low` and `high`.
        test_images: how many the intervals come from.
        than: what it was compared with.
    """
    found = verdict(changes)
    if found == BETTER:
        return f"Better than {than}."
    if found == WORSE:
        return f"Worse than {than}."
    if found == MIXED:
        up = " and ".join(METRICS[name][0] for name, change in changes.items() if change["low"] > 0)
        down = " and ".join(METRICS[name][0] for name, change in changes.items() if change["high"] < 0)
        return f"Mixed: better than {than} by {up}, worse by {down}."
    line = f"No difference from {than} that {test_images:,} test images can show."
    needed = images_needed(changes, test_images)
    return line if needed is None else f"{line} A change of this size would show with about {needed:,}."


def images_needed(changes: Mapping[str, Mapping[str, float]], test_images: int) -> int | None:
    """How many test images would show the change: an interval shrinks with the square root of their number.

    Returns:
        The number for the metric that needs least, to two digits; None if no metric changed, or if even a hundred times
        as many would not do.
    """
    factors = [
        (max(change["high"] - change["change"], change["change"] - change["low"]) / abs(change["change"])) ** 2
        for change in changes.values()
        if change["change"]
    ]
    if not factors or min(factors) > 100:
        return None
    needed = test_images * min(factors)
    digits = max(0, len(str(int(needed))) - 2)
    return int(-(-needed // 10**digits) * 10**digits)
