"""Pretext tasks: puzzles that can be solved by looking, and checkpoints that the rest of odcft takes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from odcft.data.lab_colors import colours, lab, nearest_colour
from odcft.data.sources import find_images
from odcft.pretexts.colorization import rebalancing
from odcft.pretexts.jigsaw import cut, orders
from odcft.pretexts.training import train_pretext
from odcft.recipe import load_recipe


@pytest.mark.parametrize(
    ("rgb", "expected"),  # scikit-image 0.25, rgb2lab
    [
        ((1.0, 0.0, 0.0), (53.2405, 80.0923, 67.2028)),
        ((0.0, 1.0, 0.0), (87.7351, -86.1813, 83.1775)),
        ((0.0, 0.0, 1.0), (32.2957, 79.1870, -107.8617)),
        ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((0.2, 0.4, 0.6), (42.0099, -0.1500, -32.8458)),
    ],
)
def test_lab_is_that_of_the_books(rgb, expected):
    assert lab(torch.tensor(rgb).view(1, 3, 1, 1)).flatten().tolist() == pytest.approx(expected, abs=0.01)


def test_lab_is_the_same_under_autocast():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = lab(images)
    assert torch.equal(inside, lab(images))


def test_every_colour_of_srgb_is_near_its_class():
    everything = colours()
    ab = lab(torch.rand(1000, 3, 1, 1, generator=torch.Generator().manual_seed(0)))[:, 1:].flatten(1)
    assert (ab - everything[nearest_colour(ab, everything)]).abs().max() <= 10
    assert nearest_colour(torch.tensor([[[1.0, -2.0]]]), everything).shape == (1, 1)


def test_orders_of_patches_are_far_apart():
    chosen = orders(9, 20)
    assert chosen[0].tolist() == list(range(9))
    assert torch.equal(chosen.sort(1).values, torch.arange(9).expand(20, 9))
    distances = (chosen.unsqueeze(0) != chosen.unsqueeze(1)).sum(2)[~torch.eye(20, dtype=torch.bool)]
    assert distances.min() >= 7
    assert len(orders(4, 24).unique(dim=0)) == 24


def test_patches_stay_within_their_cells_and_leave_gaps():
    H = 32
    place = torch.arange(H * H, dtype=torch.float32).view(1, 1, H, H).expand(50, 1, H, H)
    patches = cut(place, 2, torch.Generator().manual_seed(0)).view(50, 4, 14, 14)
    for cell in range(4):
        rows, columns = patches[:, cell] // H, patches[:, cell] % H
        assert rows.min() == 16 * (cell // 2)
        assert rows.max() == 16 * (cell // 2) + 15
        assert columns.min() == 16 * (cell % 2)
        assert columns.max() == 16 * (cell % 2) + 15
    gaps = (patches[:, 1, 0, 0] - patches[:, 0, 0, 13]) % H - 1
    assert 0 <= gaps.min() < gaps.max() <= 4


def test_rare_colours_weigh_more(tmp_path):
    for i in range(9):
        Image.new("RGB", (16, 16), (200, 30, 30) if i else (30, 30, 200)).save(tmp_path / f"{i}.png")
    everything = colours()
    weights = rebalancing(find_images(tmp_path), 16, everything)
    red, blue = (
        weights[nearest_colour(lab(torch.tensor(c).view(1, 3, 1, 1) / 255)[:, 1:].flatten(1), everything)]
        for c in ((200.0, 30.0, 30.0), (30.0, 30.0, 200.0))
    )
    assert blue > 2 * red
    assert weights.isfinite().all()


@pytest.fixture
def rows_of_stripes(tmp_path):
    """Images with a bright top and a red left: every task can be solved."""
    draw = np.random.default_rng(0)
    for i in range(96):
        pixels = draw.integers(0, 40, (32, 32, 3))
        pixels[:12] += 150
        pixels[:, :12, 0] += 60
        pixels[:, 20:, 1] += int(draw.integers(0, 30))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02d}.png")
    return str(tmp_path)


QUICK = ["optim.batch_size=16", "optim.lr=0.1", "augment.flip=0", "augment.crop_scale=[0.9, 1]", "augment.gray=0"]


@pytest.mark.parametrize(
    ("task", "epochs", "above"), [("rotation", 5, 0.6), ("jigsaw", 6, 0.2), ("colorization", 6, 0.2)]
)
def test_a_task_is_learnt_and_its_checkpoint_is_recognised(tmp_path, rows_of_stripes, task, epochs, above):
    from odcft.backbone.load import load_backbone

    out = tmp_path / "out" / f"{task}.pth"
    values = train_pretext(
        task, rows_of_stripes, "test_resnet", out, load_recipe("pretext", [*QUICK, f"optim.epochs={epochs}"])
    )
    assert values["accuracy"] > above > 2 * values["chance"]
    written = torch.load(out, weights_only=True)
    assert (written["arch"], written["epoch"], written["size"]) == ("test_resnet", epochs, 32)
    assert written["input"] == ("lab_l" if task == "colorization" else "rgb")
    loaded = load_backbone(out)
    assert loaded.match.share == 1
    assert loaded.backbone.eval()(torch.rand(2, 3, 32, 32)).shape == (2, loaded.backbone.width)


def test_unreadable_image_is_named_and_skipped(odcft_command, tmp_path, make_images):
    images = make_images(tmp_path / "images", 8)
    (images / "a" / "broken.png").write_bytes(b"no image")
    flags = ["--arch", "test_resnet", "--epochs", 2, "--out", tmp_path / "r.pth", "--json"]
    code, out, err = odcft_command("pretext", "rotation", images, *flags)
    assert code == 0
    assert json.loads(out)["unreadable"] == 1
    assert err.count("a/broken.png is skipped") == 1


def test_a_lightness_network_is_fine_tuned_on_colour_images_and_stays_one(tmp_path, rows_of_stripes):
    import timm

    from odcft.train import fine_tune

    out = tmp_path / "out" / "c.pth"
    train_pretext(
        "colorization", rows_of_stripes, "test_resnet", out, load_recipe("pretext", [*QUICK, "optim.epochs=1"])
    )
    fine_tune(str(out), rows_of_stripes, tmp_path / "run", load_recipe("small", ["optim.epochs=1"]))
    net = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True, num_classes=0)
    assert net.conv1[0].weight.shape[1] == 1


def test_jigsaw_in_bfloat16_leaves_finite_weights_that_no_patch_has_touched(tmp_path, rows_of_stripes):
    """One-pixel maps: torch's own bfloat16 gradients of taps that see only padding are whatever was in memory."""
    out = tmp_path / "j.pth"
    recipe = load_recipe("pretext", [*QUICK, "optim.epochs=1", "optim.precision=bfloat16"])
    train_pretext("jigsaw", rows_of_stripes, "resnet18", out, recipe)
    weights = torch.load(out)["state_dict"]["backbone.layer4.0.conv1.weight"]
    assert weights.abs().max() < 1


def test_resumed_training_equals_uninterrupted(tmp_path, rows_of_stripes):
    same = [*QUICK, "optim.schedule=step", "optim.final_epochs=0", "optim.epochs=2"]
    one = [*same, "optim.epochs=1"]
    train_pretext("rotation", rows_of_stripes, "test_resnet", tmp_path / "whole.pth", load_recipe("pretext", same))
    train_pretext("rotation", rows_of_stripes, "test_resnet", tmp_path / "parts.pth", load_recipe("pretext", one))
    train_pretext(
        "rotation", rows_of_stripes, "test_resnet", tmp_path / "parts.pth", load_recipe("pretext", same), resume=True
    )
    whole, parts = (torch.load(tmp_path / f"{name}.pth")["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_command(odcft_command, tmp_path, make_images):
    images = make_images(tmp_path / "images", 8)
    flags = ["--arch", "test_resnet", "--epochs", 1]
    code, out, err = odcft_command("pretext", "jigsaw", images, *flags, "--out", tmp_path / "j.pth", "--json")
    assert code == 0, err
    assert json.loads(out)["chance"] == pytest.approx(1 / 24)
    code, _, err = odcft_command(
        "finetune", tmp_path / "j.pth", images, "--recipe", "small", "--epochs", 1, "--out", tmp_path / "run"
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown task", "relative: no such pretext task. Choose from rotation, jigsaw, colorization"),
        ("unknown network", "timm has no resnet19 (did you mean resnet"),
        ("no images", "no such folder"),
        ("output is there", "exists. Pass --resume to go on with it, --overwrite to replace it"),
        ("output is a folder", "exists"),
        ("nothing to resume", "no such file to resume from"),
        ("not ours", "was not written by `odcft pretext`"),
        ("other task", "holds rotation of test_resnet, not jigsaw"),
        ("enough epochs", "has had its 1 epochs"),
        ("one image", "is less than 2"),
        ("no feature maps", "colorization needs feature maps"),
        ("no patches", "test_vit cannot look at patches of 46 pixels"),
        ("other size", "was trained at 32 pixels, not at 64"),
        ("only broken images", "can be read"),
        ("folder that cannot be", "cannot be written"),
    ],
)
def test_mistakes_end_in_one_sentence(odcft_command, tmp_path, make_images, case, message):
    images, out, task, arch, extra = (
        make_images(tmp_path / "images", 4),
        tmp_path / "o.pth",
        "rotation",
        "test_resnet",
        [],
    )
    if case == "unknown task":
        task = "relative"
    elif case == "unknown network":
        arch = "resnet19"
    elif case == "no images":
        images = tmp_path / "nowhere"
    elif case == "output is there":
        out.write_text("thesis")
    elif case == "output is a folder":
        out, extra = tmp_path / "images", ["--overwrite"]
    elif case == "nothing to resume":
        extra = ["--resume"]
    elif case == "not ours":
        torch.save({"state_dict": {}}, out)
        extra = ["--resume"]
    elif case in ("other task", "enough epochs", "other size"):
        assert odcft_command("pretext", "rotation", images, "--arch", arch, "--epochs", 1, "--out", out)[0] == 0
        task, extra = "jigsaw" if case == "other task" else task, ["--resume"]
        extra += ["--set", "data.size=64"] if case == "other size" else []
    elif case == "one image":
        images = make_images(tmp_path / "one", 1)
    elif case in ("no feature maps", "no patches"):
        task, arch = "colorization" if case == "no feature maps" else "jigsaw", "test_vit"
    elif case == "only broken images":
        images = tmp_path / "broken"
        images.mkdir()
        for i in range(4):
            (images / f"{i}.jpg").write_bytes(b"x")
    elif case == "folder that cannot be":
        (tmp_path / "file").write_text("x")
        out = tmp_path / "file" / "o.pth"
    before = out.read_bytes() if out.is_file() else None
    code, stdout, err = odcft_command("pretext", task, images, "--arch", arch, "--epochs", 1, "--out", out, *extra)
    assert code == 2, err
    assert stdout == ""
    assert message in err
    assert "Traceback" not in err
    assert before is None or out.read_bytes() == before
