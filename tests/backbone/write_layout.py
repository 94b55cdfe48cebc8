"""Checkpoints as other people's code writes them, made from descriptions in tests/data/layouts.json.xz.

The descriptions say for each of 54 public formats which tensors it has, under which names and how deep, in which
container, with what beside them, and what each backbone tensor is called in the network it belongs to.
"""

import argparse
import json
import lzma
import pickle  # noqa: TID251 - to write what others wrote
import struct
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

LAYOUTS = json.loads(lzma.decompress((Path(__file__).parent.parent / "data" / "layouts.json.xz").read_bytes()))


def tensor(key, entry):
    """Random numbers that only depend on the key, sized so that signals neither die nor grow from layer to layer."""
    shape, dtype = entry["shape"], getattr(torch, entry.get("dtype", "float32"))
    draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if not dtype.is_floating_point:
        return torch.randint(1, 100, shape, generator=draw).to(dtype)
    values = torch.randn(shape, generator=draw)
    if key.endswith(("running_var", "_riv")):
        return values.abs() + 0.5
    if len(shape) <= 1:
        return 0.1 * values + (1.0 if key.endswith(("weight", "gamma", "_s")) else 0.0)
    return (values * (2 / max(1, np.prod(shape[1:]))) ** 0.5).to(dtype)


def state_dict(entries):
    made = {key: tensor(key, entry) for key, entry in entries.items() if "alias_of" not in entry}
    return {key: made[entry.get("alias_of", key)] for key, entry in entries.items()}


def expected(layout, state):
    """Target name: tensor."""
    wanted = {}
    for key, entry in layout["tensors"].items():
        if entry.get("maps_to"):
            shape = entry["op"].removeprefix("reshape:").split(",") if entry.get("op") else state[key].shape
            wanted[entry["maps_to"]] = state[key].reshape([int(n) for n in shape])
    return wanted


def beside(spec):
    """What stands beside the weights."""
    kind = spec["kind"]
    if kind == "namespace":
        return argparse.Namespace(**spec["value"])
    if kind.startswith("optim_"):
        state = {0: {"momentum_buffer": torch.ones(3), "step": torch.tensor(4.0)}}
        optimizer = {"state": state, "param_groups": [{"lr": 0.03, "betas": (0.9, 0.999), "params": [0]}]}
        return [optimizer] if kind == "optim_list" else optimizer
    if kind == "np_array":
        return np.full(spec["shape"], spec["value"], dtype=spec["dtype"])
    if kind == "tensor":
        return tensor(spec["path"], spec)
    if kind == "odict":
        return state_dict(spec["value"])
    return spec.get("value", {"scale": 65536.0, "total": torch.tensor([1.0, 5.0])})


def put(root, path, value):
    *outer, last = path.split("/")
    for part in outer:
        root = root.setdefault(part, {})
    if isinstance(root.get(last), dict) and isinstance(value, dict):
        root[last].update(value)
    else:
        root[last] = value


def write(name, out):
    """Write a layout's checkpoint to `out`, a file or a folder; return the layout and what must be found in it."""
    layout = LAYOUTS[name]
    state = state_dict(layout["tensors"])
    root = {}
    for spec in layout.get("extra_pickled", []):
        if spec["kind"] == "caffe2_momentum":
            put(
                root,
                spec["path"],
                {f"{k}_momentum": t + 1 for k, t in state.items() if not k.endswith(("_rm", "_riv"))},
            )
        else:
            put(root, spec["path"], beside(spec))
    for path, entries in layout.get("other_state_dicts", {}).items():
        put(root, path, {key: tensor(f"{path}/{key}", entry) for key, entry in entries.items()})
    tree = state
    if layout["nesting"]:
        tree = root
        put(root, "/".join(layout["nesting"]), state)
    kind = layout["container"]
    if kind == "safetensors":
        save_file(tree, out)
    elif kind == "hf_dir":
        out.mkdir()
        weights = out / layout["hf_weights"]
        save_file(tree, weights) if weights.suffix == ".safetensors" else torch.save(tree, weights)
        (out / "config.json").write_text(json.dumps(layout["hf_config"]))
    elif kind == "pickle2_py2":
        with out.open("wb") as file:
            Python2(file, 2).dump(as_numpy(tree))
    elif kind == "torch_tar":
        write_tar(tree, out)
    else:
        torch.save(tree, out, _use_new_zipfile_serialization=kind == "torch_zip")
    return layout, expected(layout, state)


def as_numpy(tree):
    if isinstance(tree, dict):
        return {key: as_numpy(value) for key, value in tree.items()}
    return tree.numpy() if isinstance(tree, torch.Tensor) else tree


class Python2(pickle._Pickler):
    """Writes text and bytes as Python 2 does: as byte strings without an encoding."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_raw(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)

    dispatch[str] = dispatch[bytes] = save_raw


def write_tar(tree, out):
    """torch before 0.1.10: an archive of storages, tensors and the pickle."""
    tensors = []

    class WithTensors(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                return str(len(tensors))
            return None

    parts = {"pickle": BytesIO(), "storages": BytesIO(), "tensors": BytesIO()}
    WithTensors(parts["pickle"], 2).dump(tree)
    for name in ("storages", "tensors"):
        pickle.dump(len(tensors), parts[name], 2)
    for key, value in enumerate(tensors, start=1):
        kind = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}[value.dtype]
        pickle.dump((key, "cpu", kind), parts["storages"], 2)
        parts["storages"].write(struct.pack("<q", value.numel()) + value.numpy().tobytes())
        pickle.dump((key, key, None), parts["tensors"], 2)
        dims = value.ndim
        parts["tensors"].write(struct.pack(f"<i4x{2 * dims}qq", dims, *value.shape, *value.stride(), 0))
    pickle.dump([], parts["storages"], 2)
    with tarfile.open(out, "w:") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            archive.addfile(info, BytesIO(data.getvalue()))
