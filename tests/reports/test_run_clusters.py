"""Reading the clusters of a RUN, and finding its images again."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from run_folders import finished_run

from odcft.errors import OdcftError
from odcft.progress import Progress
from odcft.reports.run_clusters import find_run_images, read_run
from odcft.run import snapshot_files
from odcft.state import Snapshot

QUIET = Progress(quiet=True)


def test_a_finished_run_is_read_in_the_order_of_its_images(tmp_path, make_images):
    found = read_run(
        finished_run(tmp_path / "run", make_images(tmp_path / "images", 10), clusters=4, labels=[0] * 7 + [2] * 3)
    )
    assert (found.K, found.step) == (4, None)
    assert found.size_K.tolist() == [7, 0, 3, 0]
    assert [(k, rows.tolist()) for k, rows in found.by_distance()] == [(0, list(range(7))), (2, [7, 8, 9])]
    assert np.isnan(found.mean_distance_K()[1])
    assert found.mean_distance_K()[2] == pytest.approx(0.108)


def test_of_a_run_that_trains_the_newest_state_is_read(tmp_path, make_images):
    run = finished_run(tmp_path / "run", make_images(tmp_path / "images", 6))
    (run / "clusters.parquet").unlink()
    with pytest.raises(OdcftError, match="neither ended nor saved"):
        read_run(run)
    same = {"method.centroids": torch.eye(3)}
    for step, labels in ((1, [0, 0, 0, 0, 0, 0]), (2, [2, 1, 0, 2, 1, 0])):
        rows = {"features": torch.eye(3).repeat(2, 1).half(), "labels": torch.tensor(labels, dtype=torch.int32)}
        snapshot_files.save(run, Snapshot(same, rows, {}, {"step": step, "images": 6}))
    found = read_run(run)
    assert found.step == 2
    assert found.label_N.tolist() == [2, 1, 0, 2, 1, 0]
    assert found.distance_N.tolist() == pytest.approx([2**0.5, 0, 2**0.5] * 2)
    newest = run / "checkpoints" / "step-000000002" / "same.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert read_run(run).step == 1
    assert newest.exists()  # where a run may train, nothing is set aside


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no run", "is not a RUN"),
        ("other images", "other images"),
        ("cut", "is not the clusters.parquet"),
        ("far", "outside 0"),
    ],
)
def test_what_is_no_run_or_damaged_is_refused(tmp_path, make_images, what, message):
    run = finished_run(
        tmp_path / "run", make_images(tmp_path / "images", 6), labels=[10**9 if what == "far" else 0] * 6
    )
    path = run / "clusters.parquet"
    if what == "no run":
        (run / "run.json").unlink()
    elif what == "other images":
        pq.write_table(pq.read_table(path).slice(1), path)
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OdcftError, match=message):
        read_run(run)


def test_images_that_are_gone_or_new_are_counted(tmp_path, make_images):
    images = make_images(tmp_path / "images", 8)
    found = read_run(finished_run(tmp_path / "run", images))
    (images / "a" / "002.png").rename(images / "a" / "100.png")
    now = find_run_images(found, None, None, QUIET)
    assert (now.gone, now.new) == (1, 1)
    assert [now.images.names[i] for i in now.where_N if i >= 0] == [name for name in found.names if name != "a/002.png"]
    assert len(now.notes()) == 2


def test_moved_images_are_found_by_data(tmp_path, make_images):
    images = make_images(tmp_path / "images", 8)
    found = read_run(finished_run(tmp_path / "run", images))
    images.rename(tmp_path / "moved")
    with pytest.raises(OdcftError, match="does not exist here"):
        find_run_images(found, None, None, QUIET)
    assert find_run_images(found, str(tmp_path / "moved"), None, QUIET).gone == 0
    with pytest.raises(OdcftError, match="None of the 8 images"):
        find_run_images(found, str(tmp_path / "moved" / "a"), None, QUIET)


def test_a_run_named_like_its_images_is_not_taken_for_them(tmp_path, make_images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "flowers", 8)
    run = finished_run(tmp_path / "runs" / "flowers", "flowers")
    (tmp_path / "flowers").rename(tmp_path / "away")
    found = read_run(run)
    with pytest.raises(OdcftError, match="run on flowers, which does not exist here"):
        find_run_images(found, None, None, QUIET)
    assert find_run_images(found, "away", None, QUIET).gone == 0


def test_a_relative_path_is_looked_up_beside_the_run_and_a_url_never(tmp_path, make_images, monkeypatch):
    make_images(tmp_path / "here" / "images", 8)
    monkeypatch.chdir(tmp_path / "here")
    run = finished_run(tmp_path / "here" / "runs" / "one", "images")
    monkeypatch.chdir(tmp_path)
    about = json.loads((run / "run.json").read_text())
    for change in ({"data_path": "/nowhere"}, {"data_path": None}):
        (run / "run.json").write_text(json.dumps(about | change))
        assert find_run_images(read_run(run), None, None, QUIET).gone == 0
    (run / "run.json").write_text(json.dumps(about | {"data": "https://example.com/images.tar"}))
    with pytest.raises(OdcftError, match="Nothing is fetched unasked: pass --data https"):
        find_run_images(read_run(run), None, None, QUIET)
