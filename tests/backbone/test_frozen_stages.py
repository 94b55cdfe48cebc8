import pytest
import torch
from torch import nn

from odcft.backbone.frozen_stages import check_freezing, freeze_stages, stages_by_depth
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


@pytest.mark.parametrize(
    ("arch", "stem", "second"),
    [
        ("test_resnet", "conv1.0.weight", "layer1.0.conv1.weight"),
        ("test_vit", "patch_embed.proj.weight", "blocks.0.norm1.weight"),
        ("test_convnext", "stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
        ("alexnet_deepcluster", "conv1.weight", "bn2.weight"),
    ],
)
def test_stages_have_every_parameter_once_from_the_input_on(arch, stem, second):
    net = load_backbone(f"scratch:{arch}").backbone.net
    found = stages_by_depth(net)
    assert sorted(name for stage in found for name in stage) == sorted(name for name, _ in net.named_parameters())
    assert stem in found[0]
    assert second in found[1]


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_frozen_stages_stay_and_the_others_learn(arch):
    backbone = load_backbone(f"scratch:{arch}").backbone
    stages = stages_by_depth(backbone.net)
    freeze_stages(backbone, 2)
    before = {name: tensor.clone() for name, tensor in backbone.net.state_dict().items()}
    backbone.eval().train()
    images = torch.rand(4, 3, backbone.size, backbone.size)
    backbone(images).square().sum().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad + 1)
    after = backbone.net.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name, parameter in backbone.net.named_parameters() if name in same} == {*stages[0], *stages[1]}
    outer = tuple(f"{name}." for name in backbone.frozen)
    assert all(name in same for name in before if name.startswith(outer))  # also running statistics
    assert all(module.training == (not f"{name}.".startswith(outer)) for name, module in backbone.net.named_modules())


def test_nothing_is_frozen_by_default():
    backbone = load_backbone("scratch:test_resnet").backbone
    freeze_stages(backbone, 0)
    assert backbone.frozen == ()
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_what_is_frozen_is_named_and_freezing_everything_is_refused():
    backbone = load_backbone("scratch:test_resnet").backbone
    assert check_freezing(backbone, 0) == []
    note = "Frozen (optim.freeze=2 of the 5 stages of test_resnet): conv1, bn1, layer1."
    assert check_freezing(backbone, 2) == [note]
    check_freezing(backbone, 4)
    with pytest.raises(OdcftError, match=r"optim\.freeze=5 leaves nothing of test_resnet to learn.*4 is the maximum"):
        check_freezing(backbone, 5)
    backbone.net = nn.Linear(2, 2)
    note = "optim.freeze=1 freezes nothing: the stages of test_resnet are unknown."
    assert check_freezing(backbone, 1) == [note]
