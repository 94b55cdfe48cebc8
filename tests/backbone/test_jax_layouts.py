"""JAX's ResNets, hybrids and mixers are what timm makes of their archives."""

import re

import numpy as np
import pytest
import timm
import torch
from backbone_helpers import equal

from odcft.backbone.load import load_backbone
from odcft.backbone.numpy_archives import load_npz
from odcft.backbone.original_layouts import layout_of, with_timm_names


def filled(net):
    draw = torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
    return net.eval()


def jax_axes(tensor):
    array = tensor.numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def as_bit(state):
    for name, tensor in state.items():
        name = name.replace("stem.conv.weight", "root_block/standardized_conv2d/kernel")
        if found := re.match(r"stages\.(\d)\.blocks\.(\d+)\.(.+)\.(\w+)$", name):
            block, layer, leaf = f"block{int(found[1]) + 1}/unit{int(found[2]) + 1:02d}", found[3], found[4]
            if layer == "downsample.conv":
                name = f"{block}/a/proj/standardized_conv2d/kernel"
            elif layer.startswith("conv"):
                name = f"{block}/{'abc'[int(layer[-1]) - 1]}/standardized_conv2d/kernel"
            else:
                name = f"{block}/{'abc'[int(layer[-1]) - 1]}/group_norm/{'gamma' if leaf == 'weight' else 'beta'}"
        name = name.replace("norm.weight", "group_norm/gamma").replace("norm.bias", "group_norm/beta")
        yield f"resnet/{name}", jax_axes(tensor)
    yield "resnet/head/conv2d/kernel", np.zeros((1, 1, 8, 3), np.float32)
    yield "resnet/head/conv2d/bias", np.zeros(3, np.float32)


def as_hybrid(state, heads):
    for name, tensor in state.items():
        leaf = "bias" if name.endswith("bias") else "scale" if "norm" in name else "kernel"
        if found := re.match(r"patch_embed\.backbone\.(?:stem\.)?(conv|norm)\.", name):
            yield f"{'conv' if found[1] == 'conv' else 'gn'}_root/{leaf}", jax_axes(tensor)
        elif found := re.match(r"patch_embed\.backbone\.stages\.(\d)\.blocks\.(\d+)\.(.+)\.\w+$", name):
            layer = found[3].replace("downsample.conv", "conv_proj").replace("downsample.norm", "gn_proj")
            layer = layer.replace("norm", "gn")
            array = jax_axes(tensor) if leaf == "kernel" else tensor.numpy().reshape(1, 1, 1, -1)
            yield f"block{int(found[1]) + 1}/unit{int(found[2]) + 1}/{layer}/{leaf}", array
        elif ".attn.qkv." in name:
            width = len(tensor) // 3
            for kind, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                shape = (-1, heads, width // heads) if leaf == "kernel" else (heads, width // heads)
                array = jax_axes(part).reshape(shape)
                yield (
                    f"Transformer/encoderblock_{name.split('.')[1]}/MultiHeadDotProductAttention_1/{kind}/{leaf}",
                    array,
                )
        else:
            array = tensor.numpy() if tensor.ndim == 3 else jax_axes(tensor)
            for ours, theirs in (
                *(("pos_embed", "Transformer/posembed_input/pos_embedding"), ("cls_token", "cls")),
                *(("patch_embed.proj", "embedding"), ("blocks.", "Transformer/encoderblock_")),
                *(("attn.proj", "MultiHeadDotProductAttention_1/out"), ("norm1", "LayerNorm_0")),
                *(("norm2", "LayerNorm_2"), ("mlp.fc1", "MlpBlock_3/Dense_0"), ("mlp.fc2", "MlpBlock_3/Dense_1")),
            ):
                name = name.replace(ours, theirs)
            name = f"Transformer/encoder_norm{name[4:]}" if name.startswith("norm.") else name
            name = re.sub(r"\.(weight|bias)$", f"/{leaf}", name).replace(".", "/")
            if name.endswith("_1/out/kernel"):
                array = array.reshape(heads, -1, array.shape[-1])
            yield name, array


def as_mixer(state):
    for name, tensor in state.items():
        leaf = "bias" if name.endswith("bias") else "scale" if "norm" in name else "kernel"
        for ours, theirs in (
            *(("stem.proj.", "stem."), ("blocks.", "MixerBlock_"), ("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_1")),
            *(
                ("mlp_tokens", "token_mixing"),
                ("mlp_channels", "channel_mixing"),
                ("fc1", "Dense_0"),
                ("fc2", "Dense_1"),
            ),
        ):
            name = name.replace(ours, theirs)
        name = f"pre_head_layer_norm{name[4:]}" if name.startswith("norm.") else name
        yield re.sub(r"\.(weight|bias)$", f"/{leaf}", name).replace(".", "/"), jax_axes(tensor)
    yield "head/kernel", np.zeros((512, 3), np.float32)


def small(name):
    if name == "bit":
        net = timm.models.resnetv2.ResNetV2([1, 1, 2, 1], [128, 128, 256, 128], 0, stem_chs=32, stem_type="fixed")
        return net, "jax bit", as_bit(net.state_dict()), timm.models.resnetv2._load_weights
    if name == "mixer":
        net = timm.models.mlp_mixer.MlpMixer(0, img_size=64, patch_size=16, num_blocks=2, embed_dim=24)
        return net, "jax mixer", as_mixer(net.state_dict()), None
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 64}
    arch = {"hybrid": "vit_small_r26_s32_224", "stem only": "vit_tiny_r_s16_p8_224"}[name]
    net = timm.create_model(arch, num_classes=0, **sizes)
    return net, "jax hybrid", as_hybrid(net.state_dict(), 4), timm.models.vision_transformer._load_weights


@pytest.mark.parametrize("name", ["bit", "mixer", "hybrid", "stem only"])
def test_the_names_are_those_timm_gives(name, tmp_path):
    net, layout, arrays, load = small(name)
    filled(net)
    np.savez(tmp_path / "c.npz", **dict(arrays))
    tensors = load_npz(tmp_path / "c.npz")
    assert layout_of(tensors) == layout
    prefix = "resnet." if name == "bit" else ""
    ours = with_timm_names(tensors)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    for key, tensor in state.items():
        assert torch.equal(ours[prefix + key], tensor), key
    if load:  # timm's own converter reads the same archive
        for tensor in net.state_dict().values():
            tensor.zero_()
        load(net, str(tmp_path / "c.npz"))
        assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["resnetv2_50x1_bit", "mixer_b16_224", "vit_small_r26_s32_224", "vit_tiny_r_s16_p8_384"]
)
def test_archives_of_jax_are_recognised(arch, tmp_path):
    net = filled(timm.create_model(arch, num_classes=0))
    heads = {"vit_small": 6, "vit_tiny_": 3}.get(arch[:9], 0)
    state = net.state_dict()
    arrays = as_bit(state) if "bit" in arch else as_mixer(state) if "mixer" in arch else as_hybrid(state, heads)
    np.savez(tmp_path / "c.npz", **dict(arrays))
    loaded = load_backbone(tmp_path / "c.npz")
    assert loaded.match.coverage == 1
    assert loaded.backbone.arch.split("_224")[0] == arch.split("_224")[0].replace("_384", "")
    assert equal(loaded.backbone, state)
    assert loaded.backbone.input.mean == (0.5, 0.5, 0.5)


def test_bfloat16_is_read_although_numpy_does_not_know_it(tmp_path):
    values = torch.randn(3, 4).to(torch.bfloat16)
    void = values.view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "c.npz", a=void, b=np.zeros(2, "V3"))
    tensors = load_npz(tmp_path / "c.npz")
    assert set(tensors) == {"a"}
    assert torch.equal(tensors["a"], values.float())
