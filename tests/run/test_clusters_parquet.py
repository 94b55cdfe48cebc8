"""A missing pyarrow, which clusters.parquet needs, is reported before a run begins."""

import sys

import pytest

from odcft.errors import OdcftError
from odcft.run import clusters_parquet


def test_without_pyarrow_no_run_begins(monkeypatch):
    clusters_parquet.require_parquet()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OdcftError, match=r"clusters.parquet needs pyarrow .*: pip install pyarrow"):
        clusters_parquet.require_parquet()
