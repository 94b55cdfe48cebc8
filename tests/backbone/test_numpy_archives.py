"""Archives of numpy's arrays are read as JAX wrote them, or refused; nothing in them runs."""

import io
import zipfile

import numpy as np
import pytest
import timm
import torch

from odcft.backbone.load import load_backbone
from odcft.backbone.numpy_archives import load_npz
from odcft.errors import OdcftError

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8}


def as_jax(state, heads=4):
    """timm's tensors under the names of google-research/vision_transformer, with its order of axes."""
    for name, tensor in state.items():
        array = tensor.numpy()
        leaf = "kernel" if name.endswith("weight") and "norm" not in name else "scale"
        leaf = "bias" if name.endswith("bias") else leaf
        if ".attn.qkv." in name:
            block, parts = name.split(".")[1], np.split(array, 3)
            for kind, part in zip(("query", "key", "value"), parts, strict=True):
                part = part.T.reshape(-1, heads, 12) if leaf == "kernel" else part.reshape(heads, 12)
                yield f"Transformer/encoderblock_{block}/MultiHeadDotProductAttention_1/{kind}/{leaf}", part
            continue
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array
        for ours, theirs in (
            *(("pos_embed", "Transformer/posembed_input/pos_embedding"), ("cls_token", "cls")),
            *(("patch_embed.proj", "embedding"), ("blocks.", "Transformer/encoderblock_")),
            *(("attn.proj", "MultiHeadDotProductAttention_1/out"), ("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")),
            *(("mlp.fc1", "MlpBlock_3/Dense_0"), ("mlp.fc2", "MlpBlock_3/Dense_1")),
        ):
            name = name.replace(ours, theirs)
        name = f"Transformer/encoder_norm{name[4:]}" if name.startswith("norm.") else name
        name = name.replace(".weight", f"/{leaf}").replace(".bias", "/bias").replace(".", "/")
        if "Attention_1/out/kernel" in name:
            array = array.reshape(heads, 12, -1)
        yield name, array


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = timm.create_model("vit_base_patch16_224", num_classes=0, **SIZES).eval()
    for tensor in net.state_dict().values():
        tensor.uniform_(-0.5, 0.5)
    return net


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_vision_transformer_of_jax_is_what_timm_makes_of_it(prefix, net, tmp_path):
    arrays = {f"{prefix}{name}": array for name, array in as_jax(net.state_dict())}
    np.savez(tmp_path / "c.npz", **arrays, **{f"{prefix}head/kernel": np.zeros((48, 5), np.float32)})
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0, **SIZES).eval()
    theirs.load_pretrained(str(tmp_path / "c.npz"))
    arguments = {name: value for name, value in SIZES.items() if name != "num_heads"}
    loaded = load_backbone(tmp_path / "c.npz", "vit_base_patch16_224", arch_args=arguments)
    assert loaded.match.coverage == 1
    assert loaded.backbone.arch_args["num_heads"] == 4
    assert loaded.backbone.input.mean == (0.5, 0.5, 0.5)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.backbone.net(pixels), theirs(pixels))
        assert torch.equal(loaded.backbone.net(pixels), net(pixels))


def test_arrays_keep_their_order_and_byte_order(tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    np.savez(tmp_path / "c.npz", a=array, b=np.asfortranarray(array), c=np.array(["text"]))
    tensors = load_npz(tmp_path / "c.npz")
    assert set(tensors) == {"a", "b"}
    for tensor in tensors.values():
        assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3))


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "c.npz", a=np.array([Evil()], object), w=np.zeros((3, 3)))
    with pytest.raises(OdcftError, match="fits no backbone"):
        load_backbone(tmp_path / "c.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + b"\0" * 50,
        b"\x93NUMPY\x01\x00\x0a\x00{'descr'}\n\n",
        b"not an array",
    ],
)
def test_a_damaged_array_is_refused(content, tmp_path):
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(OdcftError, match="damaged archive of arrays"):
        load_backbone(tmp_path / "c.npz")


@pytest.mark.parametrize("shape", [(10**9,), (10**6, 10**6, 10**6), (-1,)])
def test_an_array_larger_than_its_file_is_refused_before_it_is_made(shape, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + b"\0" * 16)
    with pytest.raises(OdcftError, match="damaged archive of arrays"):
        load_backbone(tmp_path / "c.npz")


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros(10_000_000, np.float32))
    with pytest.raises(OdcftError, match="unpacks to"):
        load_backbone(tmp_path / "c.npz")
