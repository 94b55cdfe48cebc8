"""Pretext training: tasks are learnt, and the rest of odcft can use the checkpoints."""

import json

import pytest
import torch

from odcft.pretexts.training import train_pretext


@pytest.mark.parametrize(
    ("task", "epochs", "above"), [("rotation", 5, 0.6), ("jigsaw", 6, 0.2), ("colorization", 6, 0.2)]
)
def test_a_task_is_learnt_and_its_checkpoint_can_be_loaded(
    tmp_path, rows_of_stripes, quick_recipe, task, epochs, above
):
    from odcft.backbone.load import load_backbone

    out = tmp_path / "out" / f"{task}.pth"
    values = train_pretext(task, rows_of_stripes, "test_resnet", out, quick_recipe(f"optim.epochs={epochs}"))
    assert values["accuracy"] > above > 2 * values["chance"]
    written = torch.load(out, weights_only=True)
    assert (written["arch"], written["epoch"], written["size"]) == ("test_resnet", epochs, 32)
    assert written["input"] == ("lab_l" if task == "colorization" else "rgb")
    loaded = load_backbone(out)
    assert loaded.match.coverage == 1
    assert loaded.backbone.eval()(torch.rand(2, 3, 32, 32)).shape == (2, loaded.backbone.width)


def test_unreadable_image_is_named_and_skipped(odcft_command, tmp_path, make_images):
    images = make_images(tmp_path / "images", 8)
    (images / "a" / "broken.png").write_bytes(b"no image")
    flags = ["--arch", "test_resnet", "--epochs", 2, "--out", tmp_path / "r.pth", "--json"]
    code, out, err = odcft_command("pretext", "rotation", images, *flags)
    assert code == 0
    assert json.loads(out)["unreadable"] == 1
    assert err.count("a/broken.png is skipped") == 1


def test_resumed_training_equals_uninterrupted(tmp_path, rows_of_stripes, quick_recipe):
    same = ["optim.schedule=step", "optim.final_epochs=0", "optim.epochs=2"]
    one = [*same, "optim.epochs=1"]
    train_pretext("rotation", rows_of_stripes, "test_resnet", tmp_path / "whole.pth", quick_recipe(*same))
    train_pretext("rotation", rows_of_stripes, "test_resnet", tmp_path / "parts.pth", quick_recipe(*one))
    train_pretext("rotation", rows_of_stripes, "test_resnet", tmp_path / "parts.pth", quick_recipe(*same), resume=True)
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
        ("unknown task", "There is no pretext task relative. Choose from rotation, jigsaw, colorization"),
        ("unknown network", "timm has no resnet19 (did you mean resnet"),
        ("no images", "nowhere does not exist. Give a folder of images"),
        ("output is there", "exists. Pass --resume to continue from it, --overwrite to replace it"),
        ("output is a folder", "exists"),
        ("nothing to resume", "does not exist, so there is nothing to resume"),
        ("not ours", "was not written by `odcft pretext`"),
        ("other task", "holds rotation of test_resnet, not jigsaw"),
        ("enough epochs", "has already been trained for 1 epochs"),
        ("one image", "is fewer than 2"),
        ("no feature maps", "colorization needs feature maps"),
        ("no patches", "test_vit cannot process patches of 14 pixels"),
        ("other size", "was trained at 32 pixels, not at 64"),
        ("only broken images", "can be read"),
        ("folder that cannot be", "cannot be written"),
        ("setting of finetune", "optim.skip_padding is for finetune"),
    ],
)
def test_mistakes_are_reported_in_one_line(odcft_command, tmp_path, make_images, case, message):
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
    elif case == "setting of finetune":
        extra = ["--set", "optim.skip_padding=true"]
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
