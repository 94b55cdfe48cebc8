"""What the commands write: nothing before the checks, nothing elsewhere, nothing over other people's files."""

import errno
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from stopped_runs import write_inputs

from odcft import demo, files
from odcft.errors import OdcftError
from odcft.exports import export
from odcft.first_memory import init_memory
from odcft.recipe import load_recipe
from odcft.run import output_checks
from odcft.train import fine_tune

QUICK = ["optim.batch_size=4", "log.tensorboard=false", "optim.epochs=1", "neck.hidden=16", "neck.dim=8"]
FLAGS = ["--recipe", "small", *(part for override in QUICK for part in ("--set", override))]


def quick(*overrides):
    return load_recipe("small", [*QUICK, *overrides])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint, 8 images, and a finished run."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, 8)
    fine_tune(str(folder / "c.pth"), str(folder / "images"), folder / "run", quick())
    return folder


@pytest.fixture
def run(inputs, tmp_path):
    """A copy of the run."""
    return shutil.copytree(inputs / "run", tmp_path / "run")


def tree(folder):
    """Everything in a folder, without following links: name to content, or what a link leads to."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else stat.S_IFMT(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


def permissions_below(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- folders that others have prepared


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite"], ["--resume", "--epochs", "2"]])
@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("lock", "precious"),
        ("lock", "nowhere"),
        ("backbone", "inner"),
        ("backbone/model.safetensors", "precious"),
        (".backbone.unfinished", "inner"),
        (".metrics.jsonl.unfinished", "precious"),
        ("metrics.jsonl", "precious"),
        ("recipe.yaml", "precious"),
        ("tensorboard", "precious"),
        ("checkpoints", "outside"),
        ("clusters.parquet", "nowhere"),
    ],
)
def test_run_that_leads_elsewhere_is_refused_by_name(odcft_command, inputs, run, outside, place, target, flags):
    files.remove(run / place)
    (run / place).symlink_to(outside if target == "outside" else outside / target)
    before = tree(run.parent)
    code, _, err = odcft_command("finetune", inputs / "c.pth", inputs / "images", "--out", run, *flags, *FLAGS)
    assert code == 2, err
    assert err.startswith(f"odcft: {run / place} is a link")
    assert tree(run.parent) == before


def test_checkpoints_on_another_disk_are_written_resumed_and_overwritten(odcft_command, inputs, run, tmp_path):
    shutil.move(run / "checkpoints", tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    command = ("finetune", inputs / "c.pth", inputs / "images", "--out", run, *FLAGS)
    assert odcft_command(*command, "--resume", "--epochs", 2)[0] == 0
    newest = sorted(path.name for path in (tmp_path / "scratch").iterdir())[-1]
    assert newest == "step-000000004"
    assert odcft_command(*command, "--overwrite")[0] == 0
    assert (run / "checkpoints").is_symlink()
    assert newest not in [path.name for path in (tmp_path / "scratch").iterdir()]
    assert (run / "backbone" / "model.safetensors").exists()


def test_link_created_while_features_are_extracted_is_noticed_before_anything_is_removed(
    inputs, run, outside, monkeypatch
):
    from odcft import prepare

    def assign(*args):
        shutil.rmtree(run / "backbone")
        (run / "backbone").symlink_to(outside)
        return real(*args)

    real = prepare.assign
    monkeypatch.setattr(prepare, "assign", assign)
    before = {name: content for name, content in tree(run).items() if not name.startswith("backbone")}
    with pytest.raises(OdcftError, match="backbone is a link"):
        fine_tune(str(inputs / "c.pth"), str(inputs / "images"), run, quick(), overwrite=True)
    assert {name: content for name, content in tree(run).items() if not name.startswith("backbone")} == before
    assert (outside / "precious").exists()


@pytest.mark.parametrize("name", ["memory.safetensors", "memory.json", "images.csv", "lock", ".unfinished"])
def test_memory_folder_that_leads_elsewhere_is_refused_by_name(inputs, tmp_path, outside, name):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / name).symlink_to(outside / "precious")
    with pytest.raises(OdcftError, match=f"memory/{name} is a link"):
        init_memory(str(inputs / "c.pth"), str(inputs / "images"), tmp_path / "memory", quick(), overwrite=True)
    assert tree(outside)["precious"] == b"mine"


# ---------------------------------------------------------------- nothing before the checks


MISTAKES = {
    "init-memory": ("init-memory", "{broken}", "{images}", "--out", "{out}", *FLAGS),
    "finetune": ("finetune", "{broken}", "{images}", "--out", "{out}", *FLAGS),
    "finetune --resume": ("finetune", "{broken}", "{images}", "--out", "{out}", "--resume", *FLAGS),
    "finetune of no images": ("finetune", "{ckpt}", "{nowhere}", "--out", "{out}", *FLAGS),
    "finetune of too many clusters": ("finetune", "{ckpt}", "{images}", "--out", "{out}", "--clusters", "500", *FLAGS),
    "pretext": ("pretext", "rotation", "{nowhere}", "--arch", "test_resnet", "--out", "{out}"),
    "pretext of no network": ("pretext", "rotation", "{images}", "--arch", "resnet19", "--out", "{out}"),
    "export": ("export", "{broken}", "{out}"),
    "export of a file": ("export", "{broken}", "{out}", "--format", "safetensors"),
    "export of what torchvision lacks": ("export", "{ckpt}", "{out}", "--format", "torchvision"),
    "evaluate": ("evaluate", "{broken}", "{images}"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_nothing_is_written_before_a_refusal(odcft_command, inputs, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pth").write_text("x")
    places = {"broken": tmp_path / "broken.pth", "out": tmp_path / "new" / "folder" / "out", "nowhere": tmp_path / "no"}
    places |= {"ckpt": inputs / "c.pth", "images": inputs / "images"}
    code, _, err = odcft_command(*(part.format(**places) for part in MISTAKES[case]))
    assert code == 2, err
    assert list(tree(tmp_path)) == ["broken.pth"]


IMPOSSIBLE = ["/proc/out", "/proc/new/out", "{file}/out", "{long}"]


@pytest.mark.parametrize("place", IMPOSSIBLE)
@pytest.mark.parametrize(
    "command",
    [
        ("init-memory", "{ckpt}", "{images}", "--out", "{out}", *FLAGS),
        ("finetune", "{ckpt}", "{images}", "--out", "{out}", *FLAGS),
        ("pretext", "rotation", "{images}", "--arch", "test_resnet", "--out", "{out}"),
        ("export", "{ckpt}", "{out}"),
        ("export", "{ckpt}", "{out}", "--format", "safetensors"),
        ("export", "{ckpt}", "{out}", "--format", "onnx"),
        ("demo", "--out", "{out}"),
    ],
)
def test_impossible_output_is_refused_in_a_sentence_before_anything_is_done(
    odcft_command, inputs, tmp_path, monkeypatch, command, place
):
    from odcft import exports, prepare
    from odcft.backbone import load
    from odcft.pretexts import training

    def too_late(*args, **how):
        raise AssertionError("the network is loaded before the output was tried")

    for module in (load, exports, prepare):
        monkeypatch.setattr(module, "load_backbone", too_late)
    monkeypatch.setattr(training, "TrainingBatches", too_late)
    monkeypatch.setattr(demo, "write_digits", too_late)
    (tmp_path / "file").write_text("")
    out = place.format(file=tmp_path / "file", long=tmp_path / ("a" * 300))
    values = {"ckpt": inputs / "c.pth", "images": inputs / "images", "out": out}
    code, _, err = odcft_command(*(part.format(**values) for part in command))
    assert code == 2, err
    assert "cannot be written" in err
    assert err.count("\n") == 1, err


def test_without_pyarrow_nothing_is_written(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OdcftError, match=r"clusters.parquet needs pyarrow"):
        fine_tune(str(inputs / "c.pth"), str(inputs / "images"), tmp_path / "run", quick())
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------- permissions


def test_every_file_has_the_permissions_of_the_umask(inputs, tmp_path):
    before = os.umask(0o002)
    try:
        ckpt, images = str(inputs / "c.pth"), str(inputs / "images")
        fine_tune(ckpt, images, tmp_path / "run", quick("log.tensorboard=true"))
        init_memory(ckpt, images, tmp_path / "memory", quick())
        for format in ("timm", "safetensors"):
            export(ckpt, tmp_path / "export" / format, format)
    finally:
        os.umask(before)
    assert permissions_below(tmp_path) == {0o664}


# ---------------------------------------------------------------- only what odcft wrote is replaced


@pytest.mark.parametrize("format", ["timm", "safetensors", "torchvision", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_export_is_replaced_by_an_export(inputs, tmp_path, format):
    ckpt = str(inputs / "c.pth")
    if format == "torchvision":
        import timm

        ckpt = str(tmp_path / "r.pth")
        torch.save(timm.create_model("resnet18").state_dict(), ckpt)
    for _ in range(2):
        export(ckpt, tmp_path / "out", format, overwrite=True)
    assert output_checks.written_by_odcft(tmp_path / "out") or format == "timm"
    with pytest.raises(OdcftError, match="exists"):
        export(ckpt, tmp_path / "out", format)
    with pytest.raises(OdcftError, match=r"out is a (folder|file); --format"):
        export(ckpt, tmp_path / "out", "timm" if format != "timm" else "safetensors", overwrite=True)


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_a_file_of_others_is_not_replaced_by_an_export(inputs, tmp_path, format):
    before = (inputs / "c.pth").read_bytes()
    with pytest.raises(OdcftError, match=r"c.pth was not written by odcft, so --overwrite will not touch it"):
        export(str(inputs / "c.pth"), inputs / "c.pth", format, overwrite=True)
    assert (inputs / "c.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("thesis", r"holds files odcft did not write \(thesis.txt\)"),
        ("of timm", "out was not written by odcft, so --overwrite will not touch it"),
        ("no config", "out was not written by odcft"),
        ("a list", "out was not written by odcft"),
        ("no json", "out was not written by odcft"),
        ("link", "model.safetensors is a link"),
    ],
)
def test_a_folder_of_others_is_not_replaced_by_an_export(inputs, tmp_path, outside, case, message):
    out = tmp_path / "out"
    export(str(inputs / "c.pth"), out)
    if case == "thesis":
        (out / "thesis.txt").write_text("mine")
    elif case == "no config":
        (out / "config.json").unlink()
    elif case == "link":
        (out / "model.safetensors").unlink()
        (out / "model.safetensors").symlink_to(outside / "precious")
    else:
        texts = {"of timm": '{"architecture": "resnet18"}', "a list": "[1]", "no json": "odcft"}
        (out / "config.json").write_text(texts[case])
    before = tree(tmp_path)
    with pytest.raises(OdcftError, match=message):
        export(str(inputs / "c.pth"), out, overwrite=True)
    assert tree(tmp_path) == before


def test_an_export_goes_into_a_folder_that_is_a_link_or_another_disk(inputs, tmp_path, monkeypatch):
    """As with a mounted volume: files beside the folder are on another file system."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    real = os.rename

    def replace(path, target):
        assert Path(path).parent.parent == Path(target).parent, "across disks"
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    export(str(inputs / "c.pth"), tmp_path / "link")
    assert sorted(tree(tmp_path / "volume")) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_an_export_writes_through_no_link(inputs, tmp_path, outside, kind):
    for name in ("out", ".out.unfinished"):
        (tmp_path / name).symlink_to(outside / "precious") if kind == "link" else os.link(
            outside / "precious", tmp_path / name
        )
        with pytest.raises(OdcftError) if name == "out" else open(os.devnull):
            export(str(inputs / "c.pth"), tmp_path / "out", "safetensors", overwrite=True)
        files.remove(tmp_path / "out")
        assert (outside / "precious").read_text() == "mine"


@pytest.mark.parametrize("case", ["theirs", "link", "dangling link", "unfinished"])
def test_pretext_replaces_only_its_own(odcft_command, inputs, tmp_path, outside, case):
    out = tmp_path / "out" / "r.pth"
    out.parent.mkdir()
    if case == "theirs":
        shutil.copy(inputs / "c.pth", out)
    elif case == "unfinished":
        (out.parent / ".r.pth.unfinished").symlink_to(outside / "precious")
    else:
        out.symlink_to(outside / ("precious" if case == "link" else "nowhere"))
    before = tree(tmp_path)
    command = ("pretext", "rotation", inputs / "images", "--arch", "test_resnet", "--epochs", 1, "--out", out)
    for flag in ("--overwrite", "--resume"):
        code, _, err = odcft_command(*command, flag)
        if case == "unfinished" and flag == "--overwrite":
            assert code == 0, err
            assert (outside / "precious").read_text() == "mine"
            assert odcft_command(*command, flag)[0] == 0  # over what it has just written
            break
        assert code == 2, err
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "place",
    ["thesis.txt", "digits/thesis.txt", "digits/3/thesis.png", "run/thesis.txt", "run_dc/checkpoints/x", "lock"],
)
def test_demo_replaces_only_a_demo(odcft_command, tmp_path, place):
    (tmp_path / "demo" / place).parent.mkdir(parents=True)
    (tmp_path / "demo" / place).write_text("mine")
    code, _, err = odcft_command("demo", "--out", tmp_path / "demo", "--overwrite")
    assert code == 2
    assert f"holds files odcft did not write ({place})" in err
    assert (tmp_path / "demo" / place).read_text() == "mine"


@pytest.mark.parametrize("place", ["digits", "digits/3", "rotation.pth", "memory", "run"])
def test_demo_that_leads_elsewhere_is_refused_by_name(odcft_command, tmp_path, outside, place):
    (tmp_path / "demo" / place).parent.mkdir(parents=True)
    (tmp_path / "demo" / place).symlink_to(outside)
    code, _, err = odcft_command("demo", "--out", tmp_path / "demo", "--overwrite")
    assert code == 2
    assert f"{place} is a link" in err
    assert (outside / "precious").exists()


# ---------------------------------------------------------------- disks that fail during a run


@pytest.mark.parametrize("which", ["save_file", "save_checkpoint"])
def test_disk_that_is_full_at_the_end_is_reported(odcft_command, inputs, tmp_path, monkeypatch, which):
    def full(tree, path, *more, **words):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, which, full)
    command = ["finetune", inputs / "c.pth", inputs / "images", "--out", tmp_path / "run", *FLAGS]
    if which == "save_checkpoint":
        command = ["pretext", "rotation", inputs / "images", "--arch", "test_resnet", "--out", tmp_path / "r.pth"]
    code, _, err = odcft_command(*command)
    assert code == 2, err
    assert "cannot be written: No space left on device. Make room" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "backbone").exists()
    if which == "save_file":
        monkeypatch.undo()
        code, _, err = odcft_command(*command, "--resume")
        assert code == 0, err
        about = json.loads((tmp_path / "run" / "run.json").read_text())
        assert about["finished"] == 2
