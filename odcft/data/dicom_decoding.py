"""Decode DICOM files with pydicom, which comes with `pip install "odcft[dicom]"`: the first frame, in rescaled units.

A DICOM file holds data about a patient. Nothing of it is ever printed: messages name the kind of problem only.
"""

import io
import logging
import warnings
from typing import Any

import numpy as np

from odcft.data.decompression_bombs import refuse_large
from odcft.data.high_depth import HighDepthImage, limits_of
from odcft.errors import OdcftError

DEFLATED = "1.2.840.10008.1.2.1.99"  # transfer syntax: pydicom would decompress all of it, however large
JPEG_FAMILY = "1.2.840.10008.1.2.4."  # transfer syntaxes: JPEG, JPEG-LS, JPEG 2000

logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False  # it logs values of elements


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM. The 128 bytes before its mark may be anything, even the start of a TIFF."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes) -> HighDepthImage:
    """Read the first frame of a DICOM file.

    Gray values are in the units of the file (Hounsfield units for CT): stored value times rescale slope plus intercept,
    or as the modality's table says. The window is not applied; data.range is, to the whole set alike.

    Raises:
        OdcftError: pydicom is not installed, or it does not read the file; never says what is in it.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError  # noqa: F401 - fails for packages of the same name
    except ImportError:
        raise OdcftError('a DICOM file: install the package that reads them, pip install "odcft[dicom]"') from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values
        try:
            if DEFLATED.encode() in data:
                raise OdcftError("a DICOM file that is compressed as a whole (deflated), which odcft does not read")
            file = pydicom.dcmread(io.BytesIO(data))
            return _first_frame(file)
        except OdcftError:
            raise
        except (Exception, RecursionError) as error:  # its message may quote the file
            raise OdcftError(
                f"a DICOM file that is damaged or of a kind that odcft does not read ({_kind(error)})"
            ) from (None)


def _kind(error: BaseException) -> str:
    """The type of an error, or that it is about the compression."""
    if isinstance(error, RuntimeError):  # of pydicom's decoders
        return "it cannot decompress it; pip install 'pylibjpeg[all]' adds decoders to pydicom"
    return type(error).__name__


def _first_frame(file: Any) -> HighDepthImage:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    if "PixelData" not in file:
        raise OdcftError("a DICOM file without an image in pixels of integers")
    height, width, samples = int(file.Rows), int(file.Columns), int(file.get("SamplesPerPixel", 1))
    refuse_large(width, height, samples, max(1, int(file.BitsAllocated) // 8))
    if file.file_meta.TransferSyntaxUID.startswith(JPEG_FAMILY):
        _refuse_other_size(file, width, height)
    color = str(file.PhotometricInterpretation)
    values = pixel_array(file, index=0)
    limits, kind = limits_of(values.dtype, int(file.BitsStored))
    if color == "PALETTE COLOR":
        values = apply_color_lut(values, file)
        limits, kind = limits_of(values.dtype)
    elif samples == 1:
        stored, values = values, apply_modality_lut(values, file)
        if "ModalityLUTSequence" in file:
            limits = limits_of(values.dtype)[0]
        elif values is not stored:
            slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
            if (slope, intercept) == (1, 0):
                values = stored
            else:
                low, high = sorted(slope * limit + intercept for limit in limits)
                limits = (low, high)
    elif samples != 3:
        raise OdcftError(f"a DICOM file of {samples} channels; odcft reads 1 or 3")
    if not limits[0] < limits[1]:
        raise OdcftError("a DICOM file whose values are all mapped to one")
    if values.dtype == np.uint8 and limits != (0, 255):
        values = values.astype(np.uint16)  # such as 6 of 8 bits
    return HighDepthImage(values, limits, f"{kind} (DICOM)", None, color == "MONOCHROME1")


def _refuse_other_size(file: Any, width: int, height: int) -> None:
    """Refuse a compressed frame that is an image of another size than the header says."""
    from PIL import Image
    from pydicom.encaps import get_frame

    frame = get_frame(file.PixelData, 0, number_of_frames=int(file.get("NumberOfFrames", 1) or 1))
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
            size = image.size
    except Exception:  # a kind of JPEG that Pillow does not know, and so does not decode
        return
    if size != (width, height):
        raise OdcftError(
            f"a DICOM file with a frame of {size[0]:,} x {size[1]:,} pixels instead of {width:,} x {height:,}"
        )
