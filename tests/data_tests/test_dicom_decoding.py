"""DICOM: rescaled values, inverted and coloured images, frames; nothing about the patient is printed."""

import builtins

import numpy as np
import pytest
from image_files import dicom_file

from odcft.data.batches import Crops
from odcft.data.image_decoding import image_size, read_high_depth, read_image
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError

pydicom = pytest.importorskip("pydicom")
RAMP = np.arange(60, dtype=np.uint16).reshape(6, 10) * 60  # 0 .. 3540


def test_stored_values_are_rescaled_and_the_limits_with_them():
    image = read_high_depth(dicom_file(RAMP, slope=2, intercept=-1024, bits=12))
    assert np.array_equal(image.values, RAMP * 2.0 - 1024)
    assert image.limits == (-1024, 2 * 4095 - 1024)
    assert image.kind == "12 bits (DICOM)"
    shown = np.array(read_image(dicom_file(RAMP, slope=2, intercept=-1024, bits=12), (0, 1000)))
    assert np.array_equal(shown[..., 0], np.clip((RAMP * 2.0 - 1024) * 0.255, 0, 255).round())
    assert image_size(dicom_file(RAMP)) == (10, 6)


def test_a_negative_slope_keeps_black_below_white():
    assert read_high_depth(dicom_file(RAMP, slope=-1, intercept=0, bits=12)).limits == (-4095, 0)


def test_monochrome1_is_inverted():
    plain, inverted = (np.array(read_image(dicom_file(RAMP, bits=12, inverted=i))).astype(int) for i in (False, True))
    assert np.abs(plain + inverted - 255).max() <= 1
    assert plain[0, 0, 0] == 0


def test_signed_8_bit_and_coloured_images():
    signed = (RAMP.astype(np.int16) - 1500).astype(np.int16)
    assert np.array_equal(read_high_depth(dicom_file(signed)).values, signed)
    eight = (RAMP // 16).astype(np.uint8)
    assert read_high_depth(dicom_file(eight)) is None
    assert np.array_equal(np.array(read_image(dicom_file(eight)))[..., 2], eight)
    rgb = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)
    assert np.array_equal(np.array(read_image(dicom_file(rgb))), rgb)


def test_the_first_frame_and_compressed_frames():
    for options in ({"frames": 3}, {"rle": True}):
        assert np.array_equal(read_high_depth(dicom_file(RAMP, **options)).values, RAMP)


def test_a_preamble_that_begins_as_a_tiff_does_not_matter():
    data = b"II*\0" + bytes(124) + dicom_file(RAMP)[128:]
    assert np.array_equal(read_high_depth(data).values, RAMP)


def test_nothing_about_the_patient_is_said(tmp_path, capfd):
    data = dicom_file(RAMP)
    assert b"Secret" in data
    (tmp_path / "cut.dcm").write_bytes(data[: data.index(b"Secret") + 3])
    (tmp_path / "no_rows.dcm").write_bytes(data.replace(b"\x28\0\x10\0US", b"\x28\0\x10\0PN"))
    (tmp_path / "slope.dcm").write_bytes(dicom_file(RAMP, slope=1, intercept=0).replace(b"\x53\x10DS", b"\x53\x10PN"))
    (tmp_path / "pixels.dcm").write_bytes(data[:-50])
    images = find_images(tmp_path)
    for i in range(len(images)):
        reason = Crops(images, View(8))[0, i][0]
        if isinstance(reason, str):
            assert "Secret" not in reason
            assert reason.startswith("a DICOM file")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_without_pydicom_the_extra_is_named(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        "builtins.__import__",
        lambda name, *args: (_ for _ in ()).throw(ImportError) if name == "pydicom" else real(name, *args),
    )
    with pytest.raises(OdcftError, match=r'a DICOM file: install .* pip install "odcft\[dicom\]"'):
        read_image(dicom_bytes)


dicom_bytes = dicom_file(RAMP)
