"""What `evaluate --protocol unlabelled` prints."""

from typing import Any

TITLES = {  # measure to its title and decimals
    "neighbour_agreement": ("neighbours kept under augmentation", 3),
    "cluster_stability": ("clusters found again in resamples", 2),
    "effective_rank": ("effective rank of the features", 0),
    "lidar": ("rank of what views have in common (LiDAR)", 0),
    "spectrum_decay": ("decay of the spectrum", 2),
    "spread": ("spread (0: all features alike)", 2),
    "dead_share": ("share of dead features", 2),
}
HINT = "Labelled images can settle it:   odcft evaluate RUN LABELLED/   # docs/unlabelled.md"
WIDE = 2 + max(len(title) for title, _ in TITLES.values())


def unlabelled_lines(results: dict[str, Any]) -> list[str]:
    """The measures as a table, and the verdict with its reason; of several checkpoints, a table and a line each."""
    if "columns" in results:
        columns = results["columns"]
        rows = _table([f"[{number}]" for number in range(1, len(columns) + 1)], [one["measures"] for one in columns])
        names = [f"  [{number}] {one['source']}" for number, one in enumerate(columns, 1)]
        said = [f"{one['source']}: {_sentence(one)}" for one in columns if one["verdict"]]
        return [*names, *rows, *said, HINT]
    rows = _table(["before", "after"] if results["verdict"] else [""], [results["measures"]])
    return [*rows, _sentence(results), *([HINT] if results["verdict"] else [])]


def _table(heads: list[str], columns: list[dict[str, dict[str, float]]]) -> list[str]:
    """One row for each measure; a single column with `before` has two figures."""
    both = heads[0] == "before"
    rows = [" " * (WIDE + 2) + "".join(f"{head:>9}" for head in heads)] if heads != [""] else []
    for name, (title, decimals) in TITLES.items():
        figures = (
            [columns[0][name]["before"], columns[0][name]["after"]]
            if both
            else [measures[name]["after"] for measures in columns]
        )
        rows.append(f"  {title:<{WIDE}}" + "".join(f"{figure:>9,.{decimals}f}" for figure in figures))
    return rows


def _sentence(result: dict[str, Any]) -> str:
    """The verdict, and why."""
    if result["verdict"] is None:
        return f"No verdict: {result['reason']}"
    return f"{result['verdict'].capitalize()}: {result['reason']}"
