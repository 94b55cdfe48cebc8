"""What run.json records: checkpoints, and checksums of a sample of the images."""

from odcft import files
from odcft.data.images import Images
from odcft.run.run_json import checksums, made_from


def test_about_one_checkpoint_or_several(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    images = Images(tmp_path, tmp_path, ["a"])
    one, two = made_from([a], ["x"], "data", images), made_from([a, b], ["x", "y"], "data", images)
    sums = [files.file_sha256(tmp_path / name) for name in "ab"]
    assert one == {"checkpoint": a, "sha256": sums[0], "arch": "x", "data": "data", "images": 1}
    assert two == {"checkpoint": [a, b], "sha256": sums, "arch": ["x", "y"], "data": "data", "images": 1}


def test_sample_of_images_is_spread_over_the_set(tmp_path):
    names = [f"{i:03d}" for i in range(10)]
    for name in names[:-1]:
        (tmp_path / name).write_text(name)
    images = Images(tmp_path, tmp_path, names)
    assert list(checksums(images, 3)) == ["000", "003", "006"]
    assert list(checksums(images, 100)) == names[:-1]
    assert checksums(images)["000"] == files.file_sha256(tmp_path / "000")
