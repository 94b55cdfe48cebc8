"""The Python functions: light to import, typed, with the words, defaults and results of the commands."""

import inspect
import itertools
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

import odcft
from odcft.cli import app

ROOT = Path(__file__).parent.parent
FUNCTIONS = [name for name in odcft.__all__ if name[0].islower()]

# Twice, in both orders, after the modules that hold them: a sub-module of a verb's name would hide the function.
EVERY_ORDER = """
import sys, types
import odcft
assert "torch" not in sys.modules
names = [name for name in odcft.__all__ if name[0].islower()]
for order in (names, names[::-1]):
    for name in order:
        assert isinstance(getattr(odcft, name), types.FunctionType), name
import odcft.evaluation.comparison, odcft.cli, odcft.demo, odcft.pretexts.training, odcft.exports
import odcft.clustering.kmeans
from odcft import *
for name in names:
    assert isinstance(getattr(odcft, name), types.FunctionType), name
    assert getattr(odcft, name) is globals()[name], name
assert issubclass(odcft.OdcftError, Exception) and isinstance(odcft.load_recipe("small"), odcft.Recipe)
"""
QUICK = {"recipe": "small", "epochs": 1, "clusters": 2, "progress": False}
QUICK["set"] = {"data.size": 32, "optim.batch_size": 4, "log.tensorboard": False, "data.workers": 0}


@pytest.fixture
def here(tmp_path, make_images, make_checkpoint):
    make_images(tmp_path / "images")
    make_checkpoint(tmp_path / "c.pth")
    return tmp_path


def bits(run):
    return (Path(run) / "backbone" / "model.safetensors").read_bytes()


def test_every_verb_is_a_function_in_any_order_and_twice():
    subprocess.run([sys.executable, "-c", EVERY_ORDER], check=True)


def test_no_module_has_the_name_of_a_verb():
    modules = {module.name for module in pkgutil.iter_modules(odcft.__path__)}
    assert not modules & set(odcft.__all__)


# ---------------------------------------------------------------- the words of the command line

# What is not an argument of the function: how the result is printed, and what only a command can do.
NOT_IN_PYTHON = {"as_json", "devices", "dry_run"}
RENAMED = {"ckpts": "ckpt", "overrides": "set", "eval_data": "eval"}
# Arguments of several CKPTs and then DATA, which Python has as two.
NO_OPTION = {"ckpt", "data", "progress", "source", "out", "run", "other"}


@pytest.mark.parametrize(
    ("command", "function"),
    [
        *(("finetune", "fine_tune"), ("init-memory", "init_memory"), ("evaluate", "evaluate"), ("embed", "embed")),
        *(("export", "export"), ("clusters", "clusters"), ("report", "report")),
    ],
)
def test_a_function_has_the_options_and_defaults_of_its_command(command, function):
    options = {RENAMED.get(p.name, p.name): p for p in typer.main.get_command(app).commands[command].params}
    options = {name: option for name, option in options.items() if name not in NOT_IN_PYTHON}
    arguments = inspect.signature(getattr(odcft, function)).parameters
    assert set(options) | NO_OPTION >= set(arguments), "an argument that the command lacks"
    assert set(arguments) >= set(options), "an option that the function lacks"
    for name, option in options.items():
        if name in NO_OPTION:
            continue
        assert arguments[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        default = arguments[name].default
        assert default == (False if option.is_flag else option.default) or default is option.default is None, name


@pytest.mark.parametrize(
    ("function", "arguments", "options", "says"),
    [
        ("clusters", (None,), {}, "run=None"),
        ("clusters", ("run",), {"most": 0}, "most=0: give a number from 1 to"),
        ("clusters", ("run",), {"threshold": 2}, "threshold=2: give a number from 0.5 to 1"),
        ("clusters", ("run",), {"threshold": 0.9}, "belongs to --near-duplicates"),
        ("clusters", ("run",), {"near_duplicates": True, "folders": "f"}, "--folders is for clusters"),
        ("report", (["a", "b"],), {}, "run=['a', 'b'] (list): give a str or a Path"),
        ("report", ("a", "b"), {}, "pass --out"),
        ("report", ("a", "b"), {"out": "x.html", "labels": "l"}, "are for the report of one run"),
        ("report", ("run",), {"sample": -1}, "sample=-1: give a number from 0 to 50,000"),
        ("report", ("run",), {"megabytes": float("nan")}, "megabytes=nan: give a number from 1 to 1,000"),
        ("report", ("nowhere",), {}, "is not a RUN"),
    ],
)
def test_a_wrong_argument_of_clusters_and_report_is_one_sentence(function, arguments, options, says, capfd):
    with pytest.raises(odcft.OdcftError) as refused:
        getattr(odcft, function)(*arguments, **options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_every_argument_and_result_is_annotated():
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(odcft, name))
        assert signature.return_annotation is not inspect.Signature.empty, name
        bare = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
        assert not bare, name
        assert getattr(odcft, name).__doc__.count("\n") > 3, name


def test_a_function_gives_the_bits_and_the_summary_of_the_command(here, odcft_command):
    made = odcft.fine_tune(here / "c.pth", here / "images", here / "python", **QUICK)
    words = [f"--set={name}={str(value).lower()}" for name, value in QUICK["set"].items()]
    words += ["--recipe", "small", "--epochs", 1, "--clusters", 2, "--json"]
    code, out, err = odcft_command("finetune", here / "c.pth", here / "images", "--out", here / "shell", *words)
    assert code == 0, err
    assert bits(here / "python") == bits(here / "shell")
    assert (here / "python/recipe.yaml").read_text() == (here / "shell/recipe.yaml").read_text()
    printed = __import__("json").loads(out)
    assert set(made) == set(printed) | {"metrics", "backbones"}
    assert made["backbone"] == str(here / "python" / "backbone")
    assert (made["loss"], made["steps"]) == (printed["loss"], printed["steps"])
    assert made["metrics"][-1]["loss"] == made["loss"]


# ---------------------------------------------------------------- what a script or a notebook relies on


def test_the_whole_job(here, capfd):
    settings = {key: value for key, value in QUICK.items() if key != "epochs"}
    memory = odcft.init_memory(here / "c.pth", here / "images", here / "memory", **settings)
    assert (memory["images"], memory["clusters"]) == (12, 2)
    random, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    run = odcft.fine_tune(here / "c.pth", here / "images", here / "run", memory=here / "memory", **QUICK)
    assert torch.equal(random, torch.get_rng_state())
    assert signal.getsignal(signal.SIGINT) is handler
    made = odcft.embed(run["out"], here / "images", progress=False)
    assert made["features"].shape == (12, 96)
    assert made["labels"] == [path.split("/")[0] for path in made["paths"]]
    assert made["out"] is None
    written = odcft.embed(run["out"], here / "images", here / "f.npz", progress=False)
    assert (written["features"] == made["features"]).all()
    found = odcft.evaluate(run["out"], here / "images", protocol=["knn"], progress=False)
    assert set(found) >= {"knn", "before", "change", "verdict"}
    assert odcft.evaluate(features=here / "f.npz", protocol="knn", progress=False)["knn"]["top1"] >= 0
    net = odcft.export(run["out"], here / "x.safetensors", format="safetensors")
    again = odcft.load_backbone(here / "x.safetensors").backbone
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(net.eval()(images), again(images), atol=1e-5)
    assert len(odcft.find_images(here / "images")) == 12
    assert capfd.readouterr() == ("", ""), "progress=False prints nothing"


def test_a_recipe_object_is_as_good_as_a_name_and_stays_as_it_is(here):
    recipe = odcft.load_recipe("small", {"memory.momentum": 0.3, "augment.crop_scale": (0.2, 1.0)}, preset="gray")
    assert (recipe.memory.momentum, recipe.augment.hue, recipe.augment.crop_scale) == (0.3, 0, (0.2, 1.0))
    before = recipe.model_dump()
    run = odcft.fine_tune(here / "c.pth", here / "images", here / "run", **{**QUICK, "recipe": recipe})
    assert recipe.model_dump() == before
    assert "momentum: 0.3" in (Path(run["out"]) / "recipe.yaml").read_text()


def test_ctrl_c_raises_stopped_and_resume_goes_on_to_the_same_bits(here):
    reads = itertools.count(1)  # several threads read: each gets a number of its own

    def read(data):  # 12 images for the features, then those of the first steps
        import io

        import numpy as np
        from PIL import Image

        if next(reads) == 18:
            signal.raise_signal(signal.SIGINT)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    arguments = {**QUICK, "epochs": 8, "reader": read}  # the signal comes long before the end
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in its background jobs
    try:
        with pytest.raises(odcft.Stopped, match="resume=True"):
            odcft.fine_tune(here / "c.pth", here / "images", here / "run", **arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    odcft.fine_tune(here / "c.pth", here / "images", here / "run", resume=True, **arguments)
    odcft.fine_tune(here / "c.pth", here / "images", here / "whole", **arguments)
    assert bits(here / "run") == bits(here / "whole")


def test_two_trainings_at_once_are_refused(here):
    from odcft import api

    with api._training, pytest.raises(odcft.OdcftError, match="another thread"):
        odcft.fine_tune(here / "c.pth", here / "images", here / "run", **QUICK)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"set": {"memory.momentun": 1}}, "memory.momentum"),
        ({"set": "a=b"}, r"'a=b' \(str\): give a dict, a list of str or None"),
        ({"set": {"seed": object()}}, "not JSON"),
        ({"set": [3]}, "give a dict, a list of str"),
        ({"clusters": "many"}, "memory.clusters"),
        ({"clusters": 1.5}, r"clusters=1.5 \(float\): give an int, a str or None"),
        ({"recipe": 3}, "recipe=3 .*a Recipe or None"),
        ({"recipe": "smal"}, "did you mean small"),
        ({"method": "x"}, "odc"),
        ({"memory": 5}, "memory=5 .*a str, a Path or None"),
        ({"ckpt": []}, "give a checkpoint"),
        ({"ckpt": None}, "ckpt=None .*a str, a Path or a list of str or Path"),
        ({"ckpt": ["a", 3]}, "a list of str or Path"),
        ({"ckpt": b"c.pth"}, r"\(bytes\): give a str"),
        ({"out": None}, "out=None .*a str or a Path"),
        ({"data": 7}, "data=7"),
        ({"preset": "grey"}, "gray"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": True}, r"epochs=True \(bool\): give an int or None"),
        ({"resume": "no"}, "give True or False"),
        ({"reader": 3}, "a str, a function or None"),
        ({"part": [1]}, "part="),
        ({"arch_args": {1: 2}}, "a str, a dict or None"),
        ({"eval": "nowhere"}, "does not exist"),
        ({"eval_every": 0}, "eval_every"),
        ({"arch": "resnet1"}, "timm has no"),
        ({"arch_args": "x"}, "name=value"),
    ],
)
def test_mistakes_raise_one_sentence_and_write_nothing(here, arguments, message):
    given = {"ckpt": here / "c.pth", "data": here / "images", "out": here / "run"} | QUICK | arguments
    with pytest.raises(odcft.OdcftError, match=message):
        odcft.fine_tune(**given)
    assert not (here / "run").exists()


WRONG = [object(), 1.5, b"c.pth", [object()], {1: 2}, None, True, "no such thing", -1]


FUNCTIONS = ["load_backbone", "find_images", "init_memory", "fine_tune", "evaluate"]
FUNCTIONS += ["embed", "export", "clusters", "report"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_argument_of_a_wrong_type_gets_past_the_first_line(tmp_path, monkeypatch, name):
    """Every argument with everything that its annotation does not allow; what it allows meets a CKPT without a file."""
    monkeypatch.chdir(tmp_path)
    function, refused = getattr(odcft, name), 0
    arguments = inspect.signature(function).parameters
    required = {one: "nowhere" for one, p in arguments.items() if p.default is inspect.Parameter.empty}
    for argument in arguments:
        for value in WRONG:
            with pytest.raises(odcft.OdcftError) as refusal:
                function(**{**required, argument: value})
            refused += f"{argument}=" in str(refusal.value)
    assert refused > 5 * len(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("widgets", [False, True])
def test_progress_in_a_notebook(monkeypatch, capfd, widgets):
    """A bar needs ipywidgets there; without them, plain lines."""
    import importlib.util

    from odcft import progress

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    find = importlib.util.find_spec
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets else find("nowhere"))
    shown = progress.Progress(every=0)
    assert shown.bars is widgets
    if not widgets:
        lines = []
        monkeypatch.setattr(shown.console, "print", lambda line, **_: lines.append(line))
        with shown.phase("Features", 2) as advance:
            advance(2)
        assert lines[0].startswith("Features: 2/2 img")


def test_a_slow_phase_is_announced_before_anything_is_done(monkeypatch):
    from odcft import progress

    monkeypatch.setattr(progress, "SILENCE", 0.05)
    shown, lines = progress.Progress(), []
    monkeypatch.setattr(shown, "say", lambda line, style="": lines.append(line))
    with shown.phase("SVM", 2, "classes") as advance:
        time.sleep(0.3)
        assert lines == ["SVM: 0/2 classes"]
        advance(2)
    with shown.phase("Quick", 1) as advance:
        advance(1)
    time.sleep(0.1)
    assert [line.split(",")[0] for line in lines] == ["SVM: 0/2 classes", "SVM: 2/2 classes", "Quick: 1/1 img"]


# ---------------------------------------------------------------- whole scripts

UNGUARDED = """
import threading, odcft
quick = dict(recipe="small", epochs=1, clusters=2, progress=False,
             set={"data.size": 32, "optim.batch_size": 4, "log.tensorboard": False, "data.workers": 2})
odcft.fine_tune("c.pth", "images", "one", **quick)
odcft.fine_tune("c.pth", "images", "two", **quick)
thread = threading.Thread(target=odcft.fine_tune, args=("c.pth", "images", "three"), kwargs=quick)
thread.start()
thread.join()
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_twice_and_in_a_thread(here):
    subprocess.run([sys.executable, "-c", UNGUARDED], check=True, cwd=here, env=environment())
    assert bits(here / "one") == bits(here / "two") == bits(here / "three")


@pytest.mark.slow
def test_workers_that_import_the_script_again_say_how_to_guard_it(here):
    script = 'import multiprocessing; multiprocessing.set_start_method("forkserver", force=True)\n'
    (here / "script.py").write_text(script + UNGUARDED)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert 'if __name__ == "__main__"' in done.stderr


TYPED = """
import odcft
from odcft import Recipe, fine_tune

recipe: Recipe = odcft.load_recipe("small", {"optim.epochs": 2})
run = fine_tune("c.pth", ["x"][0], "run", recipe=recipe, clusters="auto")
reveal_type(run["backbone"])
reveal_type(run["metrics"])
reveal_type(odcft.embed(run["out"], "images")["features"])
reveal_type(odcft.load_backbone("c.pth").backbone)
reveal_type(odcft.find_images("images"))
odcft.evaluate("a", "b", protocol=("svm", "knn"), epochs=3)
fine_tune("c.pth", "images", "run", "small")
"""


@pytest.mark.slow
def test_mypy_checks_a_users_script(tmp_path):
    (tmp_path / "user.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    command += ["--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(MYPYPATH=str(ROOT)), capture_output=True, text=True)
    lines = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("user.py")]
    assert 'note: Revealed type is "str"' in lines[0]
    assert "list[dict[str, Any]]" in lines[1]
    assert "ndarray" in lines[2]
    assert "odcft.backbone.network.Backbone" in lines[3]
    assert "odcft.data.images.Images" in lines[4]
    assert 'Unexpected keyword argument "epochs"' in lines[5]
    errors = [line for line in lines if line.startswith("error")]
    assert "Too many positional arguments" in errors[1]
    assert len([line for line in lines if line.startswith("error")]) == 2, done.stdout


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
