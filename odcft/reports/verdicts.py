"""The verdict on a run, from what `odcft evaluate RUN … --json` printed: whether it got better, in a sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odcft.errors import OdcftError
from odcft.evaluation.results_table import METRICS
from odcft.evaluation.starting_checkpoint import find_starting_checkpoints
from odcft.evaluation.verdict import BETTER, WORSE, verdict, verdict_line
from odcft.files import read_json
from odcft.progress import Progress
from odcft.run.folder import BACKBONES

WITHOUT_LABELS = {
    "better": ("Better than the checkpoint it was started from, judged without labels.", "better"),
    "worse": ("Worse than the checkpoint it was started from, judged without labels.", "worse"),
    "cannot tell": ("Judged without labels, nothing can be told: a few labelled images would settle it.", "open"),
}
PROTOCOLS = ("svm", "knn")  # those of `odcft evaluate` by default
MOST_IMAGES = 10**9  # in a file that can be believed
THAN = "the checkpoint it was started from"


def evaluate_run(run: Path, labelled: str, reader: Any, progress: Progress) -> dict[str, Any]:
    """Do what `odcft evaluate RUN LABELLED` does, for `read_verdict`.

    Raises:
        OdcftError: the images have no labels, or cannot be evaluated on; or the starting checkpoint is gone.
    """
    from odcft.evaluation.any_protocol import evaluate_any

    members = sum((run / name).is_dir() for name in BACKBONES)
    if why := find_starting_checkpoints(str(run), members)[1]:  # found out before minutes of work
        raise OdcftError(
            f"--evaluation {labelled}: there is no verdict without the checkpoint that {run} started from ({why}). "
            "Put it back, or drop --evaluation."
        )
    try:
        return evaluate_any(str(run), labelled, None, PROTOCOLS, reader=reader, progress=progress)
    except OdcftError as error:
        raise OdcftError(f"--evaluation {labelled}: {error}") from None


def is_evaluation_file(evaluation: str | Path) -> bool:
    """Whether this is a file that `odcft evaluate … --json` printed, and not labelled images."""
    path = Path(evaluation)
    if path.suffix.lower() == ".json":
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"{")
    except (OSError, ValueError):
        return False


def read_verdict(evaluation: str | Path | Mapping[str, Any] | None) -> tuple[str, str]:
    """The verdict as a sentence, and better, worse or open.

    Args:
        evaluation: the object that `odcft evaluate RUN … --json` printed, or a file with it.

    Returns:
        ("", "open") without one.

    Raises:
        OdcftError: there is no verdict in it.
    """
    if evaluation is None:
        return "", "open"
    values = evaluation if isinstance(evaluation, Mapping) else read_json(Path(evaluation))
    changes = _changes(values.get("change"))
    tested = values.get("test_images")
    if changes and _is_number(tested, 1, MOST_IMAGES) and isinstance(tested, int):
        found = verdict(changes)
        kind = "better" if found == BETTER else "worse" if found == WORSE else "open"
        return f"{verdict_line(changes, tested, THAN)} {_figures(values, changes, tested)}", kind
    unlabelled = values.get("unlabelled")
    said = unlabelled.get("verdict") if isinstance(unlabelled, Mapping) else None
    if isinstance(said, str) and said in WITHOUT_LABELS:
        return WITHOUT_LABELS[said]
    where = "the evaluation" if isinstance(evaluation, Mapping) else evaluation
    raise OdcftError(
        f"{where} holds no comparison with {THAN}. Write it with: odcft evaluate RUN LABELLED/ --json > evaluation.json"
    )


def _is_number(value: Any, least: float, most: float) -> bool:
    """Whether it is a number in this range, which NaN is not; all figures are percentages."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _changes(given: Any) -> dict[str, dict[str, float]]:
    """The changes with their intervals, as far as they are what `evaluate` prints."""
    found = {}
    for protocol, change in given.items() if isinstance(given, Mapping) else ():
        if protocol in METRICS and isinstance(change, Mapping):
            numbers = {name: change.get(name) for name in ("change", "low", "high")}
            if all(_is_number(n, -100, 100) for n in numbers.values()):
                found[protocol] = {name: float(n) for name, n in numbers.items()}  # type: ignore[arg-type]
    return found


def _figures(values: Mapping[str, Any], changes: Mapping[str, Mapping[str, float]], tested: int) -> str:
    """Before and after of every figure, in a sentence."""
    said = []
    for protocol, change in changes.items():
        title, key = METRICS[protocol]
        after = values.get(protocol)
        figure = after.get(key) if isinstance(after, Mapping) else None
        interval = "({low:+.1f} … {high:+.1f})".format(**change)
        if figure is not None and _is_number(figure, 0, 100):
            said.append(f"{title} {figure - change['change']:.1f} before, {figure:.1f} after {interval}")
        else:
            said.append(f"{title} {change['change']:+.1f} {interval}")
    return f"On {tested:,} test images: {'; '.join(said)}."
