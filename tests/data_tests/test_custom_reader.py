"""The user's own reader: what it gets and may return, its errors, loader processes, and where its name is recorded."""

import json
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from odcft.data.batches import Crops, make_loader, sequential_batches
from odcft.data.custom_reader import Reader, make_reader
from odcft.data.intensity_range import choose_range, median_shorter_side
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.first_memory import init_memory
from odcft.pretexts.training import train_pretext
from odcft.recipe import load_recipe
from odcft.train import fine_tune

MODULE = """
import io, sys
import numpy as np
calls = []
def read(data):
    calls.append(data)
    return np.load(io.BytesIO(data))
def read_path(path):
    return np.load(path)
def fail(data):
    raise ValueError("no such instrument")
def leave(data):
    sys.exit(3)
def two(data, more):
    return None
number = 3
"""

QUICK = [
    "optim.batch_size=8",
    "neck.hidden=16",
    "neck.dim=8",
    "log.tensorboard=false",
    "log.report=false",
    "optim.epochs=1",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a module of readers and a folder of .npy files of 12 bits, two classes."""
    (tmp_path / "my_reader.py").write_text(MODULE)
    (tmp_path / "my_broken_reader.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_reader", "my_broken_reader"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for i in range(16):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 4096, (32, 40)).astype(np.uint16)
        np.save(tmp_path / "set" / "ab"[i % 2] / f"{i:02d}.npy", values)
    return tmp_path


def seen(images, view=None):
    crops = Crops(images, view or View(32, 1.0, intensity=(0, 4095)))
    return [crops[0, i][0] for i in range(len(images))]


def test_a_reader_gets_bytes_or_a_path_and_every_file_of_a_folder(here):
    from_bytes = find_images(here / "set", reader=make_reader("my_reader:read"))
    from_path = find_images(here / "set", reader=make_reader("my_reader:read_path"))
    assert len(from_bytes) == 16
    assert all(torch.equal(a, b) for a, b in zip(seen(from_bytes), seen(from_path), strict=True))
    assert all(isinstance(data, bytes) for data in sys.modules["my_reader"].calls)
    assert median_shorter_side(from_bytes) == 32
    (low, high), note = choose_range(from_bytes)
    assert 0 <= low < 20
    assert 4080 < high <= 4095
    assert note.startswith("16 images of 16 bits use 6.2 % of their range")
    with pytest.raises(OdcftError, match=r"holds no images \(but 16 \.npy\)"):
        find_images(here / "set")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (np.zeros((4, 5, 2), np.uint8), "2 channels, but the network takes 1 .gray. or 3"),
        (np.zeros((3, 4, 5), np.uint8), "5 channels, .*; if they come first in this array, move them last"),
        (np.zeros(4, np.uint8), r"shape \(4,\); it should be H x W or H x W x C"),
        (np.zeros((0, 5), np.uint8), r"shape \(0, 5\)"),
        (np.zeros((1, 2, 3, 3), np.uint8), "shape"),
        (np.zeros((4, 4), bool), "of type bool, not an array of numbers"),
        (np.zeros((4, 4), complex), "of type complex128"),
        (None, "returned NoneType"),
        ("text", "returned str"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000)), "60,000 x 60,000 pixels are more"),
    ],
)
def test_what_a_reader_returns_is_checked(here, result, words):
    images = find_images(here / "set", reader=Reader(lambda data: result))
    assert isinstance(seen(images)[0], str)
    with pytest.raises(OdcftError, match=words):
        images.reader.values(images, 0, 3)


@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [("u1", 200, 200), ("u2", 65535, 255), ("i2", 0, 128), ("f4", 0.5, 128), ("f2", 1.0, 255), ("f8", 0.25, 64)],
)
def test_every_type_of_array_becomes_8_bits(here, dtype, value, shown):
    for shape in ((8, 9), (8, 9, 1), (8, 9, 3)):
        images = find_images(here / "set", reader=Reader(lambda data, s=shape: np.full(s, value, dtype)))
        (pixels, *_) = seen(images, View(8, 1.0))
        assert pixels.shape == (3, 8, 8)
        assert (pixels == shown).all()


def test_errors_of_a_reader_are_reasons_of_single_images(here):
    for name, words in (("fail", "ValueError: no such instrument"), ("leave", "SystemExit: 3")):
        assert (
            seen(find_images(here / "set", reader=make_reader(f"my_reader:{name}")))[3]
            == f"my_reader:{name} failed: {words}"
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:read", "nowhere cannot be imported .ModuleNotFoundError: No module named 'nowhere'.. Modules are"),
        ("my_broken_reader:read", "cannot be imported .RuntimeError: no licence"),
        ("my_reader:red", "my_reader has no function red"),
        ("my_reader:number", "my_reader has no function number"),
        ("my_reader:two", "it should take one argument"),
        ("my_reader", "write it as MODULE:FUNCTION"),
        (":read", "write it as MODULE:FUNCTION"),
        (3, "give a function, or its name"),
    ],
)
def test_a_reader_that_cannot_be_used_is_refused_in_a_sentence(here, name, words):
    with pytest.raises(OdcftError, match=words) as refused:
        make_reader(name)
    assert "\n" not in str(refused.value)


def test_a_reader_is_pickled_by_its_name(here):
    reader = make_reader("my_reader:read")
    pickled = bytes(ForkingPickler.dumps(reader))
    assert b"my_reader:read" in pickled
    assert ForkingPickler.loads(pickled).name == "my_reader:read"
    assert make_reader(None) is None
    assert make_reader(reader) is reader


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_use_the_reader(here, method):
    images = find_images(here / "set", reader=make_reader("my_reader:read"))
    crops, device = Crops(images, View(32, 1.0, intensity=(0, 4095))), torch.device("cpu")
    loader = make_loader(crops, sequential_batches(range(16), 8), 2, device)
    loader.multiprocessing_context = method
    pixels = torch.cat([batch.pixels for batch in loader])
    assert torch.equal(pixels, torch.stack(seen(images)))


def test_a_run_records_its_reader_and_asks_for_it_again(here, make_checkpoint, capfd):
    data, checkpoint, recipe = "set", str(make_checkpoint(here / "c.pth")), load_recipe("small", QUICK)
    init_memory(checkpoint, data, here / "memory", recipe, reader="my_reader:read")
    assert json.loads((here / "memory" / "memory.json").read_text())["reader"] == "my_reader:read"
    with pytest.raises(OdcftError, match=r"memory was made with --reader my_reader:read, not my_reader:read_path\."):
        fine_tune(checkpoint, "set", here / "run", recipe, memory=here / "memory", reader="my_reader:read_path")
    fine_tune(checkpoint, data, here / "run", recipe, memory=here / "memory", reader="my_reader:read")
    assert json.loads((here / "run" / "run.json").read_text())["reader"] == "my_reader:read"
    assert "my_reader" not in (here / "run" / "recipe.yaml").read_text()
    assert "my_reader:read" in (here / "run" / "backbone" / "README.md").read_text()
    with pytest.raises(OdcftError, match=r"run was made with --reader my_reader:read\. A reader is code, so"):
        fine_tune(checkpoint, data, here / "run", recipe, resume=True, epochs=2)
    fine_tune(checkpoint, data, here / "run", recipe, resume=True, epochs=2, reader="my_reader:read")
    capfd.readouterr()
    with pytest.raises(OdcftError, match=r"holds no images \(but 16 \.npy\)"):
        evaluate(str(here / "run"), data, None, ["knn"])
    evaluate(str(here / "run"), data, None, ["knn"], reader="my_reader:read_path")
    said = capfd.readouterr().err
    assert (
        "was trained with --reader my_reader:read, which is never taken from a file; my_reader:read_path reads" in said
    )


def test_pretext_training_records_its_reader_too(here):
    recipe = load_recipe("pretext", ["optim.epochs=1", "optim.batch_size=4", "data.size=32"])
    train_pretext("rotation", "set", "test_resnet", here / "p.pth", recipe, reader="my_reader:read")
    assert torch.load(here / "p.pth", weights_only=True)["reader"] == "my_reader:read"
    recipe.optim.epochs = 2
    with pytest.raises(OdcftError, match=r"p.pth was made with --reader my_reader:read, not my_reader:read_path"):
        train_pretext(
            "rotation", "set", "test_resnet", here / "p.pth", recipe, resume=True, reader="my_reader:read_path"
        )


@pytest.mark.slow
def test_the_command_line_takes_a_reader_and_refuses_in_a_sentence(here, make_checkpoint):
    checkpoint = str(make_checkpoint(here / "c.pth"))
    words = [sys.executable, "-m", "odcft", "finetune", checkpoint, "set", "--out", "run", "--recipe", "small"]
    words += [word for override in QUICK for word in ("--set", override)]
    for reader, code, said in (("nowhere:read", 2, "cannot be imported"), ("my_reader:read", 0, "Done in")):
        done = subprocess.run([*words, "--reader", reader], capture_output=True, text=True, timeout=100)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert said in done.stderr
