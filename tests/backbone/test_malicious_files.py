"""Files that want to run code when they are opened leave no trace, in any container; damaged ones get one sentence."""

import builtins
import importlib
import itertools
import logging
import os
import pickle  # noqa: TID251 - to write what must not be read
import runpy
import shutil
import socket
import sqlite3
import struct
import subprocess
import tarfile
import timeit
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from odcft.backbone.checkpoint_containers import MAX_ZIP_MEMBERS
from odcft.backbone.load import load_backbone
from odcft.backbone.pickle_work import TooMuchWork, refuse_excessive_work
from odcft.backbone.state_dicts import MAX_NAME_LENGTH, MAX_NAME_LEVELS, MAX_TENSORS
from odcft.errors import OdcftError
from odcft.recipe import load_recipe

MKDIR = "__import__('os').mkdir('HACKED')"


class Calls:
    """Unpickles to the result of a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Makes this callable: pickle only accepts a callable as the function."""


def payloads():
    yield "os.system", Calls(os.system, "mkdir HACKED")
    yield "os.mkdir", Calls(os.mkdir, "HACKED")
    yield "os.makedirs", Calls(os.makedirs, "HACKED")
    yield "eval", Calls(eval, MKDIR)
    yield "exec", Calls(exec, MKDIR)
    yield "open", Calls(open, "HACKED", "w")
    yield "import", Calls(builtins.__import__, "antigravity")
    yield "subprocess", Calls(subprocess.check_call, ["mkdir", "HACKED"])
    yield "popen", Calls(subprocess.Popen, ["mkdir", "HACKED"])
    yield "runpy", Calls(runpy.run_path, "evil.py")
    yield "importlib", Calls(importlib.import_module, "evil")
    yield "timeit", Calls(timeit.timeit, MKDIR)
    yield "rmtree", Calls(shutil.rmtree, "precious")
    yield "copytree", Calls(shutil.copytree, "precious", "HACKED")
    yield "log file", Calls(logging.FileHandler, "HACKED")
    yield "database", Calls(sqlite3.connect, "HACKED")
    yield "zip", Calls(zipfile.ZipFile, "HACKED", "w")
    yield "numpy.save", Calls(np.save, "HACKED", 3)
    yield "torch.save", Calls(torch.save, 3, "HACKED")
    yield "call of a call", Calls(Calls(getattr, Calls(importlib.import_module, "os"), "mkdir"), "HACKED")
    yield "inner pickle", Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.mkdir, "HACKED")))
    yield "object array", np.array([Calls(os.mkdir, "HACKED"), 3], dtype=object)


PAYLOADS = dict(payloads())


def write_tar(tree, path):
    parts = {name: pickle.dumps(0) for name in ("tensors",)}
    parts |= {"storages": pickle.dumps(0) + pickle.dumps([]), "pickle": pickle.dumps(tree, 2)}
    with tarfile.open(path, "w:") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


CONTAINERS = {
    "zip": torch.save,
    "legacy": lambda tree, path: torch.save(tree, path, _use_new_zipfile_serialization=False),
    "tar": write_tar,
    "pickle 2": lambda tree, path: path.write_bytes(pickle.dumps(tree, 2)),
    "pickle 4": lambda tree, path: path.write_bytes(pickle.dumps(tree, 4)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", ["top", "beside", "inside"])
def test_code_in_a_file_leaves_no_trace(payload, container, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "evil.py").write_text("import os; os.mkdir('HACKED')")
    monkeypatch.syspath_prepend(tmp_path)
    weights = {"layer.weight": np.ones((3, 3), np.float32) if "pickle" in container else torch.ones(3, 3)}
    if container == "tar":
        weights = {}  # its tensors are not in its pickle
    evil = PAYLOADS[payload]
    trees = {
        "top": evil,
        "beside": {"state_dict": weights, "args": [evil]},
        "inside": {"blobs": {**weights, "x": {"y": evil}}},
    }
    CONTAINERS[container](trees[place], tmp_path / "c.pth")
    before = set(os.listdir())
    with pytest.raises(OdcftError) as refusal:  # at the latest because these weights fit no network
        load_backbone(tmp_path / "c.pth")
    assert set(os.listdir()) == before
    assert "\n" not in str(refusal.value)


def test_a_file_with_harmless_unknown_classes_still_loads(tmp_path, make_checkpoint):
    """The classes are not loaded; the tensors beside them are."""
    path = make_checkpoint(tmp_path / "c.pth")
    tree = torch.load(path, weights_only=True)
    tree = tree if "state_dict" in tree else {"state_dict": tree}
    torch.save({**tree, "log": np.float64(0.5), "when": np.array(["now"], dtype=object), "of": Calls(dict)}, path)
    assert load_backbone(path).match.coverage == 1


DAMAGE = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut after a few bytes": lambda whole: whole[:40],
    "html": lambda whole: b"<!DOCTYPE html><html>401</html>",
    "html after spaces": lambda whole: b"\n  <html><body>no</body></html>",
    "text": lambda whole: b"hello, this is no checkpoint\n" * 50,
    "json": lambda whole: b'{"message": "Not found"}',
    "image": lambda whole: b"\x89PNG\r\n\x1a\n" + bytes(500),
    "zeros": lambda whole: bytes(5000),
    "pickle header": lambda whole: b"\x80\x02",
    "pickle of numbers": lambda whole: pickle.dumps({"a": 1}),
    "pickle bomb": lambda whole: b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "git lfs": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n",
    "safetensors header": lambda whole: (10**9).to_bytes(8, "little") + b"{" + bytes(100),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_file_gets_one_sentence(damage, legacy, tmp_path, make_checkpoint):
    path = make_checkpoint(tmp_path / "c.pth")
    if legacy:
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(OdcftError) as refusal:
        load_backbone(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(OdcftError, match="unpacks to 50,000,000 bytes"):
        load_backbone(tmp_path / "bomb.pth")


def write_zip_bomb(path, how):
    """Write a torch archive of a few kilobytes whose pickle unpacks to 50 MB, which not every reader notices."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 25_000_000 + b"}.")
        archive.writestr("archive/version", "3\n")
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    size, place = struct.unpack("<II", data[end + 12 : end + 20])
    if how == "of a later version":
        data[place + 6 : place + 8] = struct.pack("<H", 99)
    elif how == "with a torn extra field":
        name = struct.unpack("<H", data[place + 28 : place + 30])[0]
        data[place + 30 : place + 32] = struct.pack("<H", 4)
        data[place + 46 + name : place + 46 + name] = struct.pack("<HH", 0x9999, 500)
        end += 4
        data[end + 12 : end + 16] = struct.pack("<I", size + 4)
    elif how == "listed twice":
        harmless = data[place : place + size]
        harmless[24:28] = struct.pack("<I", 100)
        data[end:end] = harmless
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["of a later version", "with a torn extra field", "listed twice"])
def test_a_zip_bomb_that_only_pytorch_would_unpack_is_refused_unread(how, tmp_path, monkeypatch):
    write_zip_bomb(tmp_path / "bomb.pth", how)
    monkeypatch.setattr(
        "odcft.backbone.checkpoint_containers.refuse_excessive_work", lambda program: pytest.fail("it was inflated")
    )
    with pytest.raises(OdcftError, match="not a checkpoint that PyTorch"):
        load_backbone(tmp_path / "bomb.pth")


# ---------------------------------------------------------------- small files that ask for endless work


def doubled(start, join, times=40):
    """Nest a value twice into itself, forty times over: 2^40 values in a few hundred bytes."""
    for _ in range(times):
        start = join(start)
    return start


class Named:
    """Is pickled as a call of a function, given by name alone."""

    def __init__(self, name, *args):
        self.name, self.args = name, args


class Writer(pickle._Pickler):
    """Writes pickles that `pickle` itself would not, because it would have to hash or import something first."""

    def save(self, value, *args, **kwargs):
        if isinstance(value, Named):
            self.write(b"c" + value.name.encode() + b"\n")
            super().save(tuple(value.args))
            self.write(b"R")
        elif isinstance(value, Keyed):
            self.write(b"}")
            self.save(value.key)
            self.write(b"K\x01s")
        else:
            super().save(value, *args, **kwargs)


class Keyed:
    """Is pickled as a dict with one key, which a real dict would hash while the test is written."""

    def __init__(self, key):
        self.key = key


LISTS = doubled([], lambda inner: [inner, inner])
DICTS = doubled({}, lambda inner: {"a": inner, "b": inner})
TUPLES = doubled((), lambda inner: (inner, inner))
ENDLESS = {
    "lists": LISTS,
    "dicts": DICTS,
    "tuples": TUPLES,
    "wide lists": doubled([], lambda inner: [inner] * 90, 14),
    "wide dicts": doubled({}, lambda inner: {str(number): inner for number in range(90)}, 14),
    "lists beside": {"state_dict": {}, "more": LISTS},
    "a key of tuples": Keyed(TUPLES),
    "a set of tuples": Named("builtins\nset", [TUPLES]),
    "a frozen set of tuples": Named("__builtin__\nfrozenset", [TUPLES]),
    "a dict of tuples": Named("builtins\ndict", [[TUPLES, 1]]),
    "an ordered dict of tuples": Named("collections\nOrderedDict", [[TUPLES, 1]]),
    "an ordered dict of Python 2": Named("UserList\nOrderedDict", [[TUPLES, 1]]),
    "the text of lists": Named("builtins\nstr", LISTS),
    "a type of lists": Named("numpy\ndtype", doubled("f4", lambda inner: [("a", inner), ("b", inner)], 30)),
    "a tensor of lists": Named("torch\nFloatTensor", doubled([0.0], lambda inner: [inner, inner], 33)),
    "a huge byte array": Named("builtins\nbytearray", 10**15),
    "layers in layers": doubled(
        {"_parameters": {}}, lambda inner: {"_parameters": {}, "_modules": {"a": inner, "b": inner}}
    ),
}


@pytest.mark.parametrize("container", ["zip", "legacy", "tar", "pickle 2"])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_small_file_that_asks_for_endless_work_gets_one_sentence(name, container, tmp_path):
    file = BytesIO()
    Writer(file, 2).dump(ENDLESS[name])
    path, program = tmp_path / "c.pth", file.getvalue()
    assert len(program) < 20_000
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for part, data in {"data.pkl": program, "version": b"3\n", "byteorder": b"little"}.items():
                archive.writestr(f"a/{part}", data)
    elif container == "legacy":
        torch.save({}, path, _use_new_zipfile_serialization=False)
        empty = pickle.dumps({}, 2)
        assert path.read_bytes().count(empty) == 1
        path.write_bytes(path.read_bytes().replace(empty, program))
    elif container == "tar":
        with tarfile.open(path, "w:") as archive:
            parts = {"tensors": pickle.dumps(0), "storages": pickle.dumps(0) + pickle.dumps([]), "pickle": program}
            for part, data in parts.items():
                info = tarfile.TarInfo(part)
                info.size = len(data)
                archive.addfile(info, BytesIO(data))
    else:
        path.write_bytes(program)
    with pytest.raises(OdcftError) as refusal:
        load_backbone(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "program",
    [
        b"]r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"]" * 1001 + b".",
    ],
    ids=["memo", "instructions"],
)
def test_a_pickle_that_asks_for_too_much_memory_or_time_is_refused(program, monkeypatch):
    monkeypatch.setattr("odcft.backbone.pickle_work.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(TooMuchWork):
        refuse_excessive_work(BytesIO(b"\x80\x02" + program))


def test_a_long_pickle_is_not_run_again_for_each_of_many_classes(tmp_path):
    program = b"\x80\x02}(U\x01a(" + 500_000 * b"N" + b"t"
    program += b"".join(b"U\x03%03dcfoo\nC%d\n)\x81" % (number, number) for number in range(190)) + b"u."
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(OdcftError, match="far more time or memory"):
        load_backbone(tmp_path / "c.pth")


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_ordinary_objects_is_checked_to_its_end(protocol):
    shared = ["x"] * 100
    cycle = {"shared": shared}
    cycle["self"] = cycle
    things = [{"a": 1, 2: (3.5, None, True, b"x" * 300)}, {1, 2}, frozenset([3]), shared, [shared] * 1000, cycle]
    things += [np.zeros((2, 3)), np.float64(2), os.stat_result(range(10)), Calls(dict), itertools.count(3), -(2**70)]
    things += [(cycle, cycle), "x" * 70_000, bytearray(5), {"k": {"k": {}}}]
    file = BytesIO(pickle.dumps(things, protocol) + pickle.dumps("next", protocol))
    refuse_excessive_work(file)
    assert pickle.load(file) == "next"


def test_shared_lists_of_arrays_load_once(tmp_path, make_checkpoint):
    """An object that stands in several places is visited once."""
    state = torch.load(make_checkpoint(tmp_path / "c.pth"), weights_only=True)["state_dict"]
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    tree = doubled([arrays], lambda inner: [inner, inner], 30)
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"model": arrays, "again": tree}))
    loaded = load_backbone(tmp_path / "c.pkl")
    assert loaded.match.coverage == 1
    assert loaded.match.where.startswith("model")


def write_view(path, container, shape, stride):
    """Write a file of a few hundred bytes with a tensor that repeats its four numbers."""
    if container == "zip":
        torch.save({"conv1.weight": torch.zeros(4).as_strided((1, 1), (0, 0))}, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        (name,) = (name for name in parts if name.endswith("data.pkl"))
        for old, new in (((b"K\x01K\x01\x86"), shape), ((b"K\x00K\x00\x86"), stride)):
            assert parts[name].count(old) == 1
            written = b"".join(b"\x8a\x08" + struct.pack("<q", number) for number in new)
            parts[name] = parts[name].replace(old, written + b"\x86")
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        return
    parts = {"storages": pickle.dumps(1) + pickle.dumps((1, "cpu", torch.FloatStorage), 2) + struct.pack("<q", 4)}
    parts["storages"] += bytes(16) + pickle.dumps([])
    parts["tensors"] = pickle.dumps(1) + pickle.dumps((1, 1, None)) + struct.pack("<i4x4qq", 2, *shape, *stride, 0)

    class Refers(pickle.Pickler):
        def persistent_id(self, value):
            return "1" if value == "tensor" else None

    file = BytesIO()
    Refers(file, 2).dump({"conv1.weight": "tensor"})
    parts["pickle"] = file.getvalue()
    with tarfile.open(path, "w:") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


@pytest.mark.parametrize("container", ["zip", "tar"])
@pytest.mark.parametrize(("shape", "stride"), [((10**6, 172_750), (0, 0)), ((10**6, 4), (0, 1)), ((10**9, 1), (0, 1))])
def test_a_tensor_larger_than_its_file_gets_one_sentence(shape, stride, container, tmp_path):
    write_view(tmp_path / "c.pth", container, shape, stride)
    with pytest.raises(OdcftError, match=r"says that 'conv1.weight' in it takes .* Is it damaged") as refusal:
        load_backbone(tmp_path / "c.pth")
    assert "\n" not in str(refusal.value)


def test_the_same_file_with_a_small_tensor_loads(tmp_path):
    for container in ("zip", "tar"):
        write_view(tmp_path / "c.pth", container, (2, 2), (0, 1))
        with pytest.raises(OdcftError, match="fits no backbone"):
            load_backbone(tmp_path / "c.pth")


def test_the_directory_of_an_archive_of_very_many_files_is_not_read(tmp_path):
    """The end of an archive says how long its directory is; nothing else of it is read."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    many = entry * (MAX_ZIP_MEMBERS + 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(many), 4, 0)
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04" + many + end)
    with pytest.raises(OdcftError, match="far more than PyTorch writes"):
        load_backbone(tmp_path / "c.pth")
    long = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, MAX_ZIP_MEMBERS + 1, MAX_ZIP_MEMBERS + 1, len(many), 4
    )
    where = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(many), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04" + many + long + where + end)
    with pytest.raises(OdcftError, match="far more than PyTorch writes"):
        load_backbone(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"x{number}" for number in range(MAX_TENSORS + 1)], "far more than any network"),
        (["x" * (MAX_NAME_LENGTH + 1)], "which no network has"),
        (["x." * (MAX_NAME_LEVELS + 1)], "which no network has"),
    ],
    ids=["many", "long", "deep"],
)
def test_too_many_and_too_long_names_are_refused(names, said, tmp_path):
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "c.pth")
    with pytest.raises(OdcftError, match=said):
        load_backbone(tmp_path / "c.pth")


def test_a_safetensors_file_with_a_huge_header_is_not_read(tmp_path):
    with (tmp_path / "c.safetensors").open("wb") as file:
        file.write((400_000_000).to_bytes(8, "little") + b"{")
        file.truncate(400_000_008)
    with pytest.raises(OdcftError, match="its header has 400,000,000 bytes"):
        load_backbone(tmp_path / "c.safetensors")
    head = b'{"a":' + b"[" * 1_000_000
    (tmp_path / "d.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(OdcftError, match="damaged safetensors file") as refusal:
        load_backbone(tmp_path / "d.safetensors")
    assert "\n" not in str(refusal.value)


def test_a_sparse_tar_archive_is_not_expanded(tmp_path):
    """GNU tar stores only the length of a hole."""
    info = tarfile.TarInfo("storages")
    info.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[483:495] = b"77777777777\0"  # its length with holes: 8 gigabytes
    head[148:156] = b"        "
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    (tmp_path / "c.pth").write_bytes(bytes(head) + bytes(10_240))
    with pytest.raises(OdcftError, match="is a tar archive that PyTorch did not write"):
        load_backbone(tmp_path / "c.pth")


@pytest.mark.parametrize("what", ["pipe", "socket", "device", "pipe in a folder", "pipe as config", "a long name"])
def test_pipes_sockets_and_devices_are_not_waited_for(what, tmp_path):
    path = tmp_path / "c"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif what == "device":
        path = Path("/dev/zero")
    elif what == "pipe in a folder":
        path.mkdir()
        os.mkfifo(path / "model.safetensors")
        (path / "config.json").write_text("{}")
    elif what == "pipe as config":
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"x")
        os.mkfifo(path / "config.json")
    else:
        path = tmp_path / ("x" * 5000)
    with pytest.raises(OdcftError) as refusal:
        load_backbone(path)
    assert "\n" not in str(refusal.value)
    if what == "pipe":
        with pytest.raises(OdcftError, match="cannot be a recipe"):
            load_recipe(path)


def test_names_of_classes_and_tensors_cannot_forge_lines(tmp_path):
    """A pickle can ask for a class of any name, and a key can be any text."""
    program = b"\x80\x04\x8c\x0eos.x\nodcft: ok\x8c\x06system\x93."
    (tmp_path / "c.pkl").write_bytes(program)
    with pytest.raises(OdcftError, match="tries to run code") as refusal:
        load_backbone(tmp_path / "c.pkl")
    assert "\n" not in str(refusal.value)
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"x\n\x1b[2J" * 50: np.ones(3)}))
    with pytest.raises(OdcftError) as refusal:
        load_backbone(tmp_path / "d.pkl")
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)
