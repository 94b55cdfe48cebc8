"""Which values of images with more than 8 bits a channel become black and white, also in a whole run."""

import json

import numpy as np
import pytest
import torch
from image_files import write_tiff
from PIL import Image

from odcft.backbone.load import load_backbone
from odcft.data.batches import Crops
from odcft.data.image_decoding import read_high_depth, read_image
from odcft.data.intensity_range import choose_range, median_shorter_side
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.first_memory import init_memory
from odcft.plan import view_for_evaluation
from odcft.pretexts.training import train_pretext
from odcft.recipe import load_recipe
from odcft.train import fine_tune


def twelve_bits(folder, count=24, depth=np.uint16, low=0, high=4095):
    """Write images of two classes whose values run from low to high."""
    for i in range(count):
        kind, draw = "ab"[i % 2], np.random.default_rng(i)
        base = draw.random((4, 4)) if kind == "a" else draw.random((1, 4)).repeat(4, 0)
        shape = Image.fromarray(base.astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
        values = np.asarray(shape).clip(0, 1)
        values = (low + (values - values.min()) / np.ptp(values) * (high - low)).astype(depth)
        path = folder / kind / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if depth == np.uint16:
            Image.fromarray(values).save(path)
        else:
            write_tiff(path.with_suffix(".tif"), values)
    return folder


def test_size_follows_small_images_but_not_beyond_the_network(tmp_path, make_images):
    assert median_shorter_side(find_images(make_images(tmp_path, 4, side=40))) == 40


def test_a_12_bit_set_is_scaled_to_its_range_with_a_note(tmp_path):
    images = find_images(twelve_bits(tmp_path, low=100))
    (low, high), words = choose_range(images)
    assert 100 <= low < 120
    assert 4000 < high <= 4095
    assert words.startswith("24 images of 16 bits use 6.1 % of their range: scaled to the range of the set, 10")
    shown = np.array(read_image(images.read(0), (low, high)))
    assert len(np.unique(shown)) > 150
    assert len(np.unique(read_image(images.read(0)))) < 18  # without scaling


@pytest.mark.parametrize(
    ("depth", "low", "high", "own"),
    [
        (np.uint16, 0, 65535, False),
        (np.uint16, 20_000, 60_000, False),
        (np.uint16, 0, 32_767, True),
        (np.int16, -1024, 3071, True),
        (np.int32, -10, 90_000, True),
        (np.uint32, 3e9, 3.1e9, True),
        (np.float32, 0, 1, False),
        (np.float32, 0.2, 0.9, False),
        (np.float32, 0.001, 0.1, True),
        (np.float32, 0, 255, True),
        (np.float32, -3, 3, True),
        (np.float32, 7, 7, False),
    ],
)
def test_the_range_of_the_set_is_chosen_if_it_is_less_than_half_of_the_types(tmp_path, depth, low, high, own):
    images = find_images(twelve_bits(tmp_path, 6, depth, low, high))
    found, words = choose_range(images)
    full = {"u": 65535, "f": 1}.get(np.dtype(depth).kind)
    assert ("scaled to the range of the set" in words) == own
    assert ("data.range=auto took full" in words) != own
    if own:
        assert low <= found[0] < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < found[1] <= high + 1e-6
    else:
        assert found == (0, full)
    assert choose_range(images, "full") == (read_high_depth(images.read(0)).limits, "")


def test_hot_pixels_and_a_bad_frame_do_not_set_the_range(tmp_path):
    twelve_bits(tmp_path, 60)
    images = find_images(tmp_path)
    before = choose_range(images)[0]
    for i in range(60):
        values = np.array(Image.open(images.path(i)))
        values[3, i % 32] = 65535 if i % 3 else 0
        Image.fromarray(values).save(images.path(i))
    Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(images.path(7))
    assert choose_range(images)[0] == pytest.approx(before, abs=60)


def test_nan_and_infinity_do_not_set_the_range(tmp_path):
    twelve_bits(tmp_path, 6, np.float32, 5, 10)
    for i, path in enumerate(sorted(tmp_path.rglob("*.tif"))):
        values = np.array(Image.open(path))
        values[:4], values[5:9] = np.nan, (np.inf, -np.inf)[i % 2]
        write_tiff(path, values if i else np.full((9, 9), np.nan, np.float32))
    low, high = choose_range(find_images(tmp_path))[0]
    assert 5 <= low < 5.2
    assert 9.8 < high <= 10


def test_8_bit_images_have_no_range_and_broken_ones_are_ignored(tmp_path, make_images):
    images = find_images(make_images(tmp_path, 6))
    (tmp_path / "a" / "000.png").write_text("broken")
    assert choose_range(images) == (None, "")
    twelve_bits(tmp_path / "deep", 2)
    Image.new("RGB", (12, 8)).save(tmp_path / "deep" / "x.png")
    found, words = choose_range(find_images(tmp_path))
    assert found[1] > 4000
    assert words.startswith("2 images of 16 bits use")


def test_several_types_in_one_set_are_reported_together(tmp_path):
    twelve_bits(tmp_path, 4)
    twelve_bits(tmp_path / "f", 4, np.float32, 0, 4000)
    found, words = choose_range(find_images(tmp_path))
    assert found[1] > 3900
    assert words.startswith("8 images of 16 bits and of floating point: scaled to the range of the set")
    twelve_bits(tmp_path, 4, high=65535)
    twelve_bits(tmp_path / "f", 4, np.float32, 0, 1)
    found, words = choose_range(find_images(tmp_path))
    assert found is None
    assert words == "8 images of 16 bits and of floating point: data.range=auto took full, the limits of their type."


def test_a_bounded_sample_spread_over_the_set_is_examined(tmp_path, monkeypatch):
    """The larger the images, the smaller the sample."""
    images = find_images(twelve_bits(tmp_path, 20))
    Image.fromarray(np.full((32, 32), 30_000, np.uint16)).save(images.path(1))
    found, words = choose_range(images, sample=10)
    assert found[1] < 4096
    assert words.startswith("10 images of 16 bits (of 10 examined) use")
    assert choose_range(images, sample=10) == (found, words)
    monkeypatch.setattr("odcft.data.intensity_range.median_shorter_side", lambda images: 100_000)
    assert "(of 10 examined)" in choose_range(images)[1]


QUICK = [
    "optim.batch_size=8",
    "log.interval=1",
    "neck.hidden=16",
    "neck.dim=8",
    "log.tensorboard=false",
    "optim.epochs=1",
]


def seen(view, images):
    """The pixels of all images, as the network sees them."""
    crops = Crops(images, view)
    return torch.stack([crops[0, i][0] for i in range(len(images))])


def test_memory_run_backbone_evaluation_and_export_see_the_same_pixels(tmp_path, make_checkpoint, capfd):
    data, checkpoint = str(twelve_bits(tmp_path / "images", low=90)), str(make_checkpoint(tmp_path / "c.pth"))
    images = find_images(data)
    init_memory(checkpoint, data, tmp_path / "memory", load_recipe("small", QUICK))
    said = capfd.readouterr().err
    assert said.count("24 images of 16 bits use 6.1 % of their range: scaled to the range of the set") == 1
    made = json.loads((tmp_path / "memory" / "memory.json").read_text())["recipe"]["data"]["range"]
    assert made == list(choose_range(images)[0])

    darker = np.array(Image.open(images.path(0))) // 8  # would give another range if it were chosen again
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", QUICK), memory=tmp_path / "memory")
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", QUICK), resume=True, epochs=2)
    assert "% of their range" not in capfd.readouterr().err
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.range == tuple(made)

    twelve_bits(tmp_path / "dark", high=300)
    Image.fromarray(darker).save(tmp_path / "dark" / "a" / "000.png")
    others = find_images(tmp_path / "dark")
    run = load_backbone(tmp_path / "run")
    folder = load_backbone(tmp_path / "run" / "backbone")
    view = View(32, 1.0, intensity=tuple(made))
    for loaded in (run, folder):
        assert view_for_evaluation(loaded, others, None) == view
        assert torch.equal(seen(view_for_evaluation(loaded, images, None), images), seen(view, images))
    assert len(seen(view, images)[0].unique()) > 150  # not 13 levels of gray
    results = evaluate(str(tmp_path / "run"), data, None, ["knn"])
    assert results["view"]["intensity"] == tuple(made)
    assert "is black, 4,0" in capfd.readouterr().err
    assert view_for_evaluation(load_backbone(checkpoint), images, None).intensity == tuple(
        made
    )  # no stored range: the same rule


def test_a_run_with_the_full_range_is_evaluated_with_it(tmp_path, make_checkpoint):
    data, checkpoint = str(twelve_bits(tmp_path / "images", 12)), str(make_checkpoint(tmp_path / "c.pth"))
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", [*QUICK, "data.range=full"]))
    fine_tune(checkpoint, data, tmp_path / "run", load_recipe("small", [*QUICK, "data.range=full"]), resume=True)
    assert view_for_evaluation(load_backbone(tmp_path / "run"), find_images(data), None).intensity == (0, 65535)


def test_memory_made_with_another_range_is_refused(tmp_path, make_checkpoint):
    data, checkpoint = str(twelve_bits(tmp_path / "images", 12)), str(make_checkpoint(tmp_path / "c.pth"))
    init_memory(checkpoint, data, tmp_path / "memory", load_recipe("small", [*QUICK, "data.range=[0, 4095]"]))
    for other in ("full", "[0, 5000]"):
        recipe = load_recipe("small", [*QUICK, f"data.range={other}"])
        with pytest.raises(OdcftError, match=r"was made with data.range=\[0.0, 4095.0\], but this run has data.range="):
            fine_tune(checkpoint, data, tmp_path / "run", recipe, memory=tmp_path / "memory")
    recipe = load_recipe("small", [*QUICK, "data.range=[0, 4095]"])
    fine_tune(checkpoint, data, tmp_path / "run", recipe, memory=tmp_path / "memory")
    about = tmp_path / "memory" / "memory.json"
    old = json.loads(about.read_text())
    del old["recipe"]["data"]["range"]  # as in memories written before data.range existed
    about.write_text(json.dumps(old))
    fine_tune(checkpoint, data, tmp_path / "old", load_recipe("small", QUICK), memory=tmp_path / "memory")
    assert load_recipe(tmp_path / "old" / "recipe.yaml").data.range == (0, 65535)


@pytest.mark.parametrize("bad", ["[5, 5]", "[9, 1]", "[.nan, 1]", "[0, .inf]", "half", "[1]"])
def test_a_range_whose_black_is_not_below_white_is_refused(bad):
    with pytest.raises(OdcftError, match=r"data\.range"):
        load_recipe("small", [f"data.range={bad}"])


@pytest.mark.parametrize("task", ["rotation", "colorization"])
def test_a_pretext_checkpoint_stores_the_range_it_was_trained_with(tmp_path, task, capfd):
    data = str(twelve_bits(tmp_path / "images", 12))
    out, recipe = tmp_path / "p.pth", load_recipe("pretext", ["optim.epochs=1", "optim.batch_size=4", "data.size=32"])
    train_pretext(task, data, "test_resnet", out, recipe)
    assert capfd.readouterr().err.count("12 images of 16 bits use") == 1
    made = choose_range(find_images(data))[0]
    assert load_backbone(out).backbone.input.intensity == made
    recipe.optim.epochs = 2
    train_pretext(task, data, "test_resnet", out, recipe, resume=True)
    assert torch.load(out, weights_only=True)["intensity"] == list(made)
    recipe.data.range = (0, 300)
    with pytest.raises(OdcftError, match=r"was trained with data\.range"):
        train_pretext(task, data, "test_resnet", out, recipe, resume=True)


def test_set_and_percentiles_are_those_of_the_values(tmp_path):
    twelve_bits(tmp_path, 10, low=100, high=4000)
    images = find_images(tmp_path)
    values = np.concatenate([np.asarray(Image.open(images.path(i))).ravel() for i in range(10)])
    found, words = choose_range(images, "set")
    assert found == (values.min(), values.max()) == (100, 4000)
    assert words == (
        "10 images of 16 bits: scaled by data.range=set, their smallest and largest value: "
        "100 is black, 4,000 is white."
    )
    found, words = choose_range(images, "2%..97.5%")
    assert found == pytest.approx(np.percentile(values, [2, 97.5]))
    assert "scaled by data.range=2%..97.5%, their percentiles: " in words
    for index in range(10):
        Image.fromarray(np.full((8, 8), 77, np.uint16)).save(images.path(index))
    for rule in ("set", "1%..99%"):
        with pytest.raises(OdcftError, match=f"data.range={rule} cannot be used: .* would both be 77"):
            choose_range(images, rule)


def test_a_rule_for_8_bit_images_is_said_to_change_nothing(tmp_path, make_images):
    images = find_images(make_images(tmp_path, 4))
    for rule in ("set", "1%..99%"):
        said = f"data.range={rule} changes nothing: no image has more than 8 bits a channel."
        assert choose_range(images, rule) == (None, said)


@pytest.mark.parametrize("bad", ["99%..1%", "1%..101%", "1..99", "1%-99%", "%..9%", "5%..5%", "least"])
def test_percentiles_that_are_none_are_refused(bad):
    with pytest.raises(OdcftError, match=r"data\.range"):
        load_recipe("small", [f"data.range={bad}"])


@pytest.mark.parametrize("rule", ["set", "1%..99%"])
def test_what_a_rule_gave_travels_with_memory_run_and_backbone(tmp_path, make_checkpoint, rule, capfd):
    data, checkpoint = str(twelve_bits(tmp_path / "images", low=90)), str(make_checkpoint(tmp_path / "c.pth"))
    recipe = load_recipe("small", [*QUICK, f"data.range={rule}"])
    init_memory(checkpoint, data, tmp_path / "memory", recipe)
    made = tuple(json.loads((tmp_path / "memory" / "memory.json").read_text())["recipe"]["data"]["range"])
    assert made == choose_range(find_images(data), rule)[0]
    fine_tune(checkpoint, data, tmp_path / "run", recipe, memory=tmp_path / "memory")
    fine_tune(checkpoint, data, tmp_path / "run", recipe, resume=True, epochs=2)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.range == made
    assert load_backbone(tmp_path / "run" / "backbone").backbone.input.intensity == made
    assert f"{made[0]:g} is black" in (tmp_path / "run" / "backbone" / "README.md").read_text()
    assert evaluate(str(tmp_path / "run"), data, None, ["knn"])["view"]["intensity"] == made
    other = load_recipe("small", [*QUICK, "data.range=3%..50%"])
    with pytest.raises(OdcftError, match=r"was made with data\.range="):
        fine_tune(checkpoint, data, tmp_path / "other", other, memory=tmp_path / "memory")
