"""Which endings are images, and what is said about those whose package is missing."""

import pytest

from odcft.data import image_files
from odcft.data.sources import find_images


def test_every_ending_is_read_or_says_what_reads_it(tmp_path, monkeypatch):
    for ending in (".jfif", ".j2k", ".pbm", ".mpo", ".tif"):
        assert ending in image_files.ENDINGS
    for ending in image_files.OPTIONAL:
        assert (ending in image_files.ENDINGS) != (ending in image_files.MISSING)
    endings = tuple(ending for ending in image_files.ENDINGS if ending not in image_files.OPTIONAL)
    monkeypatch.setattr("odcft.data.sources.ENDINGS", endings)
    missing = {ending: extra for ending, (_, extra) in image_files.OPTIONAL.items()}
    monkeypatch.setattr(image_files, "MISSING", missing)
    for name in ("a.jfif", "b.HEIC", "c.dcm", "d.dcm"):
        (tmp_path / name).touch()
    images = find_images(tmp_path)
    assert images.names == ["a.jfif"]
    assert images.skipped_summary() == (
        '2 .dcm (pip install "odcft[dicom]" reads them), 1 .heic (pip install "odcft[heic]" reads them)'
    )


@pytest.mark.parametrize(("name", "counted"), [("a.XML", ".xml"), ("README", "file without an extension")])
def test_other_files_are_counted_by_their_ending(name, counted):
    assert image_files.skipped_ending(name) == counted
