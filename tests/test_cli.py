"""What a user sees: commands, exit codes, one JSON object, and no traceback for a mistake of theirs."""

import json
import subprocess
import sys

import pytest
import torch

QUICK = ["--recipe", "small", "--epochs", "1", "--set", "optim.batch_size=4", "--set", "log.tensorboard=false"]


@pytest.fixture
def checkpoint(tmp_path, make_checkpoint):
    return make_checkpoint(tmp_path / "c.pth.tar")


@pytest.fixture
def images(tmp_path, make_images):
    return make_images(tmp_path / "images")


@pytest.mark.parametrize(
    ("code", "too_slow"),
    [
        ("import odcft", "torch numpy typer pydantic rich yaml"),
        ("sys.argv = ['odcft', '--help']; runpy.run_module('odcft', run_name='__main__')", "torch numpy yaml"),
        ("sys.argv = ['odcft', 'recipes']; runpy.run_module('odcft', run_name='__main__')", "torch numpy timm"),
    ],
)
def test_answers_at_once_because_nothing_slow_is_imported(code, too_slow):
    program = (
        "import sys, runpy\n"
        f"try: {code}\n"
        "except SystemExit: pass\n"
        f"slow = sorted(set('{too_slow}'.split()) & set(sys.modules))\n"
        "assert not slow, slow"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if "--help" in code:
        for command in ("demo", "inspect", "check-data", "init-memory", "finetune", "export", "evaluate", "recipes"):
            assert command in result.stdout


def test_inspect(odcft_command, checkpoint):
    code, out, _ = odcft_command("inspect", checkpoint, "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["arch"], values["matched"], values["expected"]) == ("test_resnet", 90, 90)
    assert values["input"]["color"] == "rgb"
    assert values["dropped"] == ["module.fc.weight", "module.fc.bias"]
    assert values["missing"] == values["unexpected"] == []
    code, out, err = odcft_command("inspect", checkpoint)
    assert (code, out) == (0, "")
    assert "90 of 90 tensors under state_dict/module." in err


def test_dc_without_a_recipe_has_its_own(odcft_command, tmp_path, checkpoint, images):
    few = ("--epochs", "1", "--clusters", "2", "--set", "data.size=32", "--set", "optim.batch_size=4")
    code, _, err = odcft_command("finetune", checkpoint, images, "--out", tmp_path / "run", "--method", "dc", *few)
    assert code == 0, err
    assert "schedule: step" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert "labels moving" not in err  # dc's stand still within an epoch


def test_the_whole_job(odcft_command, tmp_path, checkpoint, images):
    code, out, _ = odcft_command(
        "init-memory", checkpoint, images, "--out", tmp_path / "memory", "--recipe", "small", "--json"
    )
    assert code == 0
    assert json.loads(out)["clusters"] == 2
    code, out, err = odcft_command(
        "finetune", checkpoint, images, "--out", tmp_path / "run", "--memory", tmp_path / "memory", *QUICK, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["steps"] == 3
    assert err.count("\nMachine ") + err.startswith("Machine ") == 1
    code, out, _ = odcft_command("evaluate", tmp_path / "run", images, "--protocol", "svm,knn", "--json")
    assert code == 0
    assert {"svm", "knn", "before", "change"} <= set(json.loads(out))
    code, _, err = odcft_command("evaluate", tmp_path / "run", images)
    assert "before" in err
    assert "SVM mAP" in err
    code, _, _ = odcft_command("export", tmp_path / "run", tmp_path / "net.safetensors", "--format", "safetensors")
    assert code == 0
    assert (tmp_path / "net.safetensors").exists()


def test_two_processes_train_one_network(tmp_path, checkpoint, images):
    command = [
        sys.executable,
        "-m",
        "odcft",
        "finetune",
        str(checkpoint),
        str(images),
        "--out",
        str(tmp_path / "run"),
        *QUICK,
    ]
    result = subprocess.run([*command, "--devices", "2", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 3
    again = subprocess.run([*command, "--devices", "2"], capture_output=True, text=True)
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_recipes(odcft_command):
    code, out, _ = odcft_command("recipes")
    assert code == 0
    assert "odc_r50_finetune" in out
    assert "small" in out
    code, out, _ = odcft_command("recipes", "small")
    assert "clusters: auto" in out
    code, out, _ = odcft_command("recipes", "small", "--json")
    assert json.loads(out)["memory"]["clusters"] == "auto"


def test_non_empty_output_is_refused_and_left_alone(odcft_command, tmp_path, checkpoint, images):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for extra in ([], ["--overwrite"], ["--resume"]):
        code, _, err = odcft_command("finetune", checkpoint, images, "--out", out, *QUICK, *extra)
        assert code == 2, err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "precious"
    code, _, err = odcft_command("finetune", checkpoint, images, "--out", out, *QUICK)
    assert "--resume" in err
    assert "--overwrite" in err


def test_a_mistake_does_not_harm_an_earlier_run(odcft_command, tmp_path, checkpoint, images):
    run = tmp_path / "run"
    assert odcft_command("finetune", checkpoint, images, "--out", run, *QUICK)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _, _ = odcft_command("finetune", checkpoint, tmp_path / "nowhere", "--out", run, *QUICK, "--overwrite")
    assert code == 2
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert odcft_command("finetune", checkpoint, images, "--out", run, *QUICK, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing folder", "nowhere does not exist. Give a folder of images"),
        ("empty folder", "is empty"),
        ("folder without images", "holds no images"),
        ("only broken images", "can be read"),
        ("no checkpoint", "is not a checkpoint"),
        ("missing checkpoint", "no such checkpoint"),
        ("fits nothing", "fits no backbone"),
        ("half a backbone", "At least 90% are needed"),
        ("typo in a field", "Did you mean memory.momentum?"),
        ("typo in a recipe's name", "did you mean small"),
        ("too many clusters", "would use"),
        ("clusters that are no number", "is not valid: "),
        ("one argument", "finetune takes a checkpoint and then the images"),
        ("unknown method", "method='dk' is not valid: "),
        ("output is a file", "is a file"),
    ],
)
def test_mistakes_end_in_one_sentence(odcft_command, tmp_path, checkpoint, images, case, message):
    ckpt, data, out, extra = checkpoint, images, tmp_path / "run", []
    if case == "missing folder":
        data = tmp_path / "nowhere"
    elif case == "empty folder":
        data = tmp_path / "empty"
        data.mkdir()
    elif case == "folder without images":
        data = tmp_path / "texts"
        data.mkdir()
        (data / "a.txt").write_text("x")
    elif case == "only broken images":
        data = tmp_path / "broken"
        data.mkdir()
        for i in range(8):
            (data / f"{i}.jpg").write_bytes(b"x")
    elif case == "no checkpoint":
        ckpt = images / "a" / "000.png"
    elif case == "missing checkpoint":
        ckpt = tmp_path / "nothing.pth"
    elif case == "fits nothing":
        ckpt = tmp_path / "f.pth"
        torch.save({"x.weight": torch.zeros(2)}, ckpt)
    elif case == "half a backbone":
        ckpt = tmp_path / "h.pth"
        state = torch.load(checkpoint)["state_dict"]
        torch.save(dict(list(state.items())[:45]), ckpt)
    elif case == "typo in a field":
        extra = ["--set", "memory.momentun=0.3"]
    elif case == "typo in a recipe's name":
        extra = ["--recipe", "smal"]
    elif case == "too many clusters":
        extra = ["--clusters", "500"]
    elif case == "clusters that are no number":
        extra = ["--clusters", "some"]
    elif case == "one argument":
        data = None
    elif case == "unknown method":
        extra = ["--method", "dk"]
    elif case == "output is a file":
        out.write_text("mine")
    arguments = [ckpt, *([data] if data else [])]
    code, stdout, err = odcft_command("finetune", *arguments, "--out", out, *QUICK, *extra)
    assert code == 2, err
    assert stdout == ""
    assert message in err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("odcft: ")
    assert case == "output is a file" or not out.exists() or not any(out.iterdir())


def test_wrong_flags_exit_with_2(odcft_command):
    assert odcft_command("finetune", "--no-such-flag")[0] == 2
    assert odcft_command("no-such-command")[0] == 2
