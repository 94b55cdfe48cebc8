"""A folder of open_clip loads as the network of timm's that its configuration describes, or is refused."""

import json

import pytest
import timm
import torch
from backbone_helpers import equal
from safetensors.torch import save_file
from test_original_layouts import as_clip

from odcft.backbone.load import load_backbone
from odcft.backbone.open_clip_folder import from_open_clip_config
from odcft.errors import OdcftError

TOWER = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32}
SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "img_size": 32}


def write(folder, tower=TOWER, quick=True, name="open_clip_model.safetensors"):
    torch.manual_seed(0)
    arch = f"vit_base_patch16_clip{'_quickgelu' * quick}_224"
    state = timm.create_model(arch, num_classes=0, **SIZES).state_dict()
    save_file({key: tensor.clone() for key, tensor in as_clip(state)}, folder / name)
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": tower, "text_cfg": {}, "quick_gelu": quick},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return arch, state


@pytest.mark.parametrize("quick", [False, True])
def test_the_activation_is_what_the_configuration_says(quick, tmp_path):
    arch, state = write(tmp_path, quick=quick)
    loaded = load_backbone(tmp_path)
    assert (loaded.family, loaded.backbone.arch) == ("open_clip", arch)
    assert loaded.match.coverage == 1
    assert equal(loaded.backbone, state)
    net = timm.create_model(arch, num_classes=0, **SIZES).eval()
    net.load_state_dict(state)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.backbone.net(pixels), net(pixels))
    assert loaded.backbone.input.mean == (0.1, 0.2, 0.3)


def test_a_folder_with_both_configurations_follows_its_weights(tmp_path):
    arch, _ = write(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    assert load_backbone(tmp_path).backbone.arch == arch


def test_towers_of_timms_own(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file({f"visual.trunk.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "test_vit"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert equal(load_backbone(tmp_path).backbone, state)


@pytest.mark.parametrize(
    ("tower", "told"),
    [
        ({**TOWER, "no_ln_pre": True}, "no_ln_pre=True, which timm's networks lack"),
        ({**TOWER, "pool_type": "avg"}, "pool_type='avg'"),
        ({**TOWER, "layers": "twelve"}, "layers: Input should be a valid integer"),
        ({**TOWER, "width": 10**9}, "width: "),
        ({**TOWER, "patch_size": 1000}, "patch_size"),
        ("x", "no model_cfg with a vision_cfg"),
    ],
)
def test_other_towers_are_refused(tower, told, tmp_path):
    write(tmp_path, tower)
    with pytest.raises(OdcftError, match=told):
        load_backbone(tmp_path)


def test_a_resnet_is_told_by_its_tensors(tmp_path):
    config = {"model_cfg": {"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64, "image_size": 224}}}
    config["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    metadata = from_open_clip_config(tmp_path, config)
    assert metadata.architecture is None
    assert metadata.cfg["mean"] == [0.1, 0.2, 0.3]
