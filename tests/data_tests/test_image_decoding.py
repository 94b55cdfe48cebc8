"""The network sees what a file holds: all bits and bands, transparency on white, the right way up."""

import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import PIL
import pytest
from image_files import png_chunk, write_png, write_tiff
from PIL import Image, features

from odcft.data.image_decoding import read_image
from odcft.data.sources import find_images
from odcft.errors import OdcftError

DRAW = np.random.default_rng(0)


RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


COLOURS = DRAW.integers(0, 256, (8, 12, 3)).astype(np.uint8)


def pixels(path, *intensity):
    return np.array(read_image(path.read_bytes(), *intensity))


# ---------------------------------------------------------------- 8 bits


KINDS = {"png": "1 L P RGB", "bmp": "1 L P RGB", "gif": "1 L P", "tif": "1 L P RGB YCbCr CMYK", "ppm": "1 L RGB"}


KINDS |= {"webp": "RGB", "jp2": "L RGB", "jpg": "L RGB CMYK"}


@pytest.mark.parametrize(("ending", "mode"), [(e, mode) for e, modes in KINDS.items() for mode in modes.split()])
def test_every_8_bit_format_and_mode_keeps_its_colours(tmp_path, ending, mode):
    square = np.kron(DRAW.integers(0, 2, (2, 2, 3)) * 255, np.ones((16, 16, 1))).astype(np.uint8)
    image = Image.fromarray(square).convert(mode)
    expected = np.array(image.convert("RGB")).astype(int)
    image.save(tmp_path / f"x.{ending}", **({"lossless": True} if ending == "webp" else {}))
    try:
        Image.open(tmp_path / f"x.{ending}").load()
    except OSError:
        pytest.skip(f"Pillow {PIL.__version__} cannot read what it wrote")  # YCbCr TIFFs before 13
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
    """Pillow 13.0 memory-maps such a file with width and height swapped."""
    values = DRAW.integers(0, 256, (40, 60)).astype(dtype)
    write_tiff(tmp_path / "x.tif", values, tags={274: [6]}.items())
    assert np.array_equal(pixels(tmp_path / "x.tif", (0, 255))[..., 0], np.rot90(values, -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0nonsense", b"Exif\0\0"])
def test_damaged_exif_leaves_the_pixels_as_they_are(tmp_path, exif):
    Image.fromarray(COLOURS).save(tmp_path / "x.jpg", exif=exif)
    Image.fromarray(COLOURS).save(tmp_path / "y.jpg")
    assert np.array_equal(pixels(tmp_path / "x.jpg"), pixels(tmp_path / "y.jpg"))


def test_16_bit_images_are_shown_upright_too(tmp_path):
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
    hidden = np.zeros((8, 8, 4), np.uint8)  # black; all transparent except the left half
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


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for ending in ("gif", "png", "webp", "tif"):
        more = {"lossless": True} if ending == "webp" else {}
        frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **more)
        assert pixels(tmp_path / f"x.{ending}")[4, 4].tolist() == [255, 0, 0]


def test_sixteen_bit_and_palette_and_gray_images_become_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).astype(np.uint8)).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray((ramp / 257).astype(np.uint8)).save(tmp_path / "gray.png")
    for name in ("deep.png", "palette.gif", "gray.png"):
        pixels = np.array(read_image((tmp_path / name).read_bytes()))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels[..., 0].astype(float) - ramp / 257).max() < 2


# ---------------------------------------------------------------- more than 8 bits


@pytest.mark.parametrize(
    ("order", "dtype", "photometric"),
    [("<", dtype, 1) for dtype in ("u2", "i2", "u4", "i4", "f4")]
    + [(">", dtype, 1) for dtype in ("u2", "i2", "i4", "f4")]
    + [("<", "u2", 0), ("<", "f4", 0), (">", "f4", 0)],  # zero is white; Pillow inverts only 8-bit ones
)
def test_high_depth_gray_tiffs_are_scaled_from_black_to_white(tmp_path, order, dtype, photometric):
    low, high = {"u2": (300, 4000), "i2": (-2000, 1000), "u4": (3e9, 4e9), "i4": (-5, 70_000), "f4": (-0.25, 7.5)}[
        dtype
    ]
    values = (low + RAMP / 255 * (high - low)).astype(dtype)
    write_tiff(tmp_path / "x.tif", values, photometric, order=order)
    shown = pixels(tmp_path / "x.tif", (low, high))
    expected = RAMP if photometric else 255 - RAMP
    assert np.abs(shown - expected[..., None].astype(int)).max() <= 1
    twice = pixels(tmp_path / "x.tif", (low + (high - low) / 2, high))[..., 0]  # values beyond are clipped
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
def test_16_bit_pngs_keep_all_bits_of_all_bands(tmp_path, bands):
    """Pillow alone keeps only the upper byte of RGB: 16 levels of a 12-bit image."""
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
def test_16_bit_colour_tiffs_keep_all_bits_and_a_fourth_band_is_alpha_only_if_the_file_says_so(tmp_path, order):
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


def test_compressed_high_depth_tiffs_keep_all_bits(tmp_path):
    values = DRAW.integers(0, 4096, (70, 80)).astype(np.uint16)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        Image.fromarray(values).save(tmp_path / "x.tif", compression=compression)
        assert np.abs(pixels(tmp_path / "x.tif", (0, 4095))[..., 0] - values / 4095 * 255).max() <= 1
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tif", compression=compression)
        assert np.abs(pixels(tmp_path / "x.tif", (0, 4095))[..., 0] - values / 4095 * 255).max() <= 1


def test_signed_bytes_are_not_read_as_unsigned(tmp_path):
    write_tiff(tmp_path / "x.tif", (RAMP.astype(int) - 128).astype(np.int8))
    assert np.array_equal(pixels(tmp_path / "x.tif")[..., 0], RAMP)


def test_nan_is_black_and_infinity_is_white(tmp_path):
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
        (U8[..., :2], {"extra": [0]}, "2 bands of 8 bits .gray plus 1 more"),
        (U8[..., :2], {}, "2 bands"),
        (U8[..., :5], {"extra": [0, 0]}, "5 bands of 8 bits .RGB plus 2 more"),
        (U8[..., :5], {"photometric": 1, "extra": [0] * 4}, "5 bands"),
        (U8[..., :5], {"photometric": 1, "extra": [0] * 4, "planar": 2}, "5 bands .*, in separate planes"),
        (U8, {"extra": [0] * 4}, "7 bands"),
        (U8[..., :5].astype(np.uint16), {"photometric": 1, "extra": [0] * 4, "order": ">"}, "5 bands of 16 bits"),
        (U8[..., :3], {"photometric": 1, "extra": [0, 0]}, "3 bands of 8 bits .gray plus 2 more"),
    ],
)
def test_unsupported_bands_are_refused_and_not_dropped(tmp_path, array, how, words, capfd):
    write_tiff(tmp_path / "x.tif", array, **how)
    with pytest.raises(OdcftError, match=f"^a TIFF of {words}.*; odcft reads 1 band .gray"):
        read_image((tmp_path / "x.tif").read_bytes())
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- files that are not what they should be


def broken_files(folder):
    """Files that are truncated, lie about their size, or expand enormously."""
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
    large = struct.pack(">II", 10_000, 10_000)  # Pillow would only warn
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


def test_broken_files_are_reported_without_memory_growth_warnings_or_noise(tmp_path):
    broken_files(tmp_path)
    code = """
import resource, sys
from odcft.data.batches import Crops
from odcft.data.intensity_range import choose_range, median_shorter_side
from odcft.data.sources import find_images
from odcft.data.view import View
images = find_images(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
median_shorter_side(images), choose_range(images)
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
    assert told["huge.png"] == "more than twice Pillow's 89,478,485 pixels"
    assert "not an image of a format" in told["program.jpg"]


# ---------------------------------------------------------------- formats of other packages


def test_heic_and_avif_are_read_upright_and_first(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    square = np.kron(DRAW.integers(0, 2, (2, 3, 3)) * 255, np.ones((16, 16, 1))).astype(np.uint8)
    pillow_heif.from_pillow(Image.fromarray(square)).save(tmp_path / "x.heic", quality=-1, chroma=444)
    assert np.abs(pixels(tmp_path / "x.heic").astype(int) - square).mean() < 2
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(square)))
    if features.check("avif"):
        turned.save(tmp_path / "x.avif", quality=100, exif=exif, subsampling="4:4:4")
        assert pixels(tmp_path / "x.avif").shape == square.shape
        assert np.abs(pixels(tmp_path / "x.avif").astype(int) - square).mean() < 3


def test_without_their_packages_heic_and_avif_name_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1"):
        with pytest.raises(OdcftError, match=r'a HEIC image: .*pip install "odcft\[heic\]"'):
            read_image(b"\0\0\0\x18ftyp" + brand + bytes(4) + b"mif1heic")
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(Image, "init", lambda: True)
    for brand in (b"avif", b"mif1"):
        with pytest.raises(OdcftError, match=r"an AVIF image, which Pillow reads from version 11\.3 on"):
            read_image(b"\0\0\0\x18ftyp" + brand + bytes(4) + b"mif1avif")
