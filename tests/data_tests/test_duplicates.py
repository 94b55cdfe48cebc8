"""Files with the same bytes are found."""

import os

from odcft.data.duplicates import identical_files
from odcft.data.sources import find_images


def test_images_with_the_same_bytes_are_found(tmp_path, make_images):
    make_images(tmp_path, 6)
    (tmp_path / "a" / "003.png").write_bytes((tmp_path / "a" / "000.png").read_bytes())
    (tmp_path / "b" / "copy.png").write_bytes((tmp_path / "b" / "005.png").read_bytes())
    (tmp_path / "z.png").symlink_to(tmp_path / "a" / "000.png")
    for name in ("x.png", "y.png"):  # same size, different bytes
        (tmp_path / name).write_bytes(os.urandom((tmp_path / "a" / "000.png").stat().st_size))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    images = find_images(tmp_path)
    groups = [[images.names[i] for i in rows] for rows in identical_files(images)]
    assert groups == [["a/000.png", "a/003.png", "z.png"], ["b/005.png", "b/copy.png"]]
