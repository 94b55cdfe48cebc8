"""Every known layout of public self-supervised code loads from its path alone, to the bit, into its own network."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from write_layout import LAYOUTS, write

from odcft.backbone.inspection import describe
from odcft.backbone.load import load_backbone
from odcft.backbone.non_timm_networks import NETWORKS

HEADS = {"fc.weight", "fc.bias", "head.weight", "head.bias", "classifier.6.weight", "classifier.6.bias"}
COLORS = {"Lab L": "lab_l", "Lab L only": "lab_l", "Lab L + ab hints + mask": "lab_l", "RGB": "rgb", "BGR": "bgr"}
LAYERS = {
    "conv": lambda a: nn.Conv2d(a["i"], a["o"], a["k"], a["s"], a["p"], a.get("d", 1), a["groups"], a["bias"]),
    "bn": lambda a: nn.BatchNorm2d(a["c"]),
    "bn1d": lambda a: nn.BatchNorm1d(a["c"]),
    "relu": lambda a: nn.ReLU(),
    "maxpool": lambda a: nn.MaxPool2d(a["k"], a["s"], a["p"]),
    "lrn": lambda a: nn.LocalResponseNorm(a["size"], a["alpha"], a["beta"], a["k"]),
    "flatten": lambda a: nn.Flatten(),
    "linear": lambda a: nn.Linear(a["i"], a["o"], a["bias"]),
}


# One of each container and kind of rename; the others are large, and slow.
QUICK = {
    *(
        "dino_vits16_backbone",
        "mocov3_vits16",
        "moco_v2_rn50",
        "rotnet_nin_cifar10",
        "jigsaw_pytorch_alexnet",
        "timm_hf_dir_vit_small_safetensors",
    ),
    *("fair_caffe2_rn50_jigsaw", "torchvision_resnet50_2017_tar", "vissl_alexnet_rotnet", "openselfsup_odc_full"),
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_layout_loads_and_computes_what_its_authors_code_does(name, tmp_path):
    layout, wanted = write(name, tmp_path / "model")  # no ending: the bytes tell
    loaded = load_backbone(tmp_path / "model")
    backbone = loaded.backbone
    state = backbone.net.state_dict()
    missing = set(wanted) - set(state)
    assert missing <= HEADS
    assert set(loaded.match.tensors) == set(wanted) - missing, "nothing else may be taken for the backbone"
    assert all(torch.equal(state[key], wanted[key]) for key in loaded.match.tensors)
    told, _ = describe(loaded)
    assert told["matched"] == told["expected"] == len(loaded.match.tensors)
    assert told["input"]["color"] == (
        "sobel" if "sobel" in layout["input"] else COLORS[layout["input"]["channel_order"]]
    )
    assert told["input"]["size"] == layout["input"]["size"]
    if layout["input"]["mean"]:
        assert told["input"]["mean"] == pytest.approx(layout["input"]["mean"], abs=1e-4)
    compare(backbone, layout["target"], wanted)


@torch.no_grad()
def compare(backbone, target, wanted):
    """Compare features with a network built only from the layout's description."""
    side = backbone.size if backbone.fixed_size or "layers" in target else 64
    images = torch.randn(2, backbone.input.channels, side, side, generator=torch.Generator().manual_seed(1))
    if "layers" in target:
        for (title, kind, about), (ours, features) in zip(
            target["layers"], backbone.net.layers(images.clone()), strict=True
        ):
            if kind == "every2nd":
                images = images[:, :, ::2, ::2]
            else:
                layer = LAYERS[kind](about).eval()
                own = {key.removeprefix(f"{title}."): t for key, t in wanted.items() if key.startswith(f"{title}.")}
                layer.load_state_dict(own, strict=False)
                assert not set(own) - set(layer.state_dict())
                images = layer(images)
            assert torch.allclose(features, images, rtol=1e-4, atol=1e-5), f"{ours} is not {title}"
        return
    if target["library"] == "torchvision":
        reference = torchvision.models.get_model(target["model"], weights=None)
        reference.classifier[6] = nn.Identity()
    elif target["library"] == "timm":
        reference = timm.create_model(target["model"], **{**target["kwargs"], "num_classes": 0})
        for change in target.get("modify", []):
            reference.get_submodule(change["module"]).stride = tuple(change["stride"])
    else:
        assert target["model"] in NETWORKS  # described by its tensors only
        assert torch.isfinite(backbone.net(images)).all()
        return
    reference.load_state_dict({key: t for key, t in wanted.items() if key not in HEADS}, strict=False)
    if target["library"] == "torchvision":
        images = torch.nn.functional.interpolate(images, (backbone.size, backbone.size))
    assert torch.allclose(backbone.net(images), reference.eval()(images), rtol=1e-4, atol=1e-5)
