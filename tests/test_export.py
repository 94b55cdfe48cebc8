import pytest
import timm
import torch

from odcft.backbone import load_backbone
from odcft.errors import OdcftError
from odcft.export import export


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_convnext"])
def test_timm_loads_the_exported_folder(tmp_path, arch):
    torch.manual_seed(3)
    torch.save({"state_dict": timm.create_model(arch).state_dict(), "arch": arch}, tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / "out")
    ours = load_backbone(tmp_path / "c.pth").backbone
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, 3, ours.size, ours.size)
    with torch.no_grad():
        assert torch.allclose(ours.net(images), theirs(images), atol=1e-5)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)(images).shape == (2, 7)
    assert tuple(theirs.pretrained_cfg["mean"]) == ours.mean


def test_exported_folder_is_a_checkpoint_again(tmp_path, make_checkpoint):
    export(make_checkpoint(tmp_path / "c.pth"), tmp_path / "out")
    first, second = (load_backbone(p).backbone.net.state_dict() for p in (tmp_path / "c.pth", tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("format", ["safetensors", "torchvision"])
def test_files_carry_the_networks_names(tmp_path, format):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / f"out.{format}", format)
    assert load_backbone(tmp_path / f"out.{format}").match.share == 1
    if format == "torchvision":
        import torchvision

        missing = torchvision.models.resnet18().load_state_dict(torch.load(tmp_path / "out.torchvision"), strict=False)
        assert missing.missing_keys == ["fc.weight", "fc.bias"]
        assert not missing.unexpected_keys


def test_what_cannot_be_is_refused_and_nothing_is_overwritten(tmp_path, make_checkpoint):
    checkpoint = make_checkpoint(tmp_path / "c.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OdcftError, match="exists"):
        export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    with pytest.raises(OdcftError, match="torchvision has no test_resnet"):
        export(checkpoint, tmp_path / "o.pth", "torchvision")
    with pytest.raises(OdcftError, match="no such format"):
        export(checkpoint, tmp_path / "o.pth", "tensorflow")
    assert not (tmp_path / "o.pth").exists()
    with pytest.raises(OdcftError, match="cannot be written"):
        export(checkpoint, checkpoint / "inside" / "a file")
