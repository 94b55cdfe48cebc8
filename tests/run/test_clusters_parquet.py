"""clusters.parquet: a missing pyarrow is reported before a run begins; reading it back."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odcft.errors import OdcftError
from odcft.run import clusters_parquet


def test_without_pyarrow_no_run_begins(monkeypatch):
    clusters_parquet.require_parquet()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OdcftError, match=r"clusters.parquet needs pyarrow .*: pip install pyarrow"):
        clusters_parquet.require_parquet()


def test_clusters_are_read_back(tmp_path):
    path = tmp_path / "clusters.parquet"
    pq.write_table(pa.table({"path": ["a.png", "b/c.png"], "cluster": [3, 0], "distance": [0.5, 1.0]}), path)
    assert clusters_parquet.read_clusters(path) == {"a.png": 3, "b/c.png": 0}


@pytest.mark.parametrize(
    "what", ["missing", "folder", "text", "cut", "no path", "numbers as paths", "text as clusters"]
)
def test_a_file_that_holds_no_clusters_is_refused(tmp_path, what):
    path = tmp_path / "clusters.parquet"
    columns = {"path": ["a.png", "b.png"] * 50, "cluster": [3, 0] * 50}
    if what == "no path":
        columns["name"] = columns.pop("path")
    elif what == "numbers as paths":
        columns["path"] = columns["cluster"]
    elif what == "text as clusters":
        columns["cluster"] = columns["path"]
    pq.write_table(pa.table(columns), path)
    if what in ("missing", "folder"):
        path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("path,cluster\n")
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(OdcftError, match=r"is not the clusters\.parquet of a run"):
        clusters_parquet.read_clusters(path)
