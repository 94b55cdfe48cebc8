"""TIFFs that Pillow would not read in full, against arrays worked out by hand."""

import io

import numpy as np
import pytest
from image_files import write_tiff

from odcft.data.image_decoding import image_size, read_high_depth, read_image
from odcft.errors import OdcftError

DRAW = np.random.default_rng(3)
RGB = DRAW.integers(0, 4096, (33, 47, 3)).astype(np.uint16)
FIVE = DRAW.integers(0, 256, (33, 47, 5)).astype(np.uint8)


def tiff(tmp_path, array, *args, **how):
    write_tiff(tmp_path / "x.tif", array, *args, **how)
    return (tmp_path / "x.tif").read_bytes()


def shown(data, *args):
    return np.array(read_image(data, *args)).astype(int)


@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_rgb_of_every_type_in_planes_and_by_pixel(tmp_path, dtype, order):
    expected = np.round(RGB / 4095 * 255)
    for planar in (1, 2):
        data = tiff(tmp_path, RGB.astype(dtype), planar=planar, order=order)
        assert np.abs(shown(data, (0, 4095)) - expected).max() <= 1
        assert image_size(data) == (47, 33)


@pytest.mark.parametrize(
    ("dtype", "order"), [("f8", "<"), ("f8", ">"), ("u4", ">"), ("u8", "<"), ("i8", "<"), ("f2", "<")]
)
def test_gray_of_64_bits_and_what_else_pillow_lacks(tmp_path, dtype, order):
    gray = (np.linspace(0, 1, 63) if dtype[0] == "f" else np.arange(63) * 40).reshape(7, 9).astype(dtype)
    high = 1 if dtype[0] == "f" else 62 * 40
    data = tiff(tmp_path, gray, order=order)
    assert np.abs(shown(data, (0, high))[..., 1] - gray.astype(float) / high * 255).max() <= 0.51
    inverted = tiff(tmp_path, gray, 0, order=order)
    assert np.abs(shown(inverted, (0, high)) + shown(data, (0, high)) - 255).max() <= 1


def test_the_limits_are_those_of_the_type(tmp_path):
    for dtype, limits in {"u8": (0, 2.0**64 - 1), "i8": (-(2.0**63), 2.0**63 - 1), "f8": (0, 1)}.items():
        assert read_high_depth(tiff(tmp_path, RGB[..., 0].astype(dtype))).limits == limits


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, orientation):
    upright = RGB.astype(np.float32) / 4095
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    stored |= {5: np.swapaxes(upright, 0, 1), 6: np.rot90(upright), 8: np.rot90(upright, -1)}
    stored[7] = np.swapaxes(upright[::-1, ::-1], 0, 1)
    data = tiff(tmp_path, np.ascontiguousarray(stored[orientation]), tags={274: [orientation]}.items())
    assert np.array_equal(shown(data), np.round(upright * 255))


def test_alpha_is_laid_on_white_and_other_fourth_bands_are_left_out(tmp_path):
    values = np.concatenate([RGB, RGB[..., :1] * 16], 2)
    opaque = values[..., 3:] / 65535
    for extra, expected in (
        ([2], RGB / 4095 * 255 * opaque + 255 * (1 - opaque)),
        ([0], RGB / 4095 * 255),
        (None, RGB / 4095 * 255),
    ):
        data = tiff(tmp_path, values, extra=extra, planar=2)
        assert np.abs(shown(data, (0, 4095)) - expected).max() <= 1
    gray_alpha = np.stack([RGB[..., 0], np.full(RGB.shape[:2], 65535)], 2).astype(np.uint16)
    data = tiff(tmp_path, gray_alpha, 1, [2], planar=2)
    assert np.abs(shown(data, (0, 4095))[..., 0] - RGB[..., 0] / 4095 * 255).max() <= 1


def test_cmyk_of_16_bits_is_ink_on_white(tmp_path):
    ink = DRAW.integers(0, 65536, (6, 7, 4)).astype(np.uint16)
    paper = 1 - ink / 65535
    expected = paper[..., :3] * paper[..., 3:] * 255
    assert np.abs(shown(tiff(tmp_path, ink, 5, planar=2)) - expected).max() <= 1
    none = tiff(tmp_path, np.zeros((2, 2, 4), np.uint16), 5, planar=2)
    assert (shown(none) == 255).all()


def test_bands_are_read_as_they_are_only_if_the_network_takes_as_many(tmp_path):
    for planar in (1, 2):
        data = tiff(tmp_path, FIVE, 1, [0] * 4, planar=planar)
        assert np.array_equal(shown(data, None, 5), FIVE)
        assert read_high_depth(data, 5) is None  # 8 bits
        with pytest.raises(OdcftError, match=r"a TIFF of 5 bands of 8 bits .*; the network takes 4"):
            read_image(data, None, 4)
    data = tiff(tmp_path, FIVE[..., :2], 1, [0])
    assert np.array_equal(shown(data, None, 2), FIVE[..., :2])
    data = tiff(tmp_path, np.concatenate([RGB, RGB], 2), 1, [0] * 5, order=">")
    assert np.abs(shown(data, (0, 4095), 6) - np.concatenate([RGB, RGB], 2) / 4095 * 255).max() <= 1
    with pytest.raises(OdcftError, match="not a TIFF; images of 5 bands are read from TIFFs, or by your own function"):
        read_image(b"\x89PNG", None, 5)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "zstd", "lzma", "packbits"])
@pytest.mark.parametrize("how", [{}, {"tile": (16, 32)}, {"predictor": True}, {"bigtiff": True}])
def test_compressed_and_tiled_bands(compression, how):
    pytest.importorskip("imagecodecs")
    tifffile = pytest.importorskip("tifffile")
    if "predictor" in how and compression == "packbits":
        pytest.skip("packbits has no predictor")
    file = io.BytesIO()
    tifffile.imwrite(file, FIVE.astype(np.uint16) * 16, photometric="minisblack", planarconfig="contig",
                     compression=compression, **how)  # fmt: skip
    assert np.abs(shown(file.getvalue(), (0, 4080), 5) - FIVE).max() <= 1


def test_the_first_page_of_many_is_read():
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.stack([np.full((8, 9, 3), value) for value in (0.25, 0.5, 1)]), photometric="rgb")
    assert (shown(file.getvalue()) == 64).all()


def test_what_is_not_read_is_named(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")

    def written(array, **how):
        file = io.BytesIO()
        tifffile.imwrite(file, array, **how)
        return file.getvalue()

    cases = {
        r"a TIFF of 1 band of 64 bits \(complex\)": written(np.zeros((4, 5), np.complex64)),
        r"a TIFF of a volume, 3 layers deep": written(
            np.zeros((3, 32, 32), np.float64), volumetric=True, tile=(1, 16, 16), photometric="minisblack"
        ),
        r"a TIFF compressed as LERC": written(np.zeros((8, 8), np.float64), compression="lerc"),
        r"a TIFF of 3 bands of 16 bits \(Lab": written(RGB, photometric="cielab"),
    }
    for words, data in cases.items():
        with pytest.raises(OdcftError, match=words):
            read_image(data)
    data = written(RGB.astype(np.float32), compression="zlib", photometric="rgb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        OdcftError, match=r'3 bands of 32 bits .*compressed as ADOBE_DEFLATE: .*pip install "odcft\[tiff\]"'
    ):
        read_image(data)
