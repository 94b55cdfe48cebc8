"""Map the tensor names of other people's code to ours: a table of renames, and tensors to concatenate or add."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from odcft.backbone.original_layouts import with_timm_names
from odcft.backbone.transformers_tensors import add_class_position, renamed, to_timm

# DeepCluster's AlexNet: index of the convolution among all layers, and its number.
_ALEXNET_FEATURES = {0: 1, 4: 2, 8: 3, 11: 4, 14: 5}
# RotNet's and VISSL's AlexNet: index of the block, and the number of its convolution.
_ALEXNET_BLOCKS = {0: 1, 2: 2, 4: 3, 5: 4, 6: 5}
# Caffe2; riv holds the variance.
_CAFFE2_SUFFIXES = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}


def _strip_wrappers(key: str) -> str:
    """Drop `module.` of DataParallel and the like, wherever it stands in the key."""
    return re.sub(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module)\.", "", key)


def _deepcluster(key: str) -> str:
    """DeepCluster's AlexNet, whose layers are numbered."""
    key = _strip_wrappers(key)
    if found := re.fullmatch(r"(.*?)features\.(\d+)\.(\w+)", key):
        prefix, place, leaf = found[1], int(found[2]), found[3]
        if place in _ALEXNET_FEATURES:
            return f"{prefix}conv{_ALEXNET_FEATURES[place]}.{leaf}"
        if place - 1 in _ALEXNET_FEATURES:
            return f"{prefix}bn{_ALEXNET_FEATURES[place - 1]}.{leaf}"
    return re.sub(r"classifier\.(1|4)\.", lambda m: {"1": "fc6.", "4": "fc7."}[m[1]], key)


def _rotnet_or_vissl(key: str) -> str:
    """The AlexNets of RotNet and VISSL, whose blocks are numbered: layer 0 is the convolution, 1 the norm."""
    if found := re.fullmatch(r"(.*?)_feature_blocks\.(\d+)\.(\d+)\.(\w+)", _strip_wrappers(key)):
        prefix, block, place, leaf = found[1], int(found[2]), int(found[3]), found[4]
        if block in _ALEXNET_BLOCKS and place < 2:
            return f"{prefix}{('conv', 'bn')[place]}{_ALEXNET_BLOCKS[block]}.{leaf}"
        if block == 8 and place in (1, 2, 4, 5):
            return f"{prefix}{ {1: 'fc6', 2: 'bn6', 4: 'fc7', 5: 'bn7'}[place] }.{leaf}"
    return key


def _caffe2(key: str) -> str:
    """Blobs of Caffe2's ResNets and AlexNets; of jigsaw's nine siamese towers, which share weights, only the first."""
    key = re.sub(r"_s0(?=_|$)", "", key)
    leaf = r"(w|b|s|rm|riv)"
    if found := re.fullmatch(rf"res(\d)_(\d+)_branch(1|2[abc])(_bn)?_{leaf}", key):
        stage, block, branch, norm, kind = found.groups()
        if branch == "1":
            layer = "downsample.1" if norm else "downsample.0"
        else:
            layer = f"{'bn' if norm else 'conv'}{'abc'.index(branch[1]) + 1}"
        return f"layer{int(stage) - 1}.{block}.{layer}.{_CAFFE2_SUFFIXES[kind]}"
    if found := re.fullmatch(rf"(?:res_)?conv(\d)(_bn|norm)_{leaf}", key):
        return f"bn{found[1]}.{_CAFFE2_SUFFIXES[found[3]]}"
    if found := re.fullmatch(r"(conv\d|fc\d)_(w|b)", key):
        return f"{found[1]}.{_CAFFE2_SUFFIXES[found[2]]}"
    return key


def _vgg(key: str) -> str:
    """VGG's linear layers, which are convolutions in timm."""
    key = _strip_wrappers(key)
    return re.sub(r"classifier\.(0|3)\.", lambda m: {"0": "pre_logits.fc1.", "3": "pre_logits.fc2."}[m[1]], key)


def _huggingface_resnet(key: str) -> str:
    """ResNets as Hugging Face's transformers names them."""
    found = re.fullmatch(r"((?:.*?\.)??)((?:embedder\.embedder|encoder\.stages)\..+)", key)
    return found[1] + renamed(found[2], "resnet") if found else key


def _mmpretrain(key: str) -> str:
    """Transformers as mmpretrain and mmselfsup 1.x name them."""
    key = re.sub(r"\.ffn\.layers\.0\.0\.", ".mlp.fc1.", key)
    key = re.sub(r"\.ffn\.layers\.1\.", ".mlp.fc2.", key)
    key = re.sub(r"(^|\.)layers\.(\d+)\.", r"\1blocks.\2.", key)
    key = re.sub(r"(blocks\.\d+)\.ln([12])\.", r"\1.norm\2.", key)
    key = re.sub(r"patch_embed\.projection\.", "patch_embed.proj.", key)
    return re.sub(r"(^|\.)ln1\.", r"\1norm.", key)


def _chunked_transformer(key: str) -> str:
    """DINOv2's training code: blocks in chunks for FSDP, with the block's own number second."""
    return re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.(norm|attn|ls|mlp)", r"\1blocks.\2.\3", _strip_wrappers(key))


def _jigsaw_pytorch(key: str) -> str:
    """JigsawPuzzlePytorch's AlexNet, whose layers keep the names that Caffe gave them."""
    return re.sub(r"(^|\.)conv\.(conv\d)_s1\.", r"\1\2.", _strip_wrappers(key))


def _features_only(key: str) -> str:
    """timm's networks built with `features_only`, as in segmentation_models_pytorch's `tu-` encoders."""
    return re.sub(r"(^|\.)([a-z]+)_(\d+)\.", r"\1\2.\3.", _strip_wrappers(key))


# Of these, the first that fits most tensors is used.
RENAMES: tuple[Callable[[str], str], ...] = (
    lambda key: key,
    _strip_wrappers,
    _deepcluster,
    _rotnet_or_vissl,
    _caffe2,
    _vgg,
    _huggingface_resnet,
    _mmpretrain,
    _chunked_transformer,
    _jigsaw_pytorch,
    _features_only,
)


# Where the name of a tensor begins in Hugging Face's vision transformers, after any prefix.
_HUGGINGFACE = re.compile(
    r"((?:.*?\.)??)((?:encoder\.layer\.\d+|encoder\.relative_position_bias|embeddings|layernorm|pooler)\..+)"
)


def merge_split_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put together tensors that timm's networks hold as one.

    Hugging Face's vision transformers keep query, key and value apart; DINOv2 with registers keeps the class token's
    position embedding apart, which timm adds to the token.
    """
    tensors = with_timm_names(tensors)
    if any(".attention.attention.query." in key for key in tensors):
        tensors = _huggingface_transformer(tensors)
    if "register_tokens" in tensors and "pos_embed" in tensors and "cls_token" in tensors:
        added = add_class_position(tensors)
        if added is not tensors:
            added["reg_token"] = added.pop("register_tokens")
        tensors = added
    return tensors


def _huggingface_transformer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for vision transformers of Hugging Face's, each under its prefix."""
    named: dict[str, Tensor] = {}
    inside: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _HUGGINGFACE.fullmatch(key):
            inside.setdefault(found[1], {})[found[2]] = tensor
        else:
            named[key] = tensor
    for prefix, own in inside.items():
        ours = to_timm(own | _zero_biases(own), _table_of(own))
        if "reg_token" in ours:
            ours = add_class_position(ours)
        named |= {prefix + name: tensor for name, tensor in ours.items()}
    return named


def _zero_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases of the keys where only queries and values have some; timm's networks have all three or none."""
    missing = {}
    for name, tensor in tensors.items():
        key = name.replace(".query.bias", ".key.bias")
        if key not in tensors and name.replace(".query.", ".value.") in tensors:
            missing[key] = torch.zeros_like(tensor)
    return missing


def _table_of(names: Iterable[str]) -> str:
    """Which of transformers' families has these tensors."""
    for table, mark in (("dinov2 swiglu", ".mlp.weights_in."), ("dinov2", ".layer_scale1.")):
        if any(mark in name for name in names):
            return table
    return "vit"
