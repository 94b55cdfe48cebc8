"""Decode an image file to 8 bits: upright, on a white background, with higher bit depths scaled to 8 bits.

This is the door to the decoders. Pillow reads nearly all images (`pillow_decoding.py`); tifffile reads the TIFFs that
Pillow would not read in full, and pydicom reads DICOM.
"""

from typing import Any

from PIL import Image

from odcft.data.decompression_bombs import refuse_bombs
from odcft.data.dicom_decoding import is_dicom, read_dicom
from odcft.data.high_depth import HighDepthImage, to_8_bits
from odcft.data.pillow_decoding import high_depth, is_tiff, open_image, orientation, to_rgb
from odcft.data.tiff_decoding import read_tiff, tiff_size
from odcft.errors import OdcftError

_UNDO_ORIENTATION = {  # EXIF orientation to the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(data: bytes, intensity: tuple[float, float] | None = None, bands: int = 3) -> Any:
    """Read an image (the first frame of an animation or a stack).

    Args:
        data: the content of the file.
        intensity: for images with more than 8 bits a channel, the values that become black and white; None for the
            smallest and largest value of their type (for floating point, 0 and 1).
        bands: 3 for RGB, whatever the file holds; another number for the bands of a TIFF that has that many.

    Returns:
        A Pillow image in RGB, or a BandStack.

    Raises:
        OdcftError: the image is of a kind that odcft does not read; says which.
        OSError, ValueError, SyntaxError and others: raised by Pillow for a file that is not a complete image.
    """
    if not data:
        raise OdcftError("an empty file (0 bytes)")
    decoded, turned = _decode(data, bands)
    image: Any = to_8_bits(decoded, intensity) if isinstance(decoded, HighDepthImage) else decoded
    transpose = _UNDO_ORIENTATION.get(turned)
    return image if transpose is None else image.transpose(transpose)


def _decode(data: bytes, bands: int) -> tuple[HighDepthImage | Image.Image, int]:
    """The decoded image, 8 bits as RGB already, and its EXIF orientation."""
    if bands != 3:
        return _read_bands(data, bands)
    refuse_bombs(data)
    if is_dicom(data):
        return read_dicom(data), 1
    with open_image(data) as image:
        if image is None:
            return read_tiff(data)
        deep = high_depth(image, data)
        decoded = to_rgb(image) if deep is None else deep
        return decoded, orientation(image)


def _read_bands(data: bytes, bands: int) -> tuple[HighDepthImage, int]:
    if not is_tiff(data):
        raise OdcftError(f"not a TIFF; images of {bands} bands are read from TIFFs, or by your own function (--reader)")
    return read_tiff(data, bands)


def read_high_depth(data: bytes, bands: int = 3) -> HighDepthImage | None:
    """Read the values of an image with more than 8 bits a channel; return None for any other, without decoding it."""
    deep: HighDepthImage | None
    refuse_bombs(data)
    if bands != 3:
        deep = _read_bands(data, bands)[0]
    elif is_dicom(data):
        deep = read_dicom(data)
    else:
        with open_image(data) as image:
            deep = read_tiff(data)[0] if image is None else high_depth(image, data)
    return None if deep is None or deep.is_8_bit else deep


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height as stored in the file, without decoding it (except for DICOM)."""
    refuse_bombs(data)
    if is_dicom(data):
        height, width = read_dicom(data).values.shape[:2]
        return width, height
    with open_image(data) as image:
        if image is not None:
            return image.size
    return tiff_size(data)
