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
    line = f"No difference from {than} can be shown with {test_images:,} test images: the changes may be chance."
    if (needed := images_needed(changes, test_images)) is None:
        return line
    protocol, count = needed
    title, change = METRICS[protocol][0], changes[protocol]["change"]
    takes = "a few more" if count < 1.1 * test_images else f"about {count:,}"
    return f"{line} To tell the change of {change:+.1f} in {title} from chance takes {takes} test images."


def images_needed(changes: Mapping[str, Mapping[str, float]], test_images: int) -> tuple[str, int] | None:
    """How many test images would show the change: an interval shrinks with the square root of their number.

    Returns:
        The protocol that needs least, and how many, to two digits; None if no figure changed, or if even a hundred
        times as many would not do.
    """
    factors = {
        protocol: (max(change["high"] - change["change"], change["change"] - change["low"]) / change["change"]) ** 2
        for protocol, change in changes.items()
        if change["change"]
    }
    if not factors or min(factors.values()) > 100:
        return None
    protocol = min(factors, key=lambda name: factors[name])
    needed = test_images * factors[protocol]
    digits = max(0, len(str(int(needed))) - 2)
    return protocol, int(-(-needed // 10**digits) * 10**digits)
