"""TorchScript archives give their tensors, and none of the code in them runs."""

import io
import os
import pickle  # noqa: TID251 - writes what must be refused
import zipfile

import pytest
import timm
import torch
from backbone_helpers import equal
from test_encoder_layouts import as_clip_resnet, random_state

from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


class Holder(torch.nn.Module):
    """A module with these tensors under their names, as OpenAI's archives hold them."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module = self
            for word in path:
                if not hasattr(module, word):
                    module.add_module(word, torch.nn.Module())
                module = getattr(module, word)
            module.register_buffer(leaf, tensor)

    def forward(self, x):
        return x


def saved(tensors, path):
    torch.jit.save(torch.jit.script(Holder(tensors)), str(path))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scripted_network_loads_by_its_names(dtype, tmp_path):
    net = timm.create_model("test_vit", num_classes=3)
    state = {name: tensor.to(dtype) for name, tensor in random_state(net).items()}
    loaded = load_backbone(saved(state, tmp_path / "ViT.pt"))
    assert loaded.backbone.arch == "test_vit"
    assert equal(loaded.backbone, {name: tensor.float() for name, tensor in state.items()})
    assert loaded.notes == []


def test_a_network_with_lists_dicts_and_enums_as_attributes(tmp_path):
    net = timm.create_model("test_vit", num_classes=0)
    random_state(net)
    torch.jit.script(net).save(str(tmp_path / "c.pt"))
    assert equal(load_backbone(tmp_path / "c.pt").backbone, net.state_dict())


def test_a_traced_network_and_tensors_that_share_numbers(tmp_path):
    net = timm.create_model("test_resnet", num_classes=0).eval()
    random_state(net)
    torch.jit.trace(net, torch.zeros(1, 3, 64, 64)).save(str(tmp_path / "c.pt"))
    assert equal(load_backbone(tmp_path / "c.pt").backbone, net.state_dict())


@pytest.mark.slow
def test_openais_archive_of_a_resnet(tmp_path):
    state = random_state(timm.create_model("resnet50_clip", num_classes=0))
    theirs = {name: tensor.half() for name, tensor in as_clip_resnet(state)}
    theirs |= {"input_resolution": torch.tensor(224), "vocab_size": torch.tensor(49408)}
    loaded = load_backbone(saved(theirs, tmp_path / "RN50.pt"))
    assert loaded.backbone.arch == "resnet50_clip"
    assert equal(loaded.backbone, {n: t.half().float() if t.is_floating_point() else t for n, t in state.items()})


@pytest.mark.slow
def test_openais_archive_of_a_transformer_has_the_quick_gelu(tmp_path):
    from test_original_layouts import as_clip

    state = random_state(timm.create_model("vit_base_patch32_clip_224", num_classes=0))
    theirs = dict(as_clip(state)) | {"input_resolution": torch.tensor(224)}
    backbone = load_backbone(saved(theirs, tmp_path / "ViT-B-32.pt")).backbone
    assert (backbone.arch, backbone.arch_args) == ("vit_base_patch32_clip_224", {"act_layer": "quick_gelu"})
    assert equal(backbone, state)


# ---------------------------------------------------------------- attacks


def rewritten(path, **records):
    """The archive with some records replaced, which torch's own writer makes of them."""
    with zipfile.ZipFile(path) as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    files |= {name.replace("__", "."): data for name, data in records.items()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in files.items():
        if not name.startswith((".", "byteorder", "version")):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


@pytest.fixture
def archive(tmp_path):
    return saved({"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}, tmp_path / "c.pt")


def test_a_pickle_that_names_code_is_refused(archive, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    rewritten(archive, data__pkl=pickle.dumps(Evil(), 2))
    with pytest.raises(OdcftError, match="tries to run code"):
        load_backbone(archive)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_archive_does_not_run(archive):
    code = b"def forward(self, x: Tensor) -> Tensor:\n  ops.os.system('touch ran')\n  return x\n"
    rewritten(archive, **{"code/__torch__/Holder.py": code})
    with pytest.raises(OdcftError, match="fits no backbone"):
        load_backbone(archive)


def tensor_program(shape, stride, start=0, name="0"):
    """A pickle of one tensor, as TorchScript writes it."""

    storage = object()

    class Writer(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", "FloatStorage", name, "cpu", 4) if obj is storage else None

    class View:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (storage, start, shape, stride, False, {}))

    file = io.BytesIO()
    Writer(file, 2).dump({"a": View()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "start", "name"),
    [
        ((10**6,), (1,), 0, "0"),  # beyond its storage
        ((2,), (1,), 10**6, "0"),
        ((2,), (-1,), 0, "0"),
        ((2,), (1,), 0, "../constants.pkl"),
        ((2,), (1,), 0, "77"),
        (("x",), (1,), 0, "0"),
    ],
)
def test_a_tensor_that_is_not_there_is_refused(archive, shape, stride, start, name):
    rewritten(archive, data__pkl=tensor_program(shape, stride, start, name))
    with pytest.raises(OdcftError, match="damaged TorchScript archive"):
        load_backbone(archive)


def test_a_tensor_far_larger_than_the_file_is_refused(archive):
    rewritten(archive, data__pkl=tensor_program((10**6, 10**6), (0, 0)))
    with pytest.raises(OdcftError, match="but says that 'a' in it takes"):
        load_backbone(archive)


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"nonsense", pickle.dumps([[]] * 50, 2)])
def test_damaged_trees_are_refused(archive, data):
    rewritten(archive, data__pkl=data)
    with pytest.raises(OdcftError, match=r"damaged TorchScript archive|no named tensors"):
        load_backbone(archive)


def test_modules_within_themselves_end(archive):
    loop = b"\x80\x02c__torch__\nM\n)\x81q\x00}q\x01X\x01\x00\x00\x00aq\x02h\x00sb."
    rewritten(archive, data__pkl=loop)
    with pytest.raises(OdcftError, match="far more time or memory"):
        load_backbone(archive)
