"""What evaluation says about images it cannot use."""

import pytest

from odcft.errors import OdcftError


def test_evaluation_without_any_readable_image_is_refused(tmp_path, make_images):
    from odcft.evaluation.comparison import evaluate

    make_images(tmp_path, 16)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(
        OdcftError, match=r"None of the 16 images in .* can be read; a/000\.png: .*not an image of a format"
    ):
        evaluate("scratch:test_resnet", str(tmp_path), None, ["svm", "knn"])


def test_evaluation_says_what_it_left_out(tmp_path, make_images, capfd):
    from odcft.evaluation.comparison import evaluate

    for folder, side in (("train", 32), ("test", 40)):
        make_images(tmp_path / folder, 24, side)
        (tmp_path / folder / "a" / "000.png").write_bytes(b"no image")
        (tmp_path / folder / "a" / "x.psd").touch()
    evaluate("scratch:test_resnet", str(tmp_path / "train"), str(tmp_path / "test"), ["knn"])
    said = capfd.readouterr().err
    assert "Not read    2 .psd" in said
    assert "2 of 48 images cannot be read: " in said


@pytest.mark.parametrize("size", [None, 16, 40])
def test_images_too_small_for_a_network_are_refused_in_evaluation(tmp_path, make_images, size):
    from odcft.evaluation.comparison import evaluate

    with pytest.raises(OdcftError, match=r"cannot process images of \d+ pixels"):
        evaluate("scratch:alexnet", str(make_images(tmp_path, 8)), None, ["knn"], size=size)
