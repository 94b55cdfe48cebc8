"""Tables of images, and which files they may replace."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

from odcft.data.names import Names
from odcft.errors import OdcftError
from odcft.reports.tables import columns_of, refuse_table, write_rows

PATHS = Names(["a,b.png", "ко\nт.png", "bytes\udcff.png"])


def test_both_formats_hold_the_same_and_paths_keep_their_bytes(tmp_path):
    numbers = {"group": np.array([1, 1, 2])}, {"similarity": np.array([1, 0.98765432, 0.5], np.float32)}
    for name in ("t.csv", "new/t.parquet"):
        write_rows(tmp_path / name, PATHS, *numbers)
        assert columns_of(tmp_path / name) == ["group", "path", "similarity"]
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert [row[1] for row in rows[1:]] == list(PATHS)
    assert rows[2] == ["1", "ко\nт.png", "0.9876543"]
    table = pq.read_table(tmp_path / "new" / "t.parquet").to_pydict()
    assert table["path"] == ["a,b.png", "ко\nт.png", "bytes\\xff.png"]
    assert table["similarity"] == pytest.approx([1, 0.98765432, 0.5])
    write_rows(tmp_path / "empty.parquet", [], {"group": np.array([], np.int64)}, {})
    assert pq.read_table(tmp_path / "empty.parquet").num_rows == 0


def test_only_such_a_table_is_replaced(tmp_path):
    columns, out = ("path", "cluster"), tmp_path / "t.csv"
    refuse_table(out, columns, False)
    assert list(tmp_path.iterdir()) == []
    out.write_text("path,cluster\na,1\n")
    with pytest.raises(OdcftError, match="exists"):
        refuse_table(out, columns, False)
    refuse_table(out, columns, True)
    for text in ("", "path,cluster,mine\n", "path\n", "\0" * 9):
        out.write_text(text)
        with pytest.raises(OdcftError, match="will not touch it"):
            refuse_table(out, columns, True)
    out.rename(tmp_path / "t.parquet")
    with pytest.raises(OdcftError, match="will not touch it"):
        refuse_table(tmp_path / "t.parquet", columns, True)
    with pytest.raises(OdcftError, match=r"end the name with \.csv or \.parquet"):
        refuse_table(tmp_path / "t.xlsx", columns, True)
    (tmp_path / "link.csv").symlink_to("/nowhere")
    with pytest.raises(OdcftError, match="will not touch it"):
        refuse_table(tmp_path / "link.csv", columns, True)
