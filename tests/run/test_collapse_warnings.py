"""Warnings about collapsing runs, and the one-line summary."""

import json

import pytest
from stopped_runs import quick

from odcft.run.collapse_warnings import summary, warnings

HEALTHY = {"loss_over_ln_k": 0.7, "entropy": 0.98, "largest_share": 0.02, "centroid_spread": 0.4}


def lines(count=9, **figures):
    return [{"step": 50 * i + 49, "epoch": (i + 1) / 2, **HEALTHY, **figures} for i in range(count)]


@pytest.mark.parametrize(
    ("figures", "problems"),
    [
        ({}, []),
        ({"loss_over_ln_k": 0.99}, ["chance"]),
        ({"loss_over_ln_k": 2.0}, ["diverging"]),
        ({"entropy": 0.8}, ["uneven"]),
        ({"largest_share": 0.2}, ["uneven"]),
        ({"centroid_spread": 0.01}, ["alike"]),
    ],
)
def test_figures_of_a_collapsing_run_are_recognised(figures, problems):
    assert list(warnings(lines(**figures), K=156)) == problems


def test_close_centroids_of_a_new_neck_are_no_collapse_in_the_first_steps():
    new = {"centroid_spread": 0.01, "loss": 0.5, "change_ratio": 0.1, "smallest": 3, "largest": 4, "data_wait": 0.0}
    early = {**lines(1, **new)[0], "step": 4, "epoch": 5.0}  # five images: a step an epoch
    assert not warnings([early], K=2)
    assert summary(early, "odc").endswith("too early to tell")
    assert list(warnings([{**early, "step": 49}], K=2)) == ["alike"]


def test_a_loss_at_chance_is_no_problem_at_first_nor_once_it_has_fallen():
    assert not warnings(lines(5, loss_over_ln_k=1.0), K=156)
    history = lines(loss_over_ln_k=1.0)
    history[-3]["loss_over_ln_k"] = 0.9
    assert not warnings(history, K=156)


def test_the_loss_of_a_head_from_which_the_network_does_not_learn_is_no_problem():
    """At the start of `small`, the network learns by the instance loss alone."""
    for loss in (1.0, 4.0):
        assert not warnings(lines(loss_over_ln_k=loss), K=156, head_apart_until=4.5)
    assert not warnings(lines(loss_over_ln_k=1.0), K=156, head_apart_until=2.0)  # not for three epochs yet
    assert list(warnings(lines(loss_over_ln_k=1.0), K=156, head_apart_until=1.5)) == ["chance"]
    assert list(warnings(lines(loss_over_ln_k=2.0), K=156, head_apart_until=4.0)) == ["diverging"]
    counts = {"loss": 5.5, "change_ratio": 0.0, "smallest": 3, "largest": 4, "data_wait": 0.0, "nmi_previous": 1.0}
    (line,) = lines(1, **{**counts, "loss_over_ln_k": 1.1, "instance_loss": 2.5})
    said = summary(line, "odc", kept_labels=True, head_apart=True)
    assert said == (
        "loss 5.50 (1.10 of ln K) · instance loss 2.50 · first labels kept · clusters 3 … 4 · data wait 0% · healthy"
    )
    assert "labels moving 0% · NMI with the epoch before 1.00" in summary(line, "odc")
    assert summary(line, "odc").endswith("not learning yet")


def test_a_classifier_that_is_reinitialised_stays_at_chance_for_another_reason():
    assert "labels carry no signal" in warnings(lines(loss_over_ln_k=1.0), K=156)["chance"]
    assert "is re-initialised" in warnings(lines(loss_over_ln_k=1.0), K=156, method="dc")["chance"]


def test_a_collapsing_run_is_warned_about_and_a_healthy_one_is_not(go, tmp_path, make_images):
    images = make_images(tmp_path / "kinds", 48)
    base = ("memory.clusters=6", "optim.batch_size=8", "optim.schedule=step", "optim.final_epochs=0", "neck.dropout=0")
    go(quick(*base, "optim.epochs=4", "memory.min_cluster=-1", "optim.lr=5", recipe="odc_small"), data=images)
    said = "".join(go.said)
    assert "the clusters are as uneven as if there were only" in said
    assert "the loss is" in said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "uneven" in last["warnings"]
    go.said.clear()
    go(quick(*base, "memory.min_cluster=2", "optim.lr=0.05", recipe="odc_small"), data=images, run=tmp_path / "healthy")
    assert not [line for line in go.said if "Warning" in line]
