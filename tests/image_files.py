"""Writers of image files that Pillow cannot write."""

import struct
import zlib

import numpy as np


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


def dicom_file(values, slope=None, intercept=None, bits=None, inverted=False, rle=False, frames=1):
    """The bytes of a DICOM file: gray (H, W) or RGB (H, W, 3), of 8 or 16 bits; needs pydicom."""
    import io

    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless

    file = pydicom.Dataset()
    file.PatientName, file.PatientID = "Secret^Person", "12345"
    file.SOPClassUID, file.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel = 1 if values.ndim == 2 else 3
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    file.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME1" if inverted else "MONOCHROME2"
    file.BitsAllocated = 8 * values.dtype.itemsize
    file.BitsStored = bits or file.BitsAllocated
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    if frames > 1:
        file.NumberOfFrames = frames
    if slope is not None:
        file.RescaleSlope, file.RescaleIntercept = slope, intercept
    pixels = values.tobytes() + bytes(values.nbytes) * (frames - 1)
    file.PixelData = pixels + b"\0" * (len(pixels) % 2)
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if rle:
        file.compress(RLELossless, generate_instance_uid=False)
    written = io.BytesIO()
    file.save_as(written, enforce_file_format=True)
    return written.getvalue()
