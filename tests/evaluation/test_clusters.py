"""Clusters against labels, and runs against each other."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odcft.errors import OdcftError
from odcft.evaluation.clusters import agreement, cluster_features, compare_run, nmi, nmi_of_runs


def test_agreement_worked_out_by_hand():
    clusters = np.array([7, 7, 7, 3, 3, 5])
    classes = np.array([0, 0, 1, 1, 1, 1])
    found = agreement(clusters, classes)
    # Most frequent: 2 of cluster 7, 2 of 3, 1 of 5. One to one: 7 is class 0 (2 images), 3 is class 1 (2), 5 is none.
    assert found["purity"] == pytest.approx(100 * 5 / 6)
    assert found["accuracy"] == pytest.approx(100 * 4 / 6)
    assert found["correct"].tolist() == [True, True, False, True, True, False]
    joint = np.array([[2, 1], [0, 2], [0, 1]]) / 6
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(p * np.log(p / (rows[i] * columns[j])) for (i, j), p in np.ndenumerate(joint) if p)
    entropies = [-(p * np.log(p)).sum() for p in (rows, columns)]
    assert found["nmi"] == pytest.approx(information / np.sqrt(entropies[0] * entropies[1]))


def test_the_best_assignment_is_not_the_greedy_one():
    counts = [[5, 4], [4, 0]]  # greedy: 5 + 0; best: 4 + 4
    clusters, classes = (
        np.concatenate([[pair[i]] * counts[pair[0]][pair[1]] for pair in np.ndindex(2, 2)]) for i in (0, 1)
    )
    assert agreement(clusters.astype(int), classes.astype(int))["accuracy"] == pytest.approx(100 * 8 / 13)


def test_the_same_groups_under_other_names_agree_completely():
    classes = np.arange(30) % 3
    found = agreement((classes + 1) % 3 * 10, classes)
    assert (found["nmi"], found["purity"], found["accuracy"]) == (pytest.approx(1), 100, 100)
    assert nmi(np.zeros(30), classes) == 0


def test_fresh_clusters_find_classes_that_are_apart():
    class_N = np.arange(200) % 4
    features = 5 * np.eye(4, 8)[class_N] + np.random.default_rng(0).normal(size=(200, 8))
    scaled = features * np.random.default_rng(1).uniform(1e-3, 1e30, (200, 1))
    found = cluster_features(scaled, class_N)
    assert found["k"] == 4
    assert found["accuracy"] > 95
    assert cluster_features(features, class_N, 8)["k"] == 8
    again = cluster_features(scaled, class_N)
    assert again["correct"].tolist() == found["correct"].tolist()
    assert cluster_features(features[:3], class_N[:3], 8)["k"] == 3


def write_clusters(path, clusters):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"path": list(clusters), "cluster": list(clusters.values())}), path)


def test_the_clusters_of_a_run_are_compared_where_the_images_are_its_own(tmp_path):
    data, run = tmp_path / "images", tmp_path / "run"
    data.mkdir()
    write_clusters(run / "clusters.parquet", {f"{c}/{i}.png": 10 * c for i in range(4) for c in (0, 1)} | {"x.png": 9})
    (run / "run.json").write_text(json.dumps({"data": str(data)}))
    paths = [str(data / f"{c}/{i}.png") for i in range(5) for c in (0, 1)]
    classes = np.array([0, 1] * 5)
    found = compare_run(run, paths, classes)
    assert found == {"nmi": pytest.approx(1), "purity": 100, "accuracy": 100, "k": 2, "images": 8}
    # Images of the same names somewhere else are other images.
    with pytest.raises(OdcftError, match=r"was not trained on any of these images \(but on .*images\)"):
        compare_run(run, [path.replace("images", "others") for path in paths], classes)
    # A list file stands beside its images.
    (run / "run.json").write_text(json.dumps({"data": str(data / "list.csv")}))
    assert compare_run(run, paths, classes)["images"] == 8
    # The command was started in another folder than now.
    (run / "run.json").write_text(json.dumps({"data": "images", "data_path": str(data)}))
    assert compare_run(run, paths, classes)["images"] == 8
    (run / "run.json").write_text(json.dumps({"data": str(data), "data_path": "gone\0"}))
    assert compare_run(run, paths, classes)["images"] == 8
    (run / "run.json").write_text(json.dumps({"data": 3}))
    with pytest.raises(OdcftError, match="was not trained on any"):
        compare_run(run, paths, classes)


def test_two_runs(tmp_path):
    for name, clusters in (
        ("a", {"1": 0, "2": 0, "3": 1, "only in a": 5}),
        ("b", {"3": 4, "2": 9, "1": 9}),
        ("c", {"z": 1}),
    ):
        write_clusters(tmp_path / name / "clusters.parquet", clusters)
    found = nmi_of_runs(tmp_path / "a", tmp_path / "b" / "clusters.parquet")
    assert found == {"nmi": pytest.approx(1), "images": 3}
    with pytest.raises(OdcftError, match="list no image in common"):
        nmi_of_runs(tmp_path / "a", tmp_path / "c")
    with pytest.raises(OdcftError, match=r"clusters.parquet is not the clusters.parquet of a run"):
        nmi_of_runs(tmp_path / "a", tmp_path)
