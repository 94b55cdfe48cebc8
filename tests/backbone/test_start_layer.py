import pytest
import torch
import torch.nn.functional as F

from odcft.backbone.load import load_backbone
from odcft.backbone.start_layer import POOLED, LastAndLayer, refuse_unknown_layer
from odcft.errors import OdcftError


@pytest.mark.parametrize(
    ("arch", "layer", "module"),
    [
        ("test_resnet", "layer2", "layer2"),
        ("test_vit", "blocks.1", "blocks.1"),
        ("alexnet_deepcluster", "relu2", "relu2"),
    ],
)
def test_it_gives_the_features_of_the_backbone_and_of_the_layer(arch, layer, module):
    backbone = load_backbone(f"scratch:{arch}").backbone.eval()
    images, seen = torch.rand(2, 3, backbone.size, backbone.size), []
    hook = backbone.net.get_submodule(module).register_forward_hook(lambda *of_call: seen.append(of_call[2]))
    with torch.no_grad():
        last_BF, layer_BL = LastAndLayer(backbone, layer)(images)
        hook.remove()
        assert torch.allclose(last_BF, backbone(images), atol=1e-5)
    assert torch.allclose(layer_BL.norm(dim=1), torch.ones(2))
    assert layer_BL.shape[1] <= POOLED
    if arch == "test_resnet":
        channels = seen[0].shape[1]
        side = min(int((POOLED / channels) ** 0.5), seen[0].shape[2])
        assert layer_BL.shape == (2, channels * side**2)
        assert torch.allclose(layer_BL, F.normalize(F.adaptive_avg_pool2d(seen[0], side).flatten(1), dim=1), atol=1e-5)


def test_an_unknown_layer_is_refused_with_those_there_are():
    backbone = load_backbone("scratch:test_resnet").backbone.train()
    refuse_unknown_layer(backbone, "layer2")
    assert backbone.training
    with pytest.raises(OdcftError, match=r"memory\.start_layer='layer9': test_resnet has no such layer.*layer2"):
        refuse_unknown_layer(backbone, "layer9")
