"""Files that want to run code when they are opened leave no trace, in any container; damaged ones get one sentence."""

import builtins
import importlib
import logging
import os
import pickle  # noqa: TID251 - to write what must not be read
import runpy
import shutil
import sqlite3
import subprocess
import tarfile
import timeit
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch

from odcft.backbone import load_backbone
from odcft.errors import OdcftError

MKDIR = "__import__('os').mkdir('HACKED')"


class Calls:
    """Unpickles as the result of a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Only what can be called is pickled as a function."""


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


def test_a_file_with_a_harmless_stranger_still_loads(tmp_path, make_checkpoint):
    """Classes that we do not have are not loaded; the tensors beside them are."""
    path = make_checkpoint(tmp_path / "c.pth")
    tree = torch.load(path, weights_only=True)
    tree = tree if "state_dict" in tree else {"state_dict": tree}
    torch.save({**tree, "log": np.float64(0.5), "when": np.array(["now"], dtype=object), "of": Calls(dict)}, path)
    assert load_backbone(path).match.share == 1


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


def test_an_archive_that_swells_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(OdcftError, match="swells"):
        load_backbone(tmp_path / "bomb.pth")
