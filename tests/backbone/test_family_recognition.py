"""Whose code wrote a checkpoint: each family by the marks it leaves around the backbone."""

import pytest
from backbone_helpers import contents, matched

from odcft.backbone.checkpoint_metadata import Metadata
from odcft.backbone.family_recognition import recognise_family

VIT = "vit_small_patch16_224"
FAMILIES = [
    ("odcft", "resnet18", {}, {"metadata": Metadata(from_odcft=True)}),
    ("timm", "resnet18", {}, {"metadata": Metadata("resnet18")}),
    ("timm", "resnet18", {}, {"names": ["state_dict_ema"]}),
    ("fair_caffe2", "resnet50", {}, {"container": "pickle", "names": ["blobs"], "where": "blobs"}),
    ("state_dict", "resnet50", {}, {"container": "torch", "names": ["blobs"], "where": "blobs"}),
    ("state_dict", "resnet50", {}, {"container": "pickle", "where": "model"}),
    ("colorization_zhang", "colorization_eccv16", {}, {}),
    ("colorization_zhang", "colorization_siggraph17", {}, {}),
    ("vissl", "resnet50", {"_feature_blocks.x": 1}, {"names": ["classy_state_dict"]}),
    ("vissl", "resnet50", {"_feature_blocks.x": 1}, {"names": ["model_state_dict"]}),
    ("rotnet_gidaris", "alexnet_rotnet", {"_feature_blocks.x": 1}, {"where": "network"}),
    ("state_dict", "resnet50", {"x": 1}, {"names": ["model_state_dict"], "where": "x"}),
    ("deepcluster", "alexnet_deepcluster", {"top_layer.x": 1}, {"where": "x"}),
    ("deepcluster", "alexnet_deepcluster", {"features.module.x": 1}, {"where": "x"}),
    ("lightly_ssl", "resnet18", {}, {"names": ["pytorch-lightning_version"], "where": "state_dict/backbone."}),
    ("lightning", "resnet18", {}, {"names": ["pytorch-lightning_version"], "where": "state_dict/net."}),
    ("state_dict", "resnet18", {}, {"where": "state_dict/backbone."}),
    ("openselfsup", "resnet50", {}, {"names": ["meta"], "where": "x"}),
    ("openselfsup", "resnet50", {}, {"names": ["message_hub"], "where": "x"}),
    ("msn", VIT, {}, {"names": ["target_encoder"], "where": "target_encoder/module."}),
    ("mocov3", VIT, {}, {"where": "state_dict/module.base_encoder."}),
    ("moco", "resnet50", {}, {"where": "state_dict/module.encoder_q."}),
    ("simsiam", "resnet50", {"module.predictor.0.weight": 1}, {"where": "state_dict/module.encoder."}),
    ("state_dict", "resnet50", {"module.predictor.0.weight": 1}, {"where": "state_dict/module."}),
    ("state_dict", "resnet50", {"x": 1}, {"where": "state_dict/module.encoder."}),
    ("dinov2", VIT, {"mask_token": 1, "blocks.0.ls1.gamma": 1}, {}),
    ("dino or timm", VIT, {"mask_token": 1, "blocks.0.norm": 1}, {}),
    ("dino or timm", VIT, {"x": 1, "blocks.0.ls1.gamma": 1}, {}),
    ("state_dict", "beit_base", {"mask_token": 1, "blocks.0.ls1.gamma": 1}, {}),
    ("dino", VIT, {}, {"names": ["teacher"], "where": "teacher/backbone."}),
    ("mae", VIT, {"decoder_x": 1}, {"where": "model"}),
    ("dino or timm", VIT, {}, {}),
    ("state_dict", VIT, {"head.weight": 1}, {}),
    ("state_dict", VIT, {"fc.weight": 1}, {}),
    ("mae or timm", VIT, {}, {"where": "model"}),
    ("state_dict", VIT, {"head.weight": 1}, {"where": "model"}),
    ("state_dict", "swin_tiny", {}, {"where": "model"}),
    ("state_dict", VIT, {}, {"where": "net"}),
    ("training script", "resnet18", {}, {"names": ["arch", "state_dict", "epoch"], "where": "state_dict"}),
    ("training script", "resnet18", {}, {"names": ["arch", "state_dict", "optimizer"], "where": "state_dict"}),
    ("training script", "resnet18", {}, {"names": ["arch", "state_dict", "args"], "where": "state_dict"}),
    ("state_dict", "resnet18", {}, {"names": ["arch", "state_dict"], "where": "state_dict"}),
    ("state_dict", "resnet18", {}, {"names": ["arch", "epoch"], "where": "state_dict"}),
    ("state_dict", "resnet18", {}, {"names": ["state_dict", "epoch"], "where": "state_dict"}),
    ("torchvision", "resnet18", {}, {}),
    ("torchvision", "alexnet", {}, {}),
    ("state_dict", "convnext_tiny", {}, {}),
    ("state_dict", "resnet18", {}, {"where": "net"}),
]


@pytest.mark.parametrize(("name", "arch", "keys", "about"), FAMILIES)
def test_families(name, arch, keys, about):
    around = {key: value for key, value in about.items() if key != "where"}
    assert recognise_family(contents({}, keys, **around), arch, matched(about.get("where", "the file itself"))) == name
