import copy
import json

import pytest
import timm
import torch

from odcft.backbone.input_resizing import patch_side, resized, size_step
from odcft.backbone.load import load_backbone
from odcft.backbone.network import Backbone
from odcft.data.view import View
from odcft.errors import OdcftError

FINE_TUNE = ["--recipe", "odc_vit", "--epochs", 1, "--set", "optim.batch_size=4", "--set", "optim.warmup_epochs=0"]


def timm_file(path, arch, size=None, seed=0):
    """A file of random weights, positions among them, as timm's training code saves it; and its tensors."""
    torch.manual_seed(seed)
    state = timm.create_model(arch, num_classes=0, **({"img_size": size} if size else {})).state_dict()
    state |= {name: torch.randn_like(tensor) * 0.1 for name, tensor in state.items() if "pos" in name}
    torch.save(state, path)
    return state


def timms_own(arch, path, size):
    """timm's network for another size, with the weights of a file that timm reads itself."""
    overlay = {"file": str(path), "num_classes": 0, "hf_hub_id": None}
    return timm.create_model(arch, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay).eval()


@torch.no_grad()
def features(net, size):
    return net(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("arch", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
@pytest.mark.parametrize("size", [48, 64, 192])
def test_another_size_gives_timms_own_resampling(tmp_path, arch, size):
    timm_file(tmp_path / "c.pth", arch)
    backbone = load_backbone(tmp_path / "c.pth", arch).backbone
    backbone.resize(size)
    assert (backbone.size, backbone.arch_args["img_size"]) == (size, size)
    assert torch.equal(features(backbone.net, size), features(timms_own(arch, tmp_path / "c.pth", size), size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("vit_small_patch14_dinov2", (98, 224)),
        ("vit_tiny_patch16_224", (64, 96)),
        ("flexivit_small", (96,)),
        ("swin_tiny_patch4_window7_224", (96, 192)),
        ("swinv2_tiny_window8_256", (96, 224)),
        ("maxvit_nano_rw_256", (224,)),
        ("eva02_tiny_patch14_224", (98,)),
        ("vit_relpos_small_patch16_224", (96,)),
    ],
)
def test_many_families_give_timms_own_resampling(tmp_path, arch, sizes):
    timm_file(tmp_path / "c.pth", arch)
    for size in sizes:
        backbone = load_backbone(tmp_path / "c.pth", arch).backbone
        backbone.resize(size)
        assert torch.equal(features(backbone.net, size), features(timms_own(arch, tmp_path / "c.pth", size), size))


def test_its_own_size_changes_nothing(tmp_path):
    timm_file(tmp_path / "c.pth", "test_vit")
    backbone = load_backbone(tmp_path / "c.pth").backbone
    net, before = backbone.net, copy.deepcopy(backbone.net.state_dict())
    backbone.resize(160)
    assert backbone.net is net
    assert backbone.arch_args == {}
    again = resized(net, "test_vit", {}, 160).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_a_tag_of_timms_weights_asks_no_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **more: pytest.fail("asked the hub"))
    backbone = Backbone("test_vit.r160_in1k").eval()
    small = resized(backbone.net, backbone.arch, {}, 64)
    assert torch.equal(small.patch_embed.proj.weight, backbone.net.patch_embed.proj.weight)
    assert "state_dict" not in {name for name, value in small.pretrained_cfg.items() if value}


def test_a_network_of_any_size_is_left_alone():
    backbone = load_backbone("scratch:test_resnet").backbone
    net = backbone.net
    backbone.resize(40)
    assert backbone.net is net
    assert backbone.why_not(40) == ""
    assert backbone.size != 40


def test_a_size_between_patches_is_refused():
    backbone = load_backbone("scratch:test_vit").backbone
    with pytest.raises(OdcftError, match="a multiple of 16 pixels, not 100: try 96 or 112"):
        backbone.resize(100)
    assert "not 8: try 16" in backbone.why_not(8)
    assert backbone.size == 160


@pytest.mark.slow
def test_a_network_that_timm_cannot_resample_keeps_its_size():
    backbone = load_backbone("scratch:mixer_s32_224").backbone
    with pytest.raises(OdcftError, match="takes images of 224 pixels only, not 96"):
        backbone.resize(96)


def test_other_channels_survive(tmp_path):
    backbone = load_backbone("scratch:test_vit", input="gray").backbone
    first = backbone.net.patch_embed.proj.weight.clone()
    backbone.set_view(View(64))
    assert torch.equal(backbone.net.patch_embed.proj.weight, first)
    assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, backbone.width)


@pytest.mark.parametrize(
    ("arch", "own", "patch", "step"),
    [
        ("vit_small_patch14_dinov2", 518, 14, 14),
        ("vit_base_patch14_dinov2", 384, 14, 14),  # SigLIP's has 384 pixels, of which the last 6 are in no patch
        ("swin_tiny_patch4_window7_224", 224, 4, 32),
        ("maxvit_nano_rw_256", 256, 32, 32),
        ("crossvit_9_240", 240, 1, 1),  # timm says it shrinks images 17 times
    ],
)
def test_patches_and_stages_say_which_sizes_suit(arch, own, patch, step):
    with torch.device("meta"):
        net = timm.create_model(arch)
    assert (patch_side(net, own), size_step(net, own)) == (patch, step)


def _fine_tune_and_load_in_timm(tmp_path, make_images, odcft_command, ckpt, size):
    data = make_images(tmp_path / "data", side=max(size, 32))
    run = tmp_path / "run"
    code, _, err = odcft_command("finetune", ckpt, data, "--out", run, *FINE_TUNE, "--set", f"data.size={size}")
    assert code == 0, err
    code, _, err = odcft_command("export", run, tmp_path / "out")
    assert code == 0, err
    for folder in (run / "backbone", tmp_path / "out"):
        config = json.loads((folder / "config.json").read_text())
        built_for = config.get("model_args", {}).get("img_size")
        assert built_for == size or (built_for is None and load_backbone(ckpt).backbone.size == size)
        assert config["pretrained_cfg"]["input_size"] == [3, size, size]
        ours = load_backbone(folder).backbone
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        assert ours.size == theirs.pretrained_cfg["input_size"][-1] == size
        assert torch.equal(features(ours.net, size), features(theirs, size))


def test_a_run_at_another_size_loads_in_timm(tmp_path, make_images, odcft_command):
    timm_file(tmp_path / "c.pth", "test_vit")
    _fine_tune_and_load_in_timm(tmp_path, make_images, odcft_command, tmp_path / "c.pth", 48)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 98, 56])
def test_dinov2_small_at_any_size(tmp_path, make_images, odcft_command, size):
    timm_file(tmp_path / "c.pth", "vit_small_patch14_dinov2")
    _fine_tune_and_load_in_timm(tmp_path, make_images, odcft_command, tmp_path / "c.pth", size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 96, 64])
def test_vit_tiny_at_any_size(tmp_path, make_images, odcft_command, size):
    timm_file(tmp_path / "c.pth", "vit_tiny_patch16_224")
    _fine_tune_and_load_in_timm(tmp_path, make_images, odcft_command, tmp_path / "c.pth", size)


@pytest.mark.slow
def test_memory_resume_evaluation_and_members_at_another_size(tmp_path, make_images, make_checkpoint, odcft_command):
    def run(*args):
        code, out, err = odcft_command(*args)
        assert code == 0, err
        return out

    timm_file(tmp_path / "vit.pth", "test_vit")
    ckpt, data, few = tmp_path / "vit.pth", make_images(tmp_path / "data", count=24, side=64), FINE_TUNE
    run("init-memory", ckpt, data, "--out", tmp_path / "memory", *few[:2], *few[4:])
    run("finetune", ckpt, data, "--memory", tmp_path / "memory", "--out", tmp_path / "run", *few)
    run("finetune", ckpt, data, "--out", tmp_path / "run", "--resume", "--epochs", 2)
    told = json.loads(run("evaluate", tmp_path / "run", data, "--protocol", "knn", "--json"))
    assert told["view"]["size"] == 64
    alone = json.loads(run("evaluate", ckpt, data, "--protocol", "knn", "--json", "--size", 64))
    assert told["before"]["knn"]["top1"] == alone["knn"]["top1"]
    other = make_checkpoint(tmp_path / "resnet.pth")
    run("finetune", ckpt, other, data, "--method", "codc", "--out", tmp_path / "codc", *few)
    assert load_backbone(tmp_path / "codc" / "backbone").backbone.size == 64


@pytest.mark.slow
def test_a_pretext_task_at_another_size_is_resumed_and_fine_tuned(tmp_path, make_images, odcft_command):
    data = make_images(tmp_path / "data")
    task = ("pretext", "rotation", data, "--arch", "test_vit", "--out", tmp_path / "p.pth")
    size = ("--set", "data.size=48", "--set", "optim.batch_size=4")
    assert odcft_command(*task, "--epochs", 1, *size)[0] == 0
    assert odcft_command(*task, "--epochs", 2, "--resume", *size)[0] == 0
    assert load_backbone(tmp_path / "p.pth").backbone.arch_args == {"img_size": 48}
    code, _, err = odcft_command("finetune", tmp_path / "p.pth", data, "--out", tmp_path / "run", *FINE_TUNE)
    assert code == 0, err
    assert "built for 32" in err
