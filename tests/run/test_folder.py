"""The lists of images in a RUN or a memory folder."""

import csv

from odcft import files
from odcft.data.images import Images
from odcft.run.folder import write_image_lists


def test_image_lists(tmp_path):
    write_image_lists(Images(tmp_path, tmp_path, ["a,b", "c\udcff"]), {}, tmp_path)
    assert not (tmp_path / "quarantine.csv").exists()
    assert files.read_column(tmp_path / "images.csv", "path") == ["a,b", "c\udcff"]
    assert files.read_column(tmp_path / "images.csv", "row") == ["0", "1"]
    write_image_lists(Images(tmp_path, tmp_path, []), {"d": "why"}, tmp_path)
    with (tmp_path / "quarantine.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"path": "d", "reason": "why"}]
