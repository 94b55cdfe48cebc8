"""What a file holds is what the network sees: bits, bands, transparency, which way is up."""

import json
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from odcft.backbone.load import load_backbone
from odcft.data.batches import Crops
from odcft.data.image_decoding import read_deep, read_image
from odcft.data.intensity_range import own_range
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.first_memory import init_memory
from odcft.plan import view_for_evaluation
from odcft.pretexts.training import train_pretext
from odcft.recipe import load_recipe
from odcft.train import fine_tune

DRAW = np.random.default_rng(0)
RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = DRAW.integers(0, 256, (8, 12, 3)).astype(np.uint8)


def pixels(path, *intensity):
    return np.array(read_image(str(path), *intensity))


def write_tiff(path, array, photometric=None, extra=None, planar=1, order="<", tags=()):
    """An uncompressed TIFF of any type and number of bands (Pillow writes few of them)."""
    array = array if array.ndim == 3 else array[..., None]
    height, width, bands = array.shape
    kind, bits = {"u": 1, "i": 2, "f": 3}[array.dtype.kind], 8 * array.dtype.itemsize
    photometric = photometric if photometric is not None else 2 if bands >= 3 else 1
    swapped = array.astype(array.dtype.newbyteorder(order))
    data = (np.moveaxis(swapped, 2, 0) if planar == 2 else swapped).tobytes()
    parts = bands if planar == 2 else 1
    entries = {256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric], 277: [bands]}
    entries |= {278: [height], 279: [len(data) // parts] * parts, 284: [planar], 339: [kind] * bands, **dict(tags)}
    entries |= {338: extra} if extra is not None else {}
    long = lambda tag: tag in (273, 279)  # noqa: E731
    entries[273] = [0] * parts
    end = 8 + 2 + 12 * len(entries) + 4
    beyond = sum(len(v) * (4 if long(t) else 2) for t, v in entries.items() if len(v) * (4 if long(t) else 2) > 4)
    entries[273] = [end + beyond + part * (len(data) // parts) for part in range(parts)]
    head, tail = struct.pack(f"{order}H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(values)}{'I' if long(tag) else 'H'}", *values)
        head += struct.pack(f"{order}HHI", tag, 4 if long(tag) else 3, len(values))
        head += struct.pack(f"{order}I", end + len(tail)) if len(raw) > 4 else raw.ljust(4, b"\0")
        tail += raw if len(raw) > 4 else b""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    path.write_bytes(start + head + b"\0\0\0\0" + tail + data)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, array, *chunks):
    """A PNG of 16 bits a channel: gray, gray and alpha, RGB, RGB and alpha; with other chunks before the pixels."""
    array = array if array.ndim == 3 else array[..., None]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    rest = [png_chunk(*chunk) for chunk in chunks]
    parts = [png_chunk(b"IHDR", header), *rest, png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


# ---------------------------------------------------------------- 8 bits


KINDS = {"png": "1 L P RGB", "bmp": "1 L P RGB", "gif": "1 L P", "tif": "1 L P RGB YCbCr CMYK", "ppm": "1 L RGB"}
KINDS |= {"webp": "RGB", "jp2": "L RGB", "jpg": "L RGB CMYK"}


@pytest.mark.parametrize(("ending", "mode"), [(e, mode) for e, modes in KINDS.items() for mode in modes.split()])
def test_every_format_and_mode_of_8_bits_is_its_own_colours(tmp_path, ending, mode):
    square = np.kron(DRAW.integers(0, 2, (2, 2, 3)) * 255, np.ones((16, 16, 1))).astype(np.uint8)
    image = Image.fromarray(square).convert(mode)
    expected = np.array(image.convert("RGB")).astype(int)
    image.save(tmp_path / f"x.{ending}", **({"lossless": True} if ending == "webp" else {}))
    difference = np.abs(pixels(tmp_path / f"x.{ending}") - expected)
    assert np.median(difference) <= (4 if ending == "jpg" else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_shown_upright_as_their_exif_says(tmp_path, ending, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16], upright[:16, 32:] = (255, 0, 0), (0, 0, 255)
    turned = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    turned |= {5: np.swapaxes(upright, 0, 1), 6: np.rot90(upright), 8: np.rot90(upright, -1)}
    turned[7] = np.swapaxes(upright[::-1, ::-1], 0, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"lossless": True} if ending == "webp" else {"quality": 95} if ending == "jpg" else {}
    Image.fromarray(np.ascontiguousarray(turned[orientation])).save(tmp_path / f"x.{ending}", exif=exif, **more)
    shown = pixels(tmp_path / f"x.{ending}")
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 2


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4"])
def test_uncompressed_gray_tiffs_are_shown_upright(tmp_path, dtype):
    """Pillow 13.0 maps such a file with the sides of the turned image."""
    values = DRAW.integers(0, 256, (40, 60)).astype(dtype)
    write_tiff(tmp_path / "x.tif", values, tags={274: [6]}.items())
    assert np.array_equal(pixels(tmp_path / "x.tif", (0, 255))[..., 0], np.rot90(values, -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0nonsense", b"Exif\0\0"])
def test_damaged_exif_leaves_the_pixels_as_they_are(tmp_path, exif):
    Image.fromarray(COLOURS).save(tmp_path / "x.jpg", exif=exif)
    Image.fromarray(COLOURS).save(tmp_path / "y.jpg")
    assert np.array_equal(pixels(tmp_path / "x.jpg"), pixels(tmp_path / "y.jpg"))


def test_deep_images_are_shown_upright_too(tmp_path):
    gray = DRAW.integers(0, 65536, (4, 6)).astype(np.uint16)
    for order in "<>":
        write_tiff(tmp_path / "x.tif", gray, order=order, tags={274: [6]}.items())
        assert np.array_equal(pixels(tmp_path / "x.tif")[..., 0], np.rot90(gray / 257, -1).round())
    write_png(tmp_path / "x.png", gray, (b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"))
    assert np.array_equal(pixels(tmp_path / "x.png")[..., 0], np.rot90(gray / 257, -1).round())


@pytest.mark.parametrize(
    "name", ["x.png", "x.webp", "x.tif", "la.png", "la.tif", "p.png", "p.gif", "key.png", "pa.png"]
)
def test_transparent_pixels_are_white_whatever_colour_is_hidden_in_them(tmp_path, name):
    hidden = np.zeros((8, 8, 4), np.uint8)  # black, all of it transparent but for the left half
    hidden[:, :4] = (200, 0, 0, 255)
    expected = np.full((8, 8, 3), 255)
    expected[:, :4] = (200, 0, 0)
    image = Image.fromarray(hidden)
    more = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    if name.startswith("la"):
        image = image.convert("LA")
        expected[:, :4] = 60
    elif name in ("p.png", "p.gif"):
        image = Image.fromarray(np.where(np.arange(8) < 4, 1, 0).astype(np.uint8)[None].repeat(8, 0), "P")
        image.putpalette([0, 0, 0, 200, 0, 0])
        more = {"transparency": 0}
    elif name == "pa.png":
        image = Image.fromarray(np.where(np.arange(8) < 4, 1, 0).astype(np.uint8)[None].repeat(8, 0), "P")
        image.putpalette([0, 0, 0, 200, 0, 0])
        more = {"transparency": b"\0\xff"}
    elif name == "key.png":
        image, more = image.convert("RGB"), {"transparency": (0, 0, 0)}
    image.save(tmp_path / name, **more)
    assert np.abs(pixels(tmp_path / name) - expected).max() <= 1


def test_half_transparent_is_half_white_and_opaque_as_it_is(tmp_path):
    rgba = np.dstack([COLOURS, np.full(COLOURS.shape[:2], 128, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "half.png")
    assert np.abs(pixels(tmp_path / "half.png") - (COLOURS * 0.502 + 255 * 0.498)).max() <= 1
    Image.fromarray(np.dstack([COLOURS, np.full(COLOURS.shape[:2], 255, np.uint8)])).save(tmp_path / "opaque.png")
    assert np.array_equal(pixels(tmp_path / "opaque.png"), COLOURS)


def test_of_an_animation_the_first_frame_is_seen(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for ending in ("gif", "png", "webp", "tif"):
        more = {"lossless": True} if ending == "webp" else {}
        frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **more)
        assert pixels(tmp_path / f"x.{ending}")[4, 4].tolist() == [255, 0, 0]


# ---------------------------------------------------------------- more than 8 bits


@pytest.mark.parametrize(
    ("order", "dtype", "photometric"),
    [("<", dtype, 1) for dtype in ("u2", "i2", "u4", "i4", "f4")]
    + [(">", dtype, 1) for dtype in ("u2", "i2", "i4", "f4")]
    + [("<", "u2", 0), ("<", "f4", 0), (">", "f4", 0)],  # white is zero; Pillow turns round those of 8 bits only
)
def test_deep_gray_tiffs_are_scaled_from_black_to_white(tmp_path, order, dtype, photometric):
    low, high = {"u2": (300, 4000), "i2": (-2000, 1000), "u4": (3e9, 4e9), "i4": (-5, 70_000), "f4": (-0.25, 7.5)}[
        dtype
    ]
    values = (low + RAMP / 255 * (high - low)).astype(dtype)
    write_tiff(tmp_path / "x.tif", values, photometric, order=order)
    shown = pixels(tmp_path / "x.tif", (low, high))
    expected = RAMP if photometric else 255 - RAMP
    assert np.abs(shown - expected[..., None].astype(int)).max() <= 1
    twice = pixels(tmp_path / "x.tif", (low + (high - low) / 2, high))[..., 0]  # what is beyond is clipped
    assert (twice[RAMP < 127] == (0 if photometric else 255)).all()


def test_every_16_bit_mode_of_pillow_is_read_and_saved_in_full(tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for mode in ("I;16", "I;16B", "I;16L"):
        image = Image.frombytes(mode, (8, 8), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        for ending in ("tif", "png"):
            if (mode, ending) != ("I;16L", "png"):
                image.save(tmp_path / f"x.{ending}")
                assert np.array_equal(pixels(tmp_path / f"x.{ending}")[..., 0], (values / 257).round())
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "x.pgm")
    assert np.array_equal(pixels(tmp_path / "x.pgm")[..., 0], (values / 257).round())
    Image.fromarray(values).save(tmp_path / "x.jp2", irreversible=False)
    assert np.abs(pixels(tmp_path / "x.jp2")[..., 0] - (values / 257)).max() <= 1


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_deep_pngs_keep_all_bits_of_all_bands(tmp_path, bands):
    """Pillow itself keeps the upper byte of colours: of 12 bits, 16 levels."""
    values = DRAW.integers(0, 4096, (300, 300, bands)).astype(np.uint16)
    opaque = values[..., -1:] / 65535 if bands in (2, 4) else 1
    colours = values[..., : 1 if bands < 3 else 3]
    write_png(tmp_path / "x.png", values)
    expected = colours / 4095 * 255 * opaque + 255 * (1 - opaque)
    assert np.abs(pixels(tmp_path / "x.png", (0, 4095)) - expected).max() <= 1
    if bands == 3:
        write_png(tmp_path / "x.png", values, (b"tRNS", values[0, 0].astype(">u2").tobytes()))
        expected[(values == values[0, 0]).all(2)] = 255
        assert np.abs(pixels(tmp_path / "x.png", (0, 4095)) - expected).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_deep_colour_tiffs_keep_all_bits_and_a_fourth_band_is_alpha_only_if_it_says_so(tmp_path, order):
    values = DRAW.integers(0, 4096, (6, 7, 4)).astype(np.uint16)
    expected = values[..., :3] / 4095 * 255
    for extra in (None, [0], [2]):
        write_tiff(tmp_path / "x.tif", values, extra=extra, order=order)
        opaque = values[..., 3:] / 65535 if extra == [2] else 1
        assert np.abs(pixels(tmp_path / "x.tif", (0, 4095)) - (expected * opaque + 255 * (1 - opaque))).max() <= 1
    bytes_ = (values >> 4).astype(np.uint8)
    for extra in (None, [0], [2]):
        write_tiff(tmp_path / "x.tif", bytes_, extra=extra, order=order)
        opaque = bytes_[..., 3:] / 255 if extra == [2] else 1
        assert np.abs(pixels(tmp_path / "x.tif") - (bytes_[..., :3] * opaque + 255 * (1 - opaque))).max() <= 1


def test_compressed_deep_tiffs_keep_all_bits(tmp_path):
    values = DRAW.integers(0, 4096, (70, 80)).astype(np.uint16)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        Image.fromarray(values).save(tmp_path / "x.tif", compression=compression)
        assert np.abs(pixels(tmp_path / "x.tif", (0, 4095))[..., 0] - values / 4095 * 255).max() <= 1
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tif", compression=compression)
        assert np.abs(pixels(tmp_path / "x.tif", (0, 4095))[..., 0] - values / 4095 * 255).max() <= 1


def test_signed_bytes_are_no_unsigned_ones(tmp_path):
    write_tiff(tmp_path / "x.tif", (RAMP.astype(int) - 128).astype(np.int8))
    assert np.array_equal(pixels(tmp_path / "x.tif")[..., 0], RAMP)


def test_what_is_no_number_is_black_and_infinity_white(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, :3] = np.nan, np.inf, -np.inf
    write_tiff(tmp_path / "x.tif", values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "x.tif")[0, :3, 0].tolist() == [0, 255, 0]
        assert np.abs(pixels(tmp_path / "x.tif")[1:, :, 0] - values[1:] * 255).max() <= 1


U8 = DRAW.integers(0, 256, (4, 5, 7)).astype(np.uint8)


@pytest.mark.parametrize(
    ("array", "how", "words"),
    [
        (U8[..., :2], {"extra": [0]}, "2 bands of 8 bits .gray and 1 besides"),
        (U8[..., :2], {}, "2 bands"),
        (U8[..., :5], {"extra": [0, 0]}, "5 bands of 8 bits .RGB and 2 besides"),
        (U8[..., :5], {"photometric": 1, "extra": [0] * 4}, "5 bands"),
        (U8[..., :5], {"photometric": 1, "extra": [0] * 4, "planar": 2}, "5 bands .*, one after the other"),
        (U8, {"extra": [0] * 4}, "7 bands"),
        (U8[..., :5].astype(np.uint16), {"photometric": 1, "extra": [0] * 4, "order": ">"}, "5 bands of 16 bits"),
        (U8[..., 0].astype(np.float64), {}, "1 band of 64 bits .floating point"),
        (U8[..., 0].astype(np.uint32), {"order": ">"}, "1 band of 32 bits"),
        (U8[..., :3].astype(np.float32), {}, "3 bands of 32 bits .floating point"),
        (U8[..., :3].astype(np.uint16), {"planar": 2}, "3 bands of 16 bits .*, one after the other"),
        (U8[..., :3], {"photometric": 1, "extra": [0, 0]}, "3 bands of 8 bits .gray and 2 besides"),
    ],
)
def test_other_bands_are_refused_by_name_and_not_left_out(tmp_path, array, how, words, capfd):
    write_tiff(tmp_path / "x.tif", array, **how)
    with pytest.raises(OdcftError, match=f"^a TIFF of {words}.*; odcft reads 1 .gray"):
        read_image(str(tmp_path / "x.tif"))
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- files that are not what they should be


def broken_files(folder):
    """Files that end early, lie about their size, or swell."""
    whole = Image.fromarray(DRAW.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    for ending in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm", "jp2"):
        whole.save(folder / f"cut.{ending}")
        data = (folder / f"cut.{ending}").read_bytes()
        (folder / f"cut.{ending}").write_bytes(data[: len(data) // 2])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        whole.save(folder / f"{compression}.tif", compression=compression)
        data = (folder / f"{compression}.tif").read_bytes()
        (folder / f"{compression}.tif").write_bytes(data[:8] + b"\xff" * 200 + data[208:])
    side = struct.pack(">II", 1 << 30, 1 << 30)
    pixels_ = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    start = b"\x89PNG\r\n\x1a\n"
    (folder / "huge.png").write_bytes(start + png_chunk(b"IHDR", side + b"\x08\2\0\0\0") + pixels_)
    large = struct.pack(">II", 10_000, 10_000)  # where Pillow itself would warn and go on
    (folder / "large.png").write_bytes(start + png_chunk(b"IHDR", large + b"\x08\2\0\0\0") + pixels_)
    (folder / "huge.ppm").write_bytes(b"P6 40000 40000 255\n" + bytes(100))
    (folder / "huge.bmp").write_bytes(
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, *[0] * 6)
    )
    (folder / "huge.gif").write_bytes(b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0;")
    write_tiff(folder / "huge.tif", np.zeros((4, 4), np.uint8), tags={256: [60_000], 257: [60_000]}.items())
    small = png_chunk(b"IHDR", struct.pack(">II", 8, 8) + b"\x08\0\0\0\0")
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        head = b"x\0\0" if kind != b"iTXt" else b"x\0\1\0\0\0"
        text = png_chunk(kind, head + zlib.compress(bytes(1 << 27)))
        rest = png_chunk(b"IDAT", zlib.compress(bytes(72))) + png_chunk(b"IEND", b"")
        (folder / f"{kind.decode()}.png").write_bytes(start + small + text + rest)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


def test_broken_files_are_told_without_memory_warnings_or_noise(tmp_path):
    broken_files(tmp_path)
    code = """
import resource, sys
from odcft.data.batches import Crops
from odcft.data.intensity_range import own_range, usual_side
from odcft.data.sources import find_images
from odcft.data.view import View
images = find_images(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
usual_side(images), own_range(images)
crops = Crops(images, View(8))
for i in range(len(images)):
    print(images.names[i], "read" if not isinstance(crops[0, i][0], str) else crops[0, i][0])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=100)
    *lines, megabytes = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert int(megabytes) < 300
    told = dict(line.split(" ", 1) for line in lines)
    assert len(told) == len(find_images(tmp_path))
    read = {name for name, how in told.items() if how == "read"}
    assert read <= {"iCCP.png", "zTXt.png", "iTXt.png", "huge.gif"}, told
    assert told["large.png"] == "10,000 x 10,000 pixels are more than Pillow's 89,478,485"
    assert "DecompressionBombError" in told["huge.png"]
    assert "not an image of a format" in told["program.jpg"]


# ---------------------------------------------------------------- the range of a set


def twelve_bits(folder, count=24, depth=np.uint16, low=0, high=4095):
    """Images of two kinds whose values run from low to high."""
    for i in range(count):
        kind, draw = "ab"[i % 2], np.random.default_rng(i)
        base = draw.random((4, 4)) if kind == "a" else draw.random((1, 4)).repeat(4, 0)
        shape = Image.fromarray(base.astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
        values = np.asarray(shape).clip(0, 1)
        values = (low + (values - values.min()) / np.ptp(values) * (high - low)).astype(depth)
        path = folder / kind / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if depth == np.uint16:
            Image.fromarray(values).save(path)
        else:
            write_tiff(path.with_suffix(".tif"), values)
    return folder


def test_a_set_of_12_bits_is_scaled_by_its_own_range_and_said_so(tmp_path):
    images = find_images(twelve_bits(tmp_path, low=100))
    (low, high), words = own_range(images)
    assert 100 <= low < 120
    assert 4000 < high <= 4095
    assert words.startswith("24 images of 16 bits use 6.1 % of their range: scaled by the set's own, 10")
    shown = np.array(read_image(images.path(0), (low, high)))
    assert len(np.unique(shown)) > 150
    assert len(np.unique(read_image(images.path(0)))) < 18  # what it was


@pytest.mark.parametrize(
    ("depth", "low", "high", "own"),
    [
        (np.uint16, 0, 65535, False),
        (np.uint16, 20_000, 60_000, False),
        (np.uint16, 0, 32_767, True),
        (np.int16, -1024, 3071, True),
        (np.int32, -10, 90_000, True),
        (np.uint32, 3e9, 3.1e9, True),
        (np.float32, 0, 1, False),
        (np.float32, 0.2, 0.9, False),
        (np.float32, 0.001, 0.1, True),
        (np.float32, 0, 255, True),
        (np.float32, -3, 3, True),
        (np.float32, 7, 7, False),
    ],
)
def test_the_sets_own_range_is_taken_where_it_is_less_than_half_of_the_types(tmp_path, depth, low, high, own):
    images = find_images(twelve_bits(tmp_path, 6, depth, low, high))
    found, words = own_range(images)
    full = {"u": 65535, "f": 1}.get(np.dtype(depth).kind)
    assert bool(words) == own
    if own:
        assert low <= found[0] < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < found[1] <= high + 1e-6
    else:
        assert found == (0, full)
    assert own_range(images, full=True) == (read_deep(images.path(0)).full, "")


def test_hot_pixels_and_a_frame_gone_wrong_do_not_take_the_range(tmp_path):
    twelve_bits(tmp_path, 60)
    images = find_images(tmp_path)
    before = own_range(images)[0]
    for i in range(60):
        values = np.array(Image.open(images.path(i)))
        values[3, i % 32] = 65535 if i % 3 else 0
        Image.fromarray(values).save(images.path(i))
    Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(images.path(7))
    assert own_range(images)[0] == pytest.approx(before, abs=60)


def test_what_is_no_number_does_not_take_the_range(tmp_path):
    twelve_bits(tmp_path, 6, np.float32, 5, 10)
    for i, path in enumerate(sorted(tmp_path.rglob("*.tif"))):
        values = np.array(Image.open(path))
        values[:4], values[5:9] = np.nan, (np.inf, -np.inf)[i % 2]
        write_tiff(path, values if i else np.full((9, 9), np.nan, np.float32))
    low, high = own_range(find_images(tmp_path))[0]
    assert 5 <= low < 5.2
    assert 9.8 < high <= 10


def test_images_of_8_bits_have_no_range_and_broken_ones_are_left_to_their_turn(tmp_path, make_images):
    images = find_images(make_images(tmp_path, 6))
    (tmp_path / "a" / "000.png").write_text("broken")
    assert own_range(images) == (None, "")
    twelve_bits(tmp_path / "deep", 2)
    Image.fromarray(COLOURS).save(tmp_path / "deep" / "x.png")
    found, words = own_range(find_images(tmp_path))
    assert found[1] > 4000
    assert words.startswith("2 images of 16 bits use")


def test_types_in_one_set_are_told_of_together(tmp_path):
    twelve_bits(tmp_path, 4)
    twelve_bits(tmp_path / "f", 4, np.float32, 0, 4000)
    found, words = own_range(find_images(tmp_path))
    assert found[1] > 3900
    assert words.startswith("8 images of 16 bits and of floating point: scaled by the set's own")
    twelve_bits(tmp_path, 4, high=65535)
    twelve_bits(tmp_path / "f", 4, np.float32, 0, 1)
    assert own_range(find_images(tmp_path)) == (None, "")


def test_a_bounded_sample_spread_over_the_set_is_looked_at(tmp_path, monkeypatch):
    """The fewer, the larger the images are."""
    images = find_images(twelve_bits(tmp_path, 20))
    Image.fromarray(np.full((32, 32), 30_000, np.uint16)).save(images.path(1))
    found, words = own_range(images, sample=10)
    assert found[1] < 4096
    assert words.startswith("10 images of 16 bits (of 10 looked at) use")
    assert own_range(images, sample=10) == (found, words)
    monkeypatch.setattr("odcft.data.intensity_range.usual_side", lambda images: 100_000)
    assert "(of 10 looked at)" in own_range(images)[1]


# ---------------------------------------------------------------- a whole run

QUICK = [
    "optim.batch_size=8",
    "log.interval=1",
    "neck.hidden=16",
    "neck.dim=8",
    "log.tensorboard=false",
    "optim.epochs=1",
]


def seen(view, images):
    """What the network is shown of every image."""
    crops = Crops(images, view)
    return torch.stack([crops[0, i][0] for i in range(len(images))])


def test_memory_run_backbone_evaluation_and_export_see_the_same_pixels(tmp_path, make_checkpoint, capfd):
    data, checkpoint = str(twelve_bits(tmp_path / "images", low=90)), str(make_checkpoint(tmp_path / "c.pth"))
    images = find_images(data)
    init_memory(checkpoint, data, tmp_path / "memory", load_recipe("small", QUICK))
    said = capfd.readouterr().err
    assert said.count("24 images of 16 bits use 6.1 % of their range: scaled by the set's own") == 1
    made = json.loads((tmp_path / "memory" / "memory.json").read_text())["recipe"]["data"]["range"]
    assert made == list(own_range(images)[0])

    darker = np.array(Image.open(images.path(0))) // 8  # another range, were it looked for again
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", QUICK), memory=tmp_path / "memory")
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", QUICK), resume=True, epochs=2)
    assert "% of their range" not in capfd.readouterr().err
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.range == tuple(made)

    twelve_bits(tmp_path / "dark", high=300)
    Image.fromarray(darker).save(tmp_path / "dark" / "a" / "000.png")
    others = find_images(tmp_path / "dark")
    run = load_backbone(tmp_path / "run")
    folder = load_backbone(tmp_path / "run" / "backbone")
    view = View(32, 1.0, intensity=tuple(made))
    for loaded in (run, folder):
        assert view_for_evaluation(loaded, others, None) == view
        assert torch.equal(seen(view_for_evaluation(loaded, images, None), images), seen(view, images))
    assert len(seen(view, images)[0].unique()) > 150  # not 13 levels of gray
    results = evaluate(str(tmp_path / "run"), data, None, ["knn"])
    assert results["view"]["intensity"] == tuple(made)
    assert "black, 4,0" in capfd.readouterr().err
    assert view_for_evaluation(load_backbone(checkpoint), images, None).intensity == tuple(
        made
    )  # nobody has told: the same rule


def test_a_run_told_to_show_the_full_range_is_evaluated_so(tmp_path, make_checkpoint):
    data, checkpoint = str(twelve_bits(tmp_path / "images", 12)), str(make_checkpoint(tmp_path / "c.pth"))
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", [*QUICK, "data.range=full"]))
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", [*QUICK, "data.range=full"]), resume=True)
    assert view_for_evaluation(load_backbone(tmp_path / "run"), find_images(data), None).intensity == (0, 65535)


def test_memory_made_with_another_range_is_refused(tmp_path, make_checkpoint):
    data, checkpoint = str(twelve_bits(tmp_path / "images", 12)), str(make_checkpoint(tmp_path / "c.pth"))
    init_memory(checkpoint, data, tmp_path / "memory", load_recipe("small", [*QUICK, "data.range=[0, 4095]"]))
    for other in ("full", "[0, 5000]"):
        recipe = load_recipe("small", [*QUICK, f"data.range={other}"])
        with pytest.raises(OdcftError, match=r"was made with data.range=\[0.0, 4095.0\], and this run has data.range="):
            fine_tune(checkpoint, data, tmp_path / "run", recipe, memory=tmp_path / "memory")
    recipe = load_recipe("small", [*QUICK, "data.range=[0, 4095]"])
    fine_tune(checkpoint, data, tmp_path / "run", recipe, memory=tmp_path / "memory")
    about = tmp_path / "memory" / "memory.json"
    old = json.loads(about.read_text())
    del old["recipe"]["data"]["range"]  # of a memory of before there was one
    about.write_text(json.dumps(old))
    fine_tune(checkpoint, data, tmp_path / "old", load_recipe("small", QUICK), memory=tmp_path / "memory")
    assert load_recipe(tmp_path / "old" / "recipe.yaml").data.range == (0, 65535)


@pytest.mark.parametrize("bad", ["[5, 5]", "[9, 1]", "[.nan, 1]", "[0, .inf]", "half", "[1]"])
def test_a_range_is_black_below_white(bad):
    with pytest.raises(OdcftError, match=r"data\.range"):
        load_recipe("small", [f"data.range={bad}"])


@pytest.mark.parametrize("task", ["rotation", "colorization"])
def test_a_pretext_checkpoint_tells_the_range_it_was_trained_with(tmp_path, task, capfd):
    data = str(twelve_bits(tmp_path / "images", 12))
    out, recipe = tmp_path / "p.pth", load_recipe("pretext", ["optim.epochs=1", "optim.batch_size=4", "data.size=32"])
    train_pretext(task, data, "test_resnet", out, recipe)
    assert capfd.readouterr().err.count("12 images of 16 bits use") == 1
    made = own_range(find_images(data))[0]
    assert load_backbone(out).backbone.input.intensity == made
    recipe.optim.epochs = 2
    train_pretext(task, data, "test_resnet", out, recipe, resume=True)
    assert torch.load(out, weights_only=True)["intensity"] == list(made)
    recipe.data.range = (0, 300)
    with pytest.raises(OdcftError, match=r"was trained with data\.range"):
        train_pretext(task, data, "test_resnet", out, recipe, resume=True)
