"""Arguments of the wrong type, given from Python, are refused in one sentence before anything is read."""

import pytest

import odcft

WRONG = [
    *(("protocol", value) for value in (None, 3, ["svm", 3], {"svm": 1}, b"svm", "", [])),
    *((name, value) for name in ("layers", "crop", "accelerator") for value in (None, 3, ["last"], "x")),
    *((name, value) for name in ("arch", "input", "part") for value in (3, ["rgb"], b"rgb")),
    *((name, value) for name in ("per_class", "allow_partial", "progress") for value in (None, "yes", 1)),
    *(("size", value) for value in ("224", 3.5, True, 0, -1, 10**6, [32])),
    *(("arch_args", value) for value in (3, ["a=1"], {3: 1}, {"x": 1}, "x", {"patch_size": object()})),
    *(("reader", value) for value in (3, "no_colon", ["a:b"])),
    *(("test", value) for value in (3, ["a"], "")),
    *(("features", value) for value in (3, b"f.npz", "none.npz")),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_argument_is_refused_by_one_sentence(name, value, tmp_path):
    with pytest.raises(odcft.OdcftError) as refused:
        odcft.evaluate("scratch:test_resnet", tmp_path / "none", **{name: value})
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 600
    assert "Traceback" not in said


@pytest.mark.parametrize("place", [3, [], ["c.pth", 3], b"c", object(), None, {"a"}])
def test_a_wrong_checkpoint_or_folder(place, tmp_path):
    for ckpt, data in ((place, tmp_path), ("scratch:test_resnet", place)):
        with pytest.raises(odcft.OdcftError):
            odcft.evaluate(ckpt, data)
        with pytest.raises(odcft.OdcftError):
            odcft.embed(ckpt, data)
