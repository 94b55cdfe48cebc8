"""Decode the TIFFs that Pillow does not read in full: many bands, 16-bit planes, 64 bits, colours in floating point.

tifffile reads them; imagecodecs, which comes with `pip install "odcft[tiff]"`, decompresses them.
"""

import importlib.util
import io
import logging
from typing import Any

import numpy as np
from PIL import Image

from odcft.data.decompression_bombs import refuse_large
from odcft.data.high_depth import HighDepthImage, limits_of
from odcft.errors import OdcftError
from odcft.recipe import MAX_BANDS

GRAY, RGB, PALETTE, CMYK, YCBCR = (0, 1), 2, 3, 5, 6  # photometric interpretations of TIFF 6.0
ALPHA = 2  # extra sample: opacity that the colours are not multiplied by
NO_COMPRESSION, JPEG = 1, 7
# Compressions whose decoders never write more than the tile that the header promises …
_BOUNDED = {NO_COMPRESSION: "", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA"}
_BOUNDED |= {34926: "ZSTD", 50000: "ZSTD"}
_OF_IMAGES = (JPEG, 33003, 33004, 33005, 34712)  # … and those whose tiles are JPEG or JPEG 2000 files with sizes inside

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damaged files are reported anyway
logging.getLogger("tifffile").propagate = False


def read_tiff(data: bytes, bands: int = 3) -> tuple[HighDepthImage, int]:
    """Read the first page of a TIFF.

    Args:
        data: the content of the file.
        bands: 3 for an image in gray or colours; any other number for an image of that many bands.

    Returns:
        The values, and the EXIF orientation.

    Raises:
        OdcftError: bands or a compression that odcft does not read, or a damaged file.
    """
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data), is_lsm=False, is_scanimage=False, is_nih=False) as file:
            page: Any = file.pages[0]
            _refuse_bomb(file, page)
            values = _arranged(page) if bands == 3 else _all_bands(page, bands)
            orientation = page.tags.valueof(274, 1)
    except OdcftError:
        raise
    except Exception as error:  # tifffile and the decoders raise many types for damaged files
        raise OdcftError(f"a TIFF that is damaged ({type(error).__name__}: {str(error)[:200]})") from None
    return values, orientation


def tiff_size(data: bytes) -> tuple[int, int]:
    """Width and height of the first page of a TIFF, from its header."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data), is_lsm=False, is_scanimage=False, is_nih=False) as file:
        page: Any = file.pages[0]
        return page.imagewidth, page.imagelength


def _refuse_bomb(file: Any, page: Any) -> None:
    """Refuse a page that would take too much memory, or whose compression could; nothing is decompressed for it."""
    width, height, bands = page.imagewidth, page.imagelength, page.samplesperpixel
    if page.dtype is None or page.dtype.kind not in "uifb":
        raise OdcftError(_describe(page))
    refuse_large(width, height, bands, page.dtype.itemsize)
    refuse_large(max(1, page.tilewidth), max(1, page.tilelength), bands, page.dtype.itemsize)
    if page.imagedepth > 1 or page.tiledepth > 1:
        raise OdcftError(f"a TIFF of a volume, {page.imagedepth} layers deep; odcft reads flat images")
    compression = int(page.compression)
    if compression not in _BOUNDED and compression not in _OF_IMAGES:
        name = getattr(page.compression, "name", compression)
        raise OdcftError(f"a TIFF compressed as {name}, which odcft does not read with these bands and bits")
    if compression != NO_COMPRESSION and importlib.util.find_spec("imagecodecs") is None:
        raise OdcftError(
            f"{_what(page)}, compressed as {getattr(page.compression, 'name', compression)}: install the package that "
            'reads it, pip install "odcft[tiff]"'
        )
    if compression in _OF_IMAGES:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.filehandle.seek(offset)
            _refuse_other_size(file.filehandle.read(count), page)


def _refuse_other_size(tile: bytes, page: Any) -> None:
    """Refuse a tile or strip that is an image larger than the header of the TIFF says."""
    if not tile:
        return
    with Image.open(io.BytesIO(tile), formats=("JPEG", "JPEG2000")) as image:
        width, height = page.tilewidth or page.imagewidth, page.tilelength or page.imagelength
        if image.size[0] > width or image.size[1] > height:
            raise OdcftError(f"a TIFF with tiles of {image.size[0]:,} x {image.size[1]:,} pixels inside smaller ones")


def _values(page: Any) -> np.ndarray:
    """The values of a page, (H, W, C)."""
    separate, _, height, width, contiguous = page.shaped
    with np.errstate(all="ignore"):  # NaN and infinity
        values = page.asarray(maxworkers=1)
    values = values.reshape(separate, height, width, contiguous)
    return np.moveaxis(values, 0, 2).reshape(height, width, separate * contiguous)


def _limits(page: Any) -> tuple[tuple[float, float], str]:
    return limits_of(page.dtype, page.bitspersample if page.dtype.kind in "ui" else 0)


def _all_bands(page: Any, bands: int) -> HighDepthImage:
    """Every band of a page, whatever it stands for."""
    if page.samplesperpixel != bands:
        raise OdcftError(f"{_what(page)}; the network takes {bands}")
    if page.photometric == PALETTE:
        raise OdcftError(_describe(page))
    return HighDepthImage(_values(page), *_limits(page))


def _arranged(page: Any) -> HighDepthImage:
    """A page as gray or RGB, with alpha where it says that a band is that."""
    count, photometric, extra = page.samplesperpixel, int(page.photometric), tuple(map(int, page.extrasamples))
    limits, kind = _limits(page)
    is_gray = photometric in GRAY and (count == 1 or (count == 2 and extra == (ALPHA,)))
    is_rgb = photometric == RGB and (count == 3 or (count == 4 and extra in ((), (0,), (ALPHA,))))
    is_rgb |= photometric == YCBCR and count == 3 and page.compression == JPEG  # tifffile converts it
    is_cmyk = photometric == CMYK and count == 4 and limits[0] == 0
    if not (is_gray or is_rgb or is_cmyk):
        raise OdcftError(_describe(page))
    values = _values(page)
    if is_cmyk:
        share = 1 - values.astype(np.float64) / limits[1]
        values = (share[..., :3] * share[..., 3:] * limits[1]).astype(values.dtype)
    alpha = None
    if extra == (ALPHA,):
        alpha = (np.nan_to_num(values[..., -1].astype(np.float32)) / np.float32(limits[1])).clip(0, 1)
    values = values[..., 0] if is_gray else values[..., :3]
    return HighDepthImage(values, limits, kind, alpha, photometric == 0)


def _what(page: Any) -> str:
    """What kind of TIFF this is: "a TIFF of 5 bands of 8 bits (RGB plus 2 more)"."""
    bands, bits = page.samplesperpixel, page.bitspersample
    bits = "/".join(map(str, dict.fromkeys(bits))) if isinstance(bits, tuple) else bits
    form = page.sampleformat[0] if isinstance(page.sampleformat, tuple) else page.sampleformat
    kinds = {2: "signed bits", 3: "bits (floating point)", 5: "bits (complex)", 6: "bits (complex)"}
    description = f"a TIFF of {bands} band{'s' if bands > 1 else ''} of {bits} {kinds.get(form, 'bits')}"
    if bands == 1 and page.photometric == PALETTE:
        description += " (palette)"
    if bands > 1:
        colours = {2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}.get(page.photometric, "gray")
        layout = ", in separate planes" if page.planarconfig == 2 else ""
        description += f" ({colours} plus {len(page.extrasamples)} more{layout})"
    return description


def _describe(page: Any) -> str:
    """Say what kind of TIFF this is, and which kinds odcft reads."""
    read = "1 band (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGB and alpha, or CMYK)"
    bands, is_usable = page.samplesperpixel, page.dtype is not None and page.dtype.kind in "uifb"
    if 1 < bands <= MAX_BANDS and bands != 3 and is_usable and page.photometric != PALETTE:
        read += f"; all of them with --set data.bands={bands}"
    return f"{_what(page)}; odcft reads {read}"
