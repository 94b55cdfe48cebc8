"""Commands that odcft prints work when they are pasted, on this very data, whatever the paths are."""

import os
import re
import shlex
import subprocess

import pytest
import timm
import torch

from odcft.backbone.model_card import loading_code
from odcft.text import command

FOLDER = 'it\'s $(touch HACKED); `ls` & "more"'
QUICK = ["--set", "log.tensorboard=false", "--set", "optim.batch_size=4"]


@pytest.fixture
def here(tmp_path, make_images, make_checkpoint, monkeypatch):
    """A folder whose name a shell would trip over, with images in it, under the names that stand for the user's."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    make_images(folder / "images")
    for name in ("IMAGES", "LABELLED_IMAGES"):
        os.symlink(folder / "images", tmp_path / name)
    make_checkpoint(folder / "c.pth")
    return folder


@pytest.fixture
def paste(odcft_command):
    """A function: what was printed in, its only command is taken out and run as it is, with a few words more."""

    def paste(printed, *more):
        (line,) = re.findall(r"\bodcft (?:finetune|evaluate) .*", printed)
        # As a shell takes it apart.
        words = subprocess.run(
            ["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, text=True, check=True
        ).stdout
        code, _, err = odcft_command(*words.split("\0")[1:-1], *more)
        assert code == 0, err
        assert not os.path.exists("HACKED")
        return err

    return paste


def test_of_a_pretext_task(here, odcft_command, paste):
    task = ("pretext", "rotation", here / "images", "--out", here / "rotation.pth", "--arch", "test_resnet")
    code, _, err = odcft_command(*task, "--epochs", 1)
    assert code == 0, err
    assert "--recipe small" in err
    paste(paste(err, "--epochs", 1, *QUICK), "--json")


@pytest.mark.parametrize("part", [False, True])
def test_of_a_checkpoint(here, odcft_command, paste, part):
    options = []
    if part:
        torch.manual_seed(0)
        state = timm.create_model("test_resnet").state_dict()
        torch.save({"arch": "test_resnet", "state_dict": dict(list(state.items())[:40])}, here / "c.pth")
        options = ["--allow-partial"]
    code, _, err = odcft_command("inspect", here / "c.pth", *options)
    assert code == 0
    paste(err, "--epochs", 1, "--set", "data.size=32", *QUICK)


def test_of_a_transformer(here, odcft_command):
    torch.save(timm.create_model("test_vit").state_dict(), here / "vit.pth")
    code, _, err = odcft_command("inspect", here / "vit.pth", "--arch", "test_vit", "--input", "bgr")
    assert code == 0
    printed = err.strip().splitlines()[-1]
    assert printed.endswith("# more than 100,000 images: --recipe odc_vit")
    assert shlex.split(printed.split(":", 1)[1], comments=True)[4:] == [
        *("--out", "RUN", "--arch", "test_vit", "--input", "bgr", "--recipe", "small_vit"),
    ]


def test_of_a_memory(here, odcft_command, paste):
    settings = ["--recipe", "small", "--set", "neck.dim=8", "--set", "neck.hidden=16", "--seed", 3, "--input", "bgr"]
    code, _, err = odcft_command("init-memory", here / "c.pth", here / "images", "--out", here / "memory", *settings)
    assert code == 0
    paste(err, "--epochs", 1, *QUICK)


def test_options_that_are_not_given_are_left_out():
    given = {"arch": None, "allow_partial": True, "overwrite": False, "set": ["a=1", "b=[1, 2]"], "seed": 0}
    assert command("finetune", "a b", "c", out="RUN", **given) == (
        "odcft finetune 'a b' c --out RUN --allow-partial --set a=1 --set 'b=[1, 2]' --seed 0"
    )


def test_the_line_that_loads_a_backbone_is_python_whatever_the_folder_is(here):
    from odcft.exports import export

    loaded = {}
    for name in ("plain", 'a"b\\n'):
        backbone = export(here / "c.pth", here / name)
        exec(loading_code(backbone, str(here / name)), loaded)
        assert torch.equal(loaded["net"].state_dict()["conv1.0.weight"], backbone.net.state_dict()["conv1.0.weight"])
