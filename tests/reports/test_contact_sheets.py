"""Contact sheets: thumbnails in their places, captions that fit, images that cannot be read."""

import numpy as np
from PIL import Image

from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.reports.contact_sheets import GAP, MISSING, PAPER, Cell, Row, draw_sheet, pages, thumbnails

VIEW = View(32)


def test_a_thumbnail_shows_the_whole_image_whatever_its_shape(tmp_path):
    Image.new("RGB", (300, 100), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (4, 8), 0).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    found = thumbnails(find_images(tmp_path), [0, 1, 2, 0], VIEW, 48, threads=2)
    assert sorted(found) == [0, 1]
    wide = np.array(found[0])
    assert wide.shape == (48, 48, 3)
    assert (wide[16:32] == (255, 0, 0)).all()
    assert (wide[:15] == PAPER).all()
    assert (np.array(found[1])[:, 12:36] == 0).all()


def test_after_the_time_no_more_images_are_read(tmp_path, make_images):
    assert thumbnails(find_images(make_images(tmp_path / "i")), range(12), VIEW, seconds=1e-9) == {}


def test_cells_are_where_they_belong_and_captions_stay_inside():
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    rows = [Row("first " * 100, [Cell(red, "кот 猫 \udcff " * 20), Cell(None)]), Row("", [Cell(blue)])]
    sheet = np.array(draw_sheet("title " * 100, rows, 2, 20))
    assert sheet.shape[1] == GAP + 2 * (20 + GAP)
    assert (sheet[:, -GAP:] == PAPER).all()
    lines = [np.flatnonzero((sheet == colour).all(2).any(1)) for colour in ((255, 0, 0), (0, 0, 255))]
    assert [len(line) for line in lines] == [20, 20]
    assert lines[0][-1] < lines[1][0]
    assert (sheet[lines[0][0], GAP + 20 + GAP] == MISSING).all()


def test_pages_hold_all_cells_in_order():
    cells = [Cell(None, str(n)) for n in range(11)]
    found = pages(cells, 3, 2)
    assert [[cell.caption for row in page for cell in row.cells] for page in found] == [
        [str(n) for n in range(6)],
        [str(n) for n in range(6, 11)],
    ]
