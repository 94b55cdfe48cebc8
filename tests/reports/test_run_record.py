"""What a RUN says of itself is data of unknown origin: bounded, never waited for, never executed."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from odcft.errors import OdcftError
from odcft.reports import run_record
from odcft.reports.run_record import LAST_LINES, read_run


@pytest.mark.parametrize("kind", ["pipe", "folder", "bfloat16", "float8", "cube", "empty", "not finite", "complex"])
def test_states_that_are_no_states_are_left_out(make_run, tmp_path, kind):
    run = make_run(tmp_path)
    tensors = {
        "bfloat16": torch.ones(3, 8, dtype=torch.bfloat16),
        "float8": torch.ones(3, 8).to(torch.float8_e4m3fn),
        "cube": torch.ones(3, 8, 2),
        "empty": torch.ones(0),
        "not finite": torch.full((3, 8), torch.nan),
        "complex": torch.ones(3, dtype=torch.complex64),
    }
    for path in [*run.glob("checkpoints/*/same*"), *run.glob("checkpoints/*/rank-*")]:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            save_file({"method.centroids": tensors[kind], "rows.labels": tensors[kind].clone()}, path)
    record = read_run(run)
    assert (record.centroids_KD is not None) == (kind in ("bfloat16", "float8"))
    assert record.earlier_N is None


def test_labels_of_too_many_images_are_left_out(make_run, tmp_path):
    run = make_run(tmp_path)
    for path in run.glob("checkpoints/*/rank-*"):
        save_file({"rows.labels": torch.zeros(1000, dtype=torch.int32)}, path)
    assert read_run(run).earlier_N is None


@pytest.mark.parametrize("kind", ["pipe", "folder", "other run", "bomb", "long paths"])
def test_a_clusters_parquet_that_is_none_is_refused(make_run, tmp_path, kind):
    run = make_run(tmp_path)
    table = run / "clusters.parquet"
    table.unlink()
    said = {
        "pipe": "it is not a file",
        "folder": "it is not a file",
        "other run": "has 5 rows, but the run has 24 images",
    }
    if kind == "pipe":
        os.mkfifo(table)
    elif kind == "folder":
        table.mkdir()
    elif kind == "other run":
        pq.write_table(pa.table({"path": list("abcde"), "cluster": [0] * 5}), table)
    else:
        count = 3_000_000 if kind == "bomb" else 24
        paths = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * 100_000 * (kind != "bomb")])
        pq.write_table(pa.table({"path": paths, "cluster": np.zeros(count, np.int64)}), table, store_schema=False)
        assert table.stat().st_size < 200_000
    if kind == "bomb":
        about = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(about | {"images": 3_000_000}))
    with pytest.raises(OdcftError, match=said.get(kind, "it claims|its paths are too long")) as refused:
        read_run(run)
    assert "\n" not in str(refused.value)


def test_a_long_log_is_thinned_and_keeps_its_epochs_and_its_end(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "MOST_LINES", 1000)
    lines = [json.dumps({"step": step, "epoch": step / 100, "loss": 1.0, "x" * 99: 1.0}) for step in range(2500)]
    for step in range(0, 2500, 100):
        lines[step] = json.dumps({"step": step, "epoch": step / 100, "nmi_previous": 0.5})
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text("\n".join(["x" * 300_000, "[" * 70_000, *lines]))
    record = read_run(run)
    steps = [line["step"] for line in record.lines]
    assert steps == sorted(steps)
    assert len(steps) <= 2000 + LAST_LINES
    assert steps[-LAST_LINES:] == list(range(2500 - LAST_LINES, 2500))
    assert sum("nmi_previous" in line for line in record.lines) == 25
    assert set(record.lines[-1]) == {"step", "epoch", "loss", "warnings"}


def test_a_log_whose_lines_all_end_an_epoch_is_thinned_too(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "MOST_LINES", 1000)
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "knn": 2}\n' * 5000)
    assert len(read_run(run).lines) <= 2000 + LAST_LINES


@pytest.mark.parametrize("about", [{"images": True}, {"images": -1}, {"images": 10**4000}, {"images": "many"}])
def test_a_number_of_images_that_is_none_is_not_said(make_run, tmp_path, about):
    run = make_run(tmp_path)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | about))
    assert read_run(run).image_count() is None
