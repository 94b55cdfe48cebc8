"""`odcft finetune --dry-run`: what a run would do, need and take."""

import json
import subprocess
import sys

import pytest
from folders import tree

from odcft import dry_run as module
from odcft.backbone.load import load_backbone
from odcft.dry_run import describe, dry_run
from odcft.errors import OdcftError
from odcft.first_memory import init_memory
from odcft.model.members import make_members, make_necks
from odcft.plan import fill_autos
from odcft.recipe import load_recipe
from odcft.train import fine_tune

QUICK = ["optim.batch_size=4", "optim.epochs=3", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]


@pytest.fixture
def given(tmp_path, make_images, make_checkpoint):
    return str(make_checkpoint(tmp_path / "c.pth")), str(make_images(tmp_path / "images", 14))


@pytest.mark.parametrize("method", ["odc", pytest.param("dc", marks=pytest.mark.slow)])
def test_it_says_what_the_run_then_does_and_writes_nothing(tmp_path, given, method):
    layer = ["memory.start_layer=layer2"] if method == "odc" else []
    recipe, before = load_recipe("small", [*QUICK, f"method={method}", *layer]), tree(tmp_path)
    told = dry_run(*given, tmp_path / "run", recipe)
    assert tree(tmp_path) == before
    assert "batch 4 in 2 parts" in describe({**told, "parts": 2})[0]
    done = fine_tune(*given, tmp_path / "run", recipe)
    for name in ("images", "clusters", "epochs", "steps"):
        assert told[name] == done[name], name
    assert told["fits"]
    assert told["steps_timed"] == 7
    assert told["seconds"]["total"] > 0
    assert told["needs"]["host"] > 1e8
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert written < told["needs"]["disk"] < 3 * written
    lines = describe(told)
    assert lines[0].startswith(f"Would train test_resnet at 32 pixels · {method.upper()} · K = 2 · 3 epochs, 9 steps")
    assert lines[-1] == "Nothing was written."


def test_a_memory_is_taken_over(tmp_path, given):
    recipe = load_recipe("small", QUICK)
    init_memory(*given, tmp_path / "m", recipe)
    told = dry_run(*given, tmp_path / "run", recipe, memory=tmp_path / "m")
    assert told["seconds"]["features"] == told["seconds"]["kmeans"] == 0


def test_a_folder_that_the_run_would_refuse_is_refused(tmp_path, given):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    with pytest.raises(OdcftError, match="is not empty"):
        dry_run(*given, tmp_path / "run", load_recipe("small", QUICK))
    with pytest.raises(OdcftError, match="holds files odcft did not write"):
        dry_run(*given, tmp_path / "run", load_recipe("small", QUICK), overwrite=True)
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(OdcftError, match=r"None of the images tried can be read"):
        dry_run(*given, tmp_path / "new", load_recipe("small", QUICK))


@pytest.mark.parametrize(
    ("short", "setting"),
    [
        ("host", "--set optim.batch_size=2 --set optim.lr=0.05"),
        ("gpu", "--set optim.accumulate=2 (the same batch in 2 parts), or --set optim.batch_size=2"),
        ("shared", "--set data.workers=1"),
        ("disk", "choose another --out"),
    ],
)
def test_what_does_not_fit_comes_with_the_setting_that_helps(short, setting):
    recipe = load_recipe("small", QUICK)
    needs = {"host": 100, "workers": 0, "gpu": 100, "shared": 100, "disk": 100}
    free = {**dict.fromkeys(("host", "gpu", "shared", "disk"), 1000), short: 60}
    plan = fill_autos(recipe)
    plan.data.workers = 2
    (problem,) = module.problems(needs, free, plan)
    assert setting in problem
    assert module.problems(needs, dict.fromkeys(free), plan) == []


@pytest.mark.parametrize(
    ("arch", "has_it", "settings", "named"),
    [
        ("test_resnet", True, [], "bfloat16"),
        ("test_vit", True, [], "bfloat16"),
        ("test_efficientnet", True, [], None),  # grouped convolutions are slower in it
        ("test_resnet", True, ["optim.precision=float32"], None),  # the user's choice
        ("test_resnet", True, ["optim.skip_padding=false"], None),
        ("test_resnet", False, [], None),
    ],
)
def test_bfloat16_is_named_where_it_is_safe_and_faster(monkeypatch, arch, has_it, settings, named):
    monkeypatch.setattr(module, "has_bfloat16", lambda device: has_it)
    recipe, backbone = load_recipe("small", [*QUICK, *settings]), load_backbone(f"scratch:{arch}").backbone
    make_members([backbone], *make_necks([backbone], fill_autos(recipe)), fill_autos(recipe))
    assert module._faster_precision(recipe, [backbone]) == named


def test_the_command(odcft_command, tmp_path, given, monkeypatch):
    options = [*given, "--out", tmp_path / "run", "--recipe", "small", *(f"--set={s}" for s in QUICK)]
    code, out, told = odcft_command("finetune", *options, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 9
    assert "Start it:   odcft finetune" in told
    assert "--dry-run" not in told.split("Start it:")[1]
    code, _, told = odcft_command("finetune", *options, "--dry-run", "--resume")
    assert code == 2
    monkeypatch.setattr(module, "free_space", lambda out: {"host": None, "gpu": None, "shared": None, "disk": 1000})
    code, out, told = odcft_command("finetune", *options, "--dry-run", "--json")
    assert code == 2
    assert json.loads(out)["fits"] is False
    assert "Too much    disk: " in told
    assert "Start it" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("has_it", [True, False])
def test_a_dry_run_offers_bfloat16_to_try_where_it_may_be_faster(tmp_path, given, monkeypatch, has_it):
    monkeypatch.setattr(module, "has_bfloat16", lambda device: has_it)
    values = dry_run(*given, tmp_path / "run", load_recipe("small", QUICK))
    offers = [line for line in module.describe(values) if "--set optim.precision=bfloat16" in line]
    assert len(offers) == (1 if has_it else 0)


def test_for_few_images_the_default_recipe_is_not_the_first_to_try(odcft_command, tmp_path, given):
    quick = ["data.size=32", "optim.epochs=1", "data.workers=0", "log.tensorboard=false"]
    options = [*given, "--out", tmp_path / "run", *(f"--set={s}" for s in quick), "--dry-run"]
    code, _, told = odcft_command("finetune", *options)
    assert code == 0, told
    (line,) = [line for line in told.splitlines() if line.startswith("Try first:")]
    assert line.endswith("--recipe small --dry-run   # made for such a set")
    assert "Try first" not in odcft_command("finetune", *options, "--recipe", "odc_r50_finetune")[2]


def test_a_step_that_needs_more_memory_than_there_is_is_not_tried(tmp_path, given, monkeypatch):
    free = {"host": 500_000, "gpu": None, "shared": None, "disk": None}
    monkeypatch.setattr(module, "free_space", lambda out: free)
    with pytest.raises(OdcftError, match=r"A step with batch 4 .* needs about .* MB .*--set optim\.accumulate=2"):
        module.dry_run(*given, tmp_path / "run", load_recipe("small", QUICK))


@pytest.mark.slow
def test_several_processes_report_what_each_needs(tmp_path, given):
    command = [sys.executable, "-m", "odcft", "finetune", *given, "--out", str(tmp_path / "run"), "--recipe", "small"]
    command += [*(f"--set={s}" for s in QUICK), "--devices", "2", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told = json.loads(done.stdout)
    assert (told["processes"], told["batch_size"], told["batch_of_rank"], told["steps"]) == (2, 4, 2, 9)
    assert "batch 4 (2 a process)" in done.stderr
    assert not (tmp_path / "run").exists()
