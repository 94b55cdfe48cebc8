"""What the report says of a run's health: what is wrong, and what to change."""

import pytest
from written_runs import line_of

from odcft.recipe import load_recipe
from odcft.reports.health import findings
from odcft.reports.run_record import Assignment, RunRecord


def record_of(lines, method="odc", finished=True, **more):
    recipe = load_recipe("small", ["memory.clusters=10", f"method={method}"])
    record = RunRecord(
        None, {"finished": 1} if finished else {}, recipe, lines=[{"warnings": [], **line} for line in lines]
    )
    record.clusters = Assignment([], None, None) if finished else None
    for name, value in more.items():
        setattr(record, name, value)
    return record


def problems(*args, **more):
    return {finding.about: finding.text for finding in findings(record_of(*args, **more)) if not finding.fine}


def test_a_healthy_run_has_no_problem():
    lines = [line_of(step, change_ratio=0.02) for step in range(50)]
    assert problems(lines) == {}
    said = " ".join(finding.text for finding in findings(record_of(lines)))
    assert "The loss went from 0.90 to 0.85 of ln K" in said
    assert "the clusters have settled" in said
    assert "The clusters hold 2 to 9 images. Their sizes are 97% as even as they can be" in said


@pytest.mark.parametrize(
    ("figures", "about", "says"),
    [
        ({"loss_over_ln_k": 1.0}, "Not learning", "Try a milder augmentation"),
        ({"loss_over_ln_k": 2.0}, "Diverging", "optim.lr at a third"),
        ({"entropy": 0.3}, "Uneven clusters", "fewer --clusters"),
        ({"centroid_spread": 0.001}, "Collapse", "features collapse"),
        ({"change_ratio": 0.6}, "Labels", "Train longer"),
        ({"data_wait": 0.5}, "Speed", "data.workers"),
    ],
)
def test_each_problem_is_named_with_what_helps(figures, about, says):
    lines = [line_of(step, change_ratio=0.02) | figures for step in range(60)]
    found = problems(lines)
    assert list(found) == [about]
    assert says in found[about]


@pytest.mark.parametrize(
    ("ratios", "finished", "fine", "says"),
    [
        ([0.4 - step / 150 for step in range(48)], True, True, "9% of the labels change in a step, fewer and fewer"),
        ([0.5 - step / 150 for step in range(48)], True, True, "the clusters are settling"),
        ([0.05 + step / 400 for step in range(48)], True, False, "17% of the labels change in a step, more and more"),
        ([0.05 + step / 400 for step in range(48)], False, True, "the clusters have not settled yet"),
        ([0.2] * 48, True, True, "20% of the labels change in a step: the clusters have not settled yet"),
        ([0.02, 0.03], True, True, "the clusters have settled"),
        (
            [0.001 + step / 9000 for step in range(48)],
            True,
            True,
            "0.6% of the labels change in a step: the clusters have settled",
        ),
        ([0.4] * 48, True, False, "the clusters have not settled. Train longer"),
    ],
)
def test_labels_are_judged_by_where_they_are_and_where_they_go(ratios, finished, fine, says):
    lines = [line_of(step, change_ratio=ratio) for step, ratio in enumerate(ratios)]
    (labels,) = (one for one in findings(record_of(lines, finished=finished)) if one.about == "Labels")
    assert labels.fine == fine
    assert says in labels.text


def test_labels_that_a_run_keeps_for_some_epochs_have_not_settled():
    recipe = load_recipe("small", ["memory.clusters=10", "memory.start_epochs=2"])
    lines = [line_of(step, change_ratio=0.0 if step < 20 else 0.4) for step in range(40)]  # ten steps an epoch
    for count, says in ((20, "keep their first labels for 2 epochs"), (40, "40% of the labels change in a step: the")):
        record = record_of(lines[:count], recipe=recipe)
        (labels,) = (one for one in findings(record) if one.about == "Labels")
        assert says in labels.text
        assert "have settled" not in labels.text


def test_a_best_epoch_long_ago_and_unreadable_images_are_told():
    lines = [line_of(step, change_ratio=0.02, knn=70.0 if step == 5 else 60.0) for step in range(40)]
    found = problems(lines, unreadable={"a.png": "cut"})
    assert "was best in epoch 1 (70.0) and is 60.0 now" in found["kNN"]
    assert "1 image" in found["Images"]
    assert "quarantine.csv" in found["Images"]


def test_a_warning_that_is_over_is_told_as_such():
    lines = [line_of(step, change_ratio=0.02, warnings=["uneven"] if step in (12, 13) else []) for step in range(40)]
    record = record_of(lines)
    (over,) = [finding for finding in findings(record) if "but not since" in finding.text]
    assert over.fine
    assert "steps 12 to 13" in over.text


def test_a_run_without_lines_is_not_judged():
    assert problems([]) == {}
    assert findings(record_of([]))[0].about == "Too early"
