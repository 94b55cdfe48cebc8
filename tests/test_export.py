import pytest
import timm
import torch

from odcft.backbone import load_backbone
from odcft.errors import OdcftError
from odcft.exports import export
from odcft.networks import build


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
    assert tuple(theirs.pretrained_cfg["mean"]) == ours.input.mean


def alexnet_with_sobel():
    net = build("alexnet_deepcluster")
    return {f"features.module.{name}": tensor for name, tensor in as_deepcluster(net.state_dict())}


def as_deepcluster(state):
    places = {
        f"{kind}{n}": place + (kind == "bn") for n, place in enumerate((0, 4, 8, 11, 14), 1) for kind in ("conv", "bn")
    }
    for name, tensor in state.items():
        layer, leaf = name.split(".")
        yield f"{places[layer]}.{leaf}", tensor


def resnet_of_lightness():
    net = build("resnet50", in_chans=1)
    return {f"_feature_blocks.{name}": tensor for name, tensor in net.state_dict().items()}


KINDS = {
    "timm resnet": lambda: timm.create_model("resnet18").state_dict(),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224").state_dict(),
    "timm convnext": lambda: timm.create_model("convnext_atto").state_dict(),
    "alexnet with sobel": alexnet_with_sobel,
    "resnet50 of lightness": resnet_of_lightness,
}


@pytest.mark.parametrize("format", ["timm", "safetensors", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_features_are_those_of_the_checkpoint(kind, format, tmp_path):
    torch.manual_seed(1)
    torch.save({"model_state_dict": KINDS[kind]()}, tmp_path / "c.pth")
    ours = load_backbone(tmp_path / "c.pth").backbone
    export(tmp_path / "c.pth", tmp_path / "out", format)
    images = torch.rand(4, 3, ours.size, ours.size)
    with torch.no_grad():
        features = ours(images)
        if format == "onnx":
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(str(tmp_path / "out"))
            again = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            assert (again - features).abs().max() <= 1e-4 * features.abs().max()
            return
        backbone = load_backbone(tmp_path / "out").backbone
        assert backbone.input == ours.input
        assert backbone.kwargs == ours.kwargs
        assert (backbone(images) - features).abs().max() <= 1e-5 * features.abs().max()
    if format == "timm":
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("odcft.load_backbone" in card) == (kind in ("alexnet with sobel", "resnet50 of lightness"))


def test_timm_refuses_by_name_what_it_would_build_otherwise(tmp_path):
    """A stage of stride 1 cannot be said to timm; it must not build the usual network and say nothing."""
    torch.save({"model_state_dict": resnet_of_lightness()}, tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / "out")
    with pytest.raises(TypeError, match="last_stride"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


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
