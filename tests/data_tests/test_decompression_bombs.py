"""Damaged and hostile files of every format: no crash, no hang, bounded memory, a reason for each that is refused."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from image_files import dicom_file, png_chunk, write_png, write_tiff
from PIL import Image, features

from odcft.data.decompression_bombs import MAX_SCANS
from odcft.data.image_decoding import image_size, read_high_depth, read_image
from odcft.errors import OdcftError

DRAW = np.random.default_rng(7)
SQUARE = np.kron(DRAW.integers(0, 2, (4, 5, 3)) * 255, np.ones((16, 16, 1))).astype(np.uint8)

# Runs in a process of its own, so that a crash, a hang or memory taken is seen; prints a line for each file.
CHILD = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from odcft.data.image_decoding import image_size, read_high_depth, read_image
for name in sys.argv[2:]:  # one good file of each format: what their libraries take is not counted
    read_image(Path(name).read_bytes())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
soft = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (3 << 30)
resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
for path in sorted(Path(sys.argv[1]).iterdir()):
    start, data, reasons = time.monotonic(), path.read_bytes(), []
    for read in (image_size, read_high_depth, read_image):
        try:
            read(data)
            reasons.append("")
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps([path.name, reasons[2], round(time.monotonic() - start, 2), grown]), flush=True)
"""


def pillow_file(format, pixels=SQUARE, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def good_files(folder):
    """One good file of each format (of those whose packages are installed): ending to bytes."""
    files = {
        "jpg": pillow_file("JPEG"),
        "progressive.jpg": pillow_file("JPEG", progressive=True),
        "png": pillow_file("PNG"),
        "webp": pillow_file("WEBP", lossless=True),
        "lossy.webp": pillow_file("WEBP"),
        "bmp": pillow_file("BMP"),
        "gif": pillow_file("GIF"),
        "ppm": pillow_file("PPM"),
        "jp2": pillow_file("JPEG2000"),
        "lzw.tif": pillow_file("TIFF", compression="tiff_lzw"),
        "jpeg.tif": pillow_file("TIFF", compression="jpeg"),
    }
    write_tiff(folder / "x", SQUARE.astype(np.float32) / 255)
    files["float.tif"] = (folder / "x").read_bytes()
    write_png(folder / "x", SQUARE.astype(np.uint16) * 257)
    files["16.png"] = (folder / "x").read_bytes()
    (folder / "x").unlink()
    try:
        import imagecodecs  # noqa: F401
        import tifffile

        for name, options in {"tiles.tif": {"tile": (32, 32)}, "planes.tif": {"planarconfig": "separate"}}.items():
            file = io.BytesIO()
            values = np.moveaxis(SQUARE, 2, 0) if "planarconfig" in options else SQUARE
            tifffile.imwrite(file, values.astype(np.float64), photometric="rgb", compression="zlib", **options)
            files[name] = file.getvalue()
    except ImportError:
        pass
    if features.check("avif"):
        files["avif"] = pillow_file("AVIF")
    try:
        import pillow_heif

        file = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(SQUARE)).save(file)
        files["heic"] = file.getvalue()
    except ImportError:
        pass
    try:
        files["dcm"] = dicom_file(SQUARE[..., 0].astype(np.uint16) * 10)
        files["rle.dcm"] = dicom_file(SQUARE[..., 0].astype(np.uint16) * 10, rle=True)
    except ImportError:
        pass
    return files


def variants(data, others, count):
    """Damaged variants of a good file: cut, flipped bytes, bytes replaced, zeros, other files before and behind."""
    for cut in DRAW.uniform(0, 1, count // 5):
        yield data[: int(cut * len(data))]
    for flips in (1, 2, 8, 64, 512):
        for _ in range(count // 10):
            damaged = bytearray(data)
            head = min(len(data), 200 if flips < 8 else len(data))  # most of what matters is at the start
            for position in DRAW.integers(0, head, flips):
                damaged[position] ^= 1 << int(DRAW.integers(0, 8))
            yield bytes(damaged)
    for value in (b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80\0\0\0"):
        for position in DRAW.integers(0, min(len(data), 200), count // 20):
            yield data[:position] + value + data[position + 4 :]
    for other in others:
        yield data[: len(data) // 2] + other
        yield other[:64] + data
        yield data + other


def decoded_in_a_child(folder, good, seconds):
    """What became of every file of a folder: name to reason ("" if decoded). Fails on a crash, a hang, much memory."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *map(str, good)], capture_output=True, text=True, timeout=seconds
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1][0] if lines else "none"
    assert (done.returncode, done.stderr) == (0, ""), f"after {last}: {done.stderr[-500:]}"
    assert len(lines) == len(list(folder.iterdir()))
    slow = [line for line in lines if line[2] > 20]
    assert not slow, slow
    first_large = next((line for line in lines if line[3] > 300), None)
    assert first_large is None, f"took {first_large[3]} MB more"
    return {name: reason for name, reason, _, _ in lines}


def damaged_folder(folder, count):
    files = good_files(folder)
    (folder / "damaged").mkdir()
    (folder / "good").mkdir()
    others = [files["png"], files["jpg"], files["lzw.tif"]]
    for ending, data in files.items():
        (folder / "good" / f"x.{ending}").write_bytes(data)
        (folder / "damaged" / f"zero.{ending}").write_bytes(b"")
        (folder / "damaged" / f"named.{ending}").write_bytes(others[0] if ending == "jpg" else files["jpg"])
        for number, damaged in enumerate(variants(data, others, count)):
            (folder / "damaged" / f"{number:03d}.{ending}").write_bytes(damaged)
    return folder / "damaged", sorted((folder / "good").iterdir())


def check_damaged_files(folder, count, seconds):
    damaged, good = damaged_folder(folder, count)
    found = decoded_in_a_child(damaged, good, seconds)
    for name, reason in found.items():
        if name.startswith("named"):
            assert reason == "", name  # the ending does not matter
        if name.startswith("zero"):
            assert reason == "OdcftError: an empty file (0 bytes)"
    refused = sum(reason != "" for reason in found.values())
    assert len(found) // 10 < refused < len(found)
    return len(found)


@pytest.mark.slow
def test_damaged_variants_of_every_format_are_decoded_or_refused(tmp_path):
    assert check_damaged_files(tmp_path, 340, 900) > 300 * 15


def test_some_damaged_variants_of_every_format_are_decoded_or_refused(tmp_path):
    check_damaged_files(tmp_path, 10, 60)


# ---------------------------------------------------------------- bombs


def jpeg_of_scans(scans):
    """A progressive JPEG whose last scan is repeated."""
    data = pillow_file("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def bombs(folder):
    """Small files that would take gigabytes, or hours: name to a word of the refusal."""
    start, gray = b"\x89PNG\r\n\x1a\n", b"\x08\0\0\0\0"
    some = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    words = {}

    def add(name, data, word):
        (folder / name).write_bytes(data)
        words[name] = word

    side = struct.pack(">II", 60_000, 60_000)
    add("huge.png", start + png_chunk(b"IHDR", side + gray) + some, "more than twice Pillow's")
    add("scans.jpg", jpeg_of_scans(5000), "scans")
    for ending, body in (
        ("x", b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + (16382).to_bytes(3, "little") * 2),
        ("l", b"VP8L" + struct.pack("<I", 10) + b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(5)),
        ("y", b"VP8 " + struct.pack("<I", 10) + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)),
    ):
        riff = b"WEBP" + body + bytes(40)
        add(f"{ending}.webp", b"RIFF" + struct.pack("<I", len(riff)) + riff, "16,383 x 16,383 pixels are more")
    tiny = np.zeros((4, 4), np.uint8)
    for name, array, tags, word in (
        ("huge", tiny, {256: [60_000], 257: [60_000]}, "more than twice Pillow's"),
        ("tile", tiny, {322: [60_000], 323: [60_000]}, "60,000 x 60,000 pixels are more"),
        ("planes", np.zeros((4, 4, 3), np.float64), {256: [9_000], 257: [9_000]}, "would take"),
        ("bands", np.zeros((4, 4, 3), np.float32), {277: [60_000], 256: [900], 257: [900]}, ""),
    ):
        write_tiff(folder / f"{name}.tif", array, tags=tags.items())
        words[f"{name}.tif"] = word
    small, text = png_chunk(b"IHDR", struct.pack(">II", 8, 8) + gray), zlib.compress(bytes(1 << 29), 1)
    end = png_chunk(b"IDAT", zlib.compress(bytes(72))) + png_chunk(b"IEND", b"")
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        head = b"x\0\0" if kind != b"iTXt" else b"x\0\1\0\0\0"
        add(f"{kind.decode()}.png", start + small + png_chunk(kind, head + text) + end, None)
    return words


def package_bombs(folder):
    """Bombs of the formats that further packages read."""
    words = {}
    tifffile = pytest.importorskip("tifffile")
    imagecodecs = pytest.importorskip("imagecodecs")
    for name, number, encode in (("zlib", 8, imagecodecs.zlib_encode), ("zstd", 50000, imagecodecs.zstd_encode)):
        strip = encode(bytes(1 << 28))
        path = folder / f"{name}.tif"
        tags = {259: [number], 273: [0], 279: [len(strip)]}
        write_tiff(path, np.zeros((4, 4, 3), np.float32), tags=tags.items())
        data = path.read_bytes()
        path.write_bytes(data[: -4 * 4 * 3 * 4] + strip)
        words[path.name] = "damaged"
    del tifffile
    data = dicom_file(np.zeros((8, 8), np.uint16))
    rows = data.index(b"\x28\0\x10\0US")
    columns = data.index(b"\x28\0\x11\0US")
    huge = bytearray(data)
    huge[rows + 8 : rows + 10] = huge[columns + 8 : columns + 10] = struct.pack("<H", 60_000)
    (folder / "huge.dcm").write_bytes(huge)
    words["huge.dcm"] = "60,000 x 60,000 pixels are more"
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(SQUARE)).save(file)
    heic = file.getvalue()
    size = heic.index(b"ispe") + 8
    for big in (12_000, 60_000):
        (folder / f"{big}.heic").write_bytes(heic[:size] + struct.pack(">II", big, big) + heic[size + 8 :])
        words[f"{big}.heic"] = ""
    return words


@pytest.mark.slow
@pytest.mark.parametrize("make", [bombs, package_bombs])
def test_decompression_bombs_are_refused_before_their_memory_is_taken(tmp_path, make):
    (tmp_path / "good").mkdir()
    (tmp_path / "bombs").mkdir()
    for ending, data in good_files(tmp_path / "good").items():
        (tmp_path / "good" / f"x.{ending}").write_bytes(data)
    words = make(tmp_path / "bombs")
    found = decoded_in_a_child(tmp_path / "bombs", sorted((tmp_path / "good").iterdir()), 60)
    for name, word in words.items():
        if word is not None:  # None: the pixels are fine, and may be read
            assert found[name], name
            assert word in found[name], (name, found[name])


def test_a_progressive_jpeg_of_few_scans_is_read_even_if_its_bytes_look_like_many():
    data = pillow_file("JPEG", progressive=True)
    comment = b"\xff\xda" * 1000
    read_image(data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + data[2:])
    read_image(data + comment)  # after its end, such as the film of a motion photo
    assert read_image(jpeg_of_scans(20)).size == SQUARE.shape[1::-1]
    with pytest.raises(OdcftError, match=f"more than {MAX_SCANS} scans"):
        read_high_depth(jpeg_of_scans(MAX_SCANS + 1))
    with pytest.raises(OdcftError, match=f"more than {MAX_SCANS} scans"):
        image_size(jpeg_of_scans(MAX_SCANS + 1))


def test_the_size_of_every_kind_of_webp_is_read_from_its_header():
    for options in ({}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}):
        data = pillow_file("WEBP", SQUARE[:, :37], **options)
        assert image_size(data) == (37, 64)
