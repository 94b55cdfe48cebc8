"""The charts of a report: drawn by matplotlib, as SVG that takes its colours from the page, in light and in dark.

Shapes: K clusters, D embedding.
"""

import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 1000  # of a curve; longer logs are thinned
TSNE_DIMENSIONS = 30  # principal components that t-SNE is given
MAX_TSNE = 3000  # centroids; more are shown by their first two principal components
SIZES = (4.0, 12.0, 30.0, 64.0)  # of the map's points, in square points: a quarter of the clusters each
TEXT = "#010203"  # stands for the page's own text colour until the SVG is in the page
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03")  # stand for its colours of curves
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": TEXT,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
}
Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A figure of the page: a short name for its address, title, what it shows in a sentence, and the SVG."""

    name: str
    title: str
    words: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """What is drawn of the log: keys of its lines against the epoch.

    Attributes:
        keys: of the lines; one curve each.
        title: of the chart.
        help: what it means, in a sentence.
        shown: formats a value.
        scale: "linear" or "log".
        percent: whether the values are shares, shown in per cent.
        reference: a value to draw a dashed line at, and what it is.
        at_rest: the value while images keep their first labels (memory.start_epochs); not drawn at the start.
    """

    keys: tuple[str, ...]
    title: str
    help: str
    shown: Callable[[float], str] = "{:.3g}".format
    scale: str = "linear"
    percent: bool = False
    reference: tuple[float, str] | None = None
    at_rest: float | None = None


CURVES = {
    "loss": Curve(
        ("loss_over_ln_k",),
        "Loss, relative to ln K",
        "1 is the loss of guessing; lower means that the network predicts the clusters.",
        "{:.2f}".format,
        reference=(1.0, "guessing"),
    ),
    "changes": Curve(
        ("change_ratio",),
        "Labels that change in a step",
        "The share of a batch's images that move to another cluster (fig. 5 of the paper), from when first labels may "
        "change.",
        "{:.1%}".format,
        percent=True,
        at_rest=0.0,
    ),
    "nmi": Curve(
        ("nmi_previous",),
        "NMI with the epoch before",
        "1 means that the clusters are the same as an epoch earlier.",
        "{:.2f}".format,
        at_rest=1.0,
    ),
    "knn": Curve(
        ("knn",), "Nearest-neighbour accuracy", "On the labelled images of --eval, in per cent.", "{:.1f}".format
    ),
    "sizes": Curve(
        ("largest", "smallest"),
        "Cluster sizes",
        "Images in the largest and in the smallest cluster.",
        "{:,.0f}".format,
        "log",
    ),
    "evenness": Curve(
        ("entropy",),
        "How even the clusters are",
        "Entropy of their sizes, divided by ln K: 1 if all are equal, 0 if one has every image.",
        "{:.3f}".format,
    ),
    "lr": Curve(("lr",), "Learning rate", "Of the backbone.", "{:.2g}".format),
    "speed": Curve(("images_per_second",), "Images a second", "On all processes together.", "{:,.0f}".format),
    "wait": Curve(
        ("data_wait",),
        "Waiting for images",
        "The share of the time that training waits for data.",
        "{:.0%}".format,
        percent=True,
    ),
}


def draw_curves(runs: Mapping[str, Lines]) -> list[Chart]:
    """The charts of one run, or of several in the same axes; those that no run has figures for are left out.

    Args:
        runs: a name for the legend to the lines of its log.
    """
    return [chart for name, curve in CURVES.items() if (chart := _draw_curve(name, curve, runs)) is not None]


def _draw_curve(name: str, curve: Curve, runs: Mapping[str, Lines]) -> Chart | None:
    series = []
    for run, lines in runs.items():
        for key in curve.keys:
            points = [(line["epoch"], line[key]) for line in lines if key in line and "epoch" in line]
            if points:
                series.append((run, key, _thinned(np.array(points[_at_rest(points, curve) :], np.float64))))
    if not series:
        return None

    several = len(runs) > 1

    def draw(axes: Any) -> None:
        for run, key, points in series:
            first = key == curve.keys[0]
            colour = SERIES[list(runs).index(run) % 3] if several else SERIES[curve.keys.index(key)]
            label = (run if first else None) if several else key
            dashes = "-" if first or not several else "--"
            axes.plot(*points.T, dashes, color=colour, label=label, linewidth=1.6, marker="o"[: len(points) == 1])
        if curve.reference is not None:
            axes.axhline(curve.reference[0], color=TEXT, linewidth=0.9, linestyle=":", alpha=0.6)
        if curve.percent:
            from matplotlib.ticker import PercentFormatter

            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if curve.scale == "log" and all((points[:, 1] > 0).all() for _, _, points in series):
            _log_scale(axes)
        axes.set_xlabel("epoch")
        if several or len(curve.keys) > 1:
            axes.legend(fontsize=8)

    return Chart(name, curve.title, f"{curve.help} {_in_words(curve, series, len(runs) > 1)}.", as_svg(name, draw))


def _at_rest(points: Sequence[tuple[float, float]], curve: Curve) -> int:
    """How many points at the start are at the value of labels that are kept; 0 if all are."""
    rest = curve.at_rest
    moving = (index for index, (_, value) in enumerate(points) if rest is None or not math.isclose(value, rest))
    return next(moving, 0)


def _log_scale(axes: Any) -> None:
    """A logarithmic scale of counts, with plain numbers at 1, 2, 5, 10 …"""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _in_words(curve: Curve, series: Sequence[tuple[str, str, np.ndarray]], several: bool) -> str:
    """Where the curves of a chart begin and end."""
    said = []
    for run, key, points in series:
        who = (f"{run}, " if several else "") + (f"{key}: " if len(curve.keys) > 1 else "")
        first, last = curve.shown(points[0, 1]), curve.shown(points[-1, 1])
        ends = f"from {first} to {last}" if first != last else f"{last} at both ends"
        said.append(f"{who}{ends if len(points) > 1 else last}")
    text = "; ".join(said)
    return text if several else text[:1].upper() + text[1:]


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS of a curve's points (P, 2): means of as many neighbours, the last point as it is."""
    if len(points) <= MAX_POINTS:
        return points
    means = np.stack([part.mean(0) for part in np.array_split(points[:-1], MAX_POINTS - 1)])
    return np.concatenate([means, points[-1:]])


def draw_sizes(size_K: np.ndarray) -> Chart:
    """The histogram of cluster sizes at the end."""

    def draw(axes: Any) -> None:
        axes.hist(size_K, bins=min(40, max(5, len(size_K) // 8)), color=SERIES[0])
        axes.axvline(float(size_K.mean()), color=TEXT, linestyle=":", linewidth=0.9)
        axes.set_xlabel("images in a cluster")
        axes.set_ylabel("clusters")

    words = f"{len(size_K):,} clusters of {size_K.min():,} to {size_K.max():,} images; half of them have more than "
    return Chart("final-sizes", "Cluster sizes at the end", f"{words}{np.median(size_K):,.0f}.", as_svg("final", draw))


def draw_map(ids: np.ndarray, centroids_KD: np.ndarray, size_K: np.ndarray) -> Chart:
    """A map of the centroids in two dimensions: a point is a cluster, and a link to `#cluster-ID`.

    Args:
        ids: the numbers of the clusters (K,).
        centroids_KD: their centroids.
        size_K: their numbers of images.
    """
    points, how = layout(centroids_KD)
    quarter_K = np.searchsorted(np.quantile(size_K, (0.25, 0.5, 0.75)), size_K)

    def draw(axes: Any) -> None:
        for quarter, area in enumerate(SIZES):
            mine = quarter_K == quarter
            drawn = axes.scatter(*points[mine].T, s=area, color=SERIES[0], alpha=0.55, linewidths=0)
            drawn.set_urls([f"#cluster-{number}" for number in ids[mine].tolist()])
        axes.set_axis_off()
        axes.set_aspect("equal", "datalim")

    words = (
        f"Each of the {len(ids):,} points is a cluster, a larger one if it has more images; near points have similar "
    )
    words += f"centroids ({how}). Select a point to open its cluster."
    return Chart("map", "Map of the clusters", words, as_svg("map", draw, (8.0, 5.5)))


def layout(centroids_KD: np.ndarray) -> tuple[np.ndarray, str]:
    """Positions (K, 2) of centroids in a plane, and how they were found."""
    rows = centroids_KD.astype(np.float64) - centroids_KD.mean(0)
    if len(rows) < 5 or len(rows) > MAX_TSNE or not np.ptp(rows):
        left, values, _ = np.linalg.svd(rows, full_matrices=False)
        plane = np.zeros((len(rows), 2))
        plane[:, : min(2, len(values))] = (left * values)[:, :2]
        return plane, "their first two principal components"
    from sklearn.manifold import TSNE

    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    rows = (left * values)[:, :TSNE_DIMENSIONS]
    neighbours = min(30.0, (len(rows) - 1) / 3)
    found = TSNE(perplexity=neighbours, init="pca", random_state=0, max_iter=500, n_jobs=1).fit_transform(
        rows.astype(np.float32)
    )
    return found, "t-SNE"


def as_svg(salt: str, draw: Callable[[Any], None], inches: tuple[float, float] = (4.2, 2.4)) -> str:
    """A figure as SVG to put into HTML: `draw` gets its axes.

    Args:
        salt: makes the ids in it differ from those of other figures of the page.
        draw: called with the axes.
        inches: width and height.
    """
    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the first use builds a cache, and says so
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _for_html(text.getvalue())


def _for_html(svg: str) -> str:
    """The element without what only a file needs, with the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z0-9_.]+">', "<g>", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg class="chart" aria-hidden="true" focusable="false" ', 1)
    svg = svg.replace(' target="_blank"', ' tabindex="-1"')
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag.group()), svg)
    for number, colour in enumerate(SERIES, 1):
        svg = svg.replace(colour, f"var(--series-{number})")
    return svg.replace(TEXT, "currentColor").strip()
