"""Charts: SVG that fits into a page, with the page's colours, and the same facts in words."""

import re

import numpy as np
import pytest
from written_runs import line_of

from odcft.reports import charts

pytestmark = pytest.mark.usefixtures("drawn")


def test_curves_say_in_words_where_they_begin_and_end():
    lines = [line_of(step, lr=step / 1000) for step in range(20)]
    drawn = {chart.name: chart for chart in charts.draw_curves({"a run of $5": lines})}
    assert set(drawn) == set(charts.CURVES) - {"knn"}
    assert drawn["loss"].words.endswith("From 0.90 to 0.88.")
    assert "Largest: 9 at both ends; smallest: 2 at both ends." in drawn["sizes"].words
    svg = drawn["loss"].svg
    assert svg.startswith("<svg ")
    assert "currentColor" in svg
    assert "var(--series-1)" in svg
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href|id)="[^"]*"|url\([^)]*\)', "", svg))
    assert "<style" not in svg
    assert re.findall(r">0\.\d{3,}<", drawn["lr"].svg)  # numbers at the axis are not cut like coordinates


def test_two_runs_share_axes_and_have_a_legend():
    lines = [line_of(step) for step in range(5)]
    (chart,) = [c for c in charts.draw_curves({"one $x^2$": lines, "two": lines}) if c.name == "loss"]
    assert "var(--series-2)" in chart.svg
    assert "one $x^2$" in chart.svg
    assert "one $x^2$, 0.90 at both ends; two, 0.90" in chart.words


def test_odd_figures_are_drawn():
    lines = [line_of(0, smallest=0, largest=0, lr=1e-300), line_of(1, smallest=0, largest=10**15, lr=1e25)]
    assert len(charts.draw_curves({"a": lines})) == len(charts.CURVES) - 1
    assert charts.draw_curves({"a": [{"step": 1}]}) == []
    assert charts.draw_curves({"a": [{"step": 1, "epoch": 1.0, "knn": 50.0}]})[0].name == "knn"


def test_first_labels_that_are_kept_are_not_drawn_as_if_they_had_settled():
    lines = [
        {"epoch": e, "change_ratio": c, "nmi_previous": n}
        for e, c, n in ((1, 0, 1), (2, 0, 1), (3, 0.4, 0.5), (4, 0, 1))
    ]
    drawn = {chart.name: chart.words for chart in charts.draw_curves({"a": lines})}
    assert drawn["changes"].endswith("From 40.0% to 0.0%.")
    assert drawn["nmi"].endswith("From 0.50 to 1.00.")
    (still,) = [c for c in charts.draw_curves({"a": lines[:2]}) if c.name == "changes"]
    assert still.words.endswith("0.0% at both ends.")


def test_long_logs_are_thinned():
    lines = [line_of(step, epochs=0.001) for step in range(20_000)]
    assert len(charts.draw_curves({"a": lines})[0].svg) < 100_000


@pytest.mark.parametrize("count", [1, 2, 4, 40])
def test_every_cluster_is_a_link_on_the_map(count):
    draw = np.random.default_rng(0)
    ids, sizes = np.arange(count) * 3, draw.integers(1, 9, count)
    chart = charts.draw_map(ids, draw.normal(size=(count, 5)).astype(np.float32), sizes)
    assert sorted(map(int, re.findall(r'href="#cluster-(\d+)"', chart.svg))) == ids.tolist()
    assert 'target="' not in chart.svg
    same = charts.layout(np.ones((count, 5), np.float32))[0]
    assert np.isfinite(same).all()
