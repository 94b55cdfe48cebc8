"""Two runs compared: which images keep their cluster mates, by hand."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odcft.errors import OdcftError
from odcft.progress import Progress
from odcft.reports.two_runs import compare_runs, mates_kept

QUIET = {"progress": Progress(quiet=True)}


def test_mates_kept_is_the_share_of_cluster_mates_that_are_the_same():
    import numpy as np

    # One clustering {a b c}{d}{e f}, the other {a b}{c d}{e f}: a had b, c and has b; c had a, b and has d.
    kept = mates_kept(np.array([0, 0, 0, 1, 2, 2]), np.array([5, 5, 3, 3, 4, 4]))
    assert kept.tolist() == [0.5, 0.5, 0.0, 0.0, 1.0, 1.0]
    assert mates_kept(np.array([1, 2]), np.array([7, 9])).tolist() == [1.0, 1.0]  # alone in both


def test_a_page_compares_two_runs(odcft_command, make_run, tmp_path):
    one, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    names = [f"{i:03d}.png" for i in range(24)]
    moved = [0 if i == 1 else i % 3 for i in range(24)]
    pq.write_table(pa.table({"path": names, "cluster": moved, "distance": [0.5] * 24}), other / "clusters.parquet")
    code, out, err = odcft_command("report", one, other, "--out", tmp_path / "both.html", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["images"] == 24
    # Eight had image 0's cluster, now nine: 7 of 8 mates. Image 1 has none of 7 + 8. Its old cluster: 6 of 7.
    assert values["kept"] == pytest.approx((8 * 7 / 8 + 0 + 7 * 6 / 7 + 8) / 24)
    text = (tmp_path / "both.html").read_text()
    assert "Two runs compared" in text
    assert "same mates" in text
    assert "Same mates  88% of" in err or "Same mates  87% of" in err


def test_runs_without_common_images_share_curves_only(make_run, tmp_path):
    one, other = make_run(tmp_path / "a", ["x.png", "y.png"], 2), make_run(tmp_path / "b", ["z.png", "w.png"], 2)
    values = compare_runs(one, other, tmp_path / "both.html", **QUIET)
    assert values["images"] == 0
    assert "no image in common" in values["notes"][0]
    with pytest.raises(OdcftError, match="are the same run"):
        compare_runs(one, one, tmp_path / "same.html", **QUIET)
