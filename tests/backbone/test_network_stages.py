import pytest

from odcft.backbone.load import load_backbone
from odcft.backbone.network_stages import MAX_STAGES, Stage, stages


@pytest.mark.parametrize(
    "arch", ["test_resnet", "test_vit", "alexnet_deepcluster", "test_convnext", "test_efficientnet"]
)
def test_stages_have_all_parameters(arch):
    backbone = load_backbone(f"scratch:{arch}").backbone
    found = stages(backbone)
    assert sum(stage.parameters for stage in found) == sum(p.numel() for p in backbone.net.parameters())
    assert 1 < len(found) <= MAX_STAGES


def test_shapes_are_those_of_one_image():
    backbone = load_backbone("scratch:test_vit").backbone
    backbone.resize(64)
    shapes = {stage.name: (stage.blocks, stage.shape) for stage in stages(backbone)}
    assert shapes["patch_embed"] == (1, (4, 4, 64))
    assert shapes["blocks"][0] > 1
    assert shapes["blocks"][1][1] == 64
    assert shapes["cls_token, pos_embed"] == (1, None)


def test_a_row_of_stages_of_different_shapes_is_opened():
    found = {stage.name: stage.shape for stage in stages(load_backbone("scratch:test_convnext").backbone)}
    assert found["stages.0"][1:] != found["stages.1"][1:]


def test_a_stage_is_one_line():
    assert str(Stage("blocks", 12, (197, 384), 1234)) == "blocks · 12 blocks · 197 x 384 · 1,234 parameters"
    assert str(Stage("cls_token", 1, None, 384)) == "cls_token · 384 parameters"
