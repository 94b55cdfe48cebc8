"""How a checkpoint is taken (--arch-args, data.mean, data.std) is remembered by all that comes of it."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from odcft import first_memory, prepare
from odcft.backbone.checkpoint_metadata import from_pretext_checkpoint
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError
from odcft.evaluation import comparison
from odcft.pretexts import training
from odcft.recipe import load_recipe
from odcft.run import output_checks
from odcft.train import fine_tune

QUICK = [
    "optim.batch_size=4",
    "neck.hidden=16",
    "neck.dim=8",
    "log.tensorboard=false",
    "optim.epochs=1",
    "data.size=32",
]
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
NORMAL = [f"data.mean={MEAN}", f"data.std={STD}"]


def options(*overrides):
    return ["--recipe", "small", *(word for one in (*QUICK, *overrides) for word in ("--set", one))]


@pytest.fixture
def images(tmp_path, make_images):
    return str(make_images(tmp_path / "images"))


@pytest.fixture
def heads(tmp_path):
    """A vision transformer whose number of heads no tensor tells."""
    torch.manual_seed(1)
    net = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    return str(tmp_path / "vit.pth")


@pytest.fixture
def taken(monkeypatch):
    """What every backbone was loaded with, of what is asked for here."""
    seen = []
    real = load_backbone

    def watched(ckpt, *args, **how):
        loaded = real(ckpt, *args, **how)
        seen.append((str(ckpt), loaded.backbone.arch_args, loaded.backbone.input))
        return loaded

    for module in (prepare, comparison, "odcft.backbone.load", "odcft.exports"):
        where = module if isinstance(module, str) else module.__name__
        if where != "odcft.evaluation.comparison":  # imports it when it is called
            monkeypatch.setattr(f"{where}.load_backbone", watched)
    return seen


def test_arch_args_travel_with_memory_run_export_and_evaluation(tmp_path, images, heads, taken, odcft_command):
    given = ("--arch", "test_vit", "--arch-args", "num_heads=4,img_size=32")
    code, _, told = odcft_command("inspect", heads, *given, "--json")
    assert code == 0, told
    code, _, told = odcft_command("init-memory", heads, images, "--out", tmp_path / "m", *given, *options())
    assert code == 0, told
    assert "--arch-args num_heads=4,img_size=32" in told  # the command to continue with
    code, _, told = odcft_command(
        "finetune", heads, images, "--memory", tmp_path / "m", "--out", tmp_path / "x", *options()
    )
    assert code == 2  # another network's features
    assert "arch_args" in told
    run = ("finetune", heads, images, "--memory", tmp_path / "m", "--out", tmp_path / "r", *given, *options())
    code, _, told = odcft_command(*run)
    assert code == 0, told
    wanted = {"num_heads": 4, "img_size": 32}
    assert load_recipe(tmp_path / "r" / "recipe.yaml").backbone.arch_args == wanted
    assert load_backbone(tmp_path / "r").backbone.net.blocks[0].attn.num_heads == 4
    code, _, told = odcft_command(*run, "--resume", "--epochs", "2")
    assert code == 0, told
    taken.clear()
    code, out, told = odcft_command("evaluate", tmp_path / "r", images, "--protocol", "knn", "--json")
    assert code == 0, told
    assert "before" in json.loads(out)
    assert {ckpt for ckpt, _, _ in taken} == {str(tmp_path / "r"), heads}
    assert all(kwargs == wanted for _, kwargs, _ in taken)
    code, _, told = odcft_command("export", tmp_path / "r", tmp_path / "out")
    assert code == 0, told
    assert load_backbone(tmp_path / "out").backbone.arch_args == wanted
    code, _, told = odcft_command("export", heads, tmp_path / "straight", *given)
    assert code == 0, told
    assert load_backbone(tmp_path / "straight").backbone.arch_args == wanted
    code, _, told = odcft_command("evaluate", heads, images, "--protocol", "knn", *given)
    assert code == 0, told


def test_a_resumed_run_keeps_its_arch_args(tmp_path, images, heads, odcft_command):
    run = ("finetune", heads, images, "--out", tmp_path / "r", "--arch", "test_vit", *options())
    code, _, told = odcft_command(*run, "--arch-args", "num_heads=4")
    assert code == 0, told
    code, _, told = odcft_command(*run, "--arch-args", "num_heads=2", "--resume", "--epochs", "2")
    assert code == 2
    assert "backbone.arch_args={'num_heads': 4}, not {'num_heads': 2}" in told


def test_a_wrong_argument_is_refused_by_name_in_every_command(tmp_path, images, heads, odcft_command):
    where = {"init-memory": [images, "--out", tmp_path / "o"], "finetune": [images, "--out", tmp_path / "o"]}
    where |= {"inspect": [], "export": [tmp_path / "o"], "evaluate": [images]}
    for command, rest in where.items():
        code, _, told = odcft_command(command, heads, *rest, "--arch-args", "head_count=4")
        assert code == 2
        assert "--arch-args head_count: no such argument. " in told
        assert "num_heads" in told
        code, _, told = odcft_command(command, heads, *rest, "--arch", "test_vit", "--arch-args", "num_heads=5")
        assert code == 2
        assert "cannot be built with num_heads=5" in told
    assert not (tmp_path / "o").exists()


def test_mean_and_deviation_travel_with_run_export_and_evaluation(
    tmp_path, images, make_checkpoint, taken, odcft_command
):
    ckpt = str(make_checkpoint(tmp_path / "c.pth"))
    code, _, told = odcft_command("init-memory", ckpt, images, "--out", tmp_path / "m", *options(*NORMAL))
    assert code == 0, told
    code, _, told = odcft_command(
        "finetune", ckpt, images, "--memory", tmp_path / "m", "--out", tmp_path / "x", *options()
    )
    assert code == 2
    assert "data.mean" in told
    code, _, told = odcft_command("finetune", ckpt, images, "--out", tmp_path / "r", *options(*NORMAL))
    assert code == 0, told
    config = json.loads((tmp_path / "r" / "backbone" / "config.json").read_text())
    assert config["odcft"]["input"]["mean"] == config["pretrained_cfg"]["mean"] == MEAN
    taken.clear()
    code, out, told = odcft_command("evaluate", tmp_path / "r", images, "--protocol", "knn", "--json")
    assert code == 0, told
    assert "before" in json.loads(out)
    assert len(taken) == 2
    assert all(shown.mean == tuple(MEAN) and shown.std == tuple(STD) for _, _, shown in taken)
    code, _, told = odcft_command("export", tmp_path / "r", tmp_path / "o.safetensors", "--format", "safetensors")
    assert code == 0, told
    assert load_backbone(tmp_path / "o.safetensors").backbone.input.std == tuple(STD)
    code, _, told = odcft_command("finetune", ckpt, images, "--out", tmp_path / "y", *options("data.mean=[0.5]"))
    assert code == 2
    assert "data.mean=[0.5]" in told
    assert "one a channel" in told


def test_pretext_builds_and_normalises_as_its_recipe_says(tmp_path, images):
    how = [*QUICK, "backbone.arch_args={small_stem: true}"]
    recipe = load_recipe("pretext", [*how, *NORMAL])
    out = tmp_path / "p.pth"
    training.train_pretext("rotation", images, "resnet18", out, recipe)
    backbone = load_backbone(out).backbone
    assert backbone.arch_args == {"small_stem": True}
    assert (backbone.input.mean, backbone.input.std) == (tuple(MEAN), tuple(STD))
    assert from_pretext_checkpoint(torch.load(out, weights_only=True)).architecture == "resnet18"
    for other in ([*how, f"data.mean={STD}"], [*QUICK, *NORMAL]):
        again = load_recipe("pretext", [*other, "optim.epochs=2"])
        with pytest.raises(OdcftError, match="was trained with"):
            training.train_pretext("rotation", images, "resnet18", out, again, resume=True)
    training.train_pretext(
        "rotation", images, "resnet18", out, load_recipe("pretext", [*how, *NORMAL, "optim.epochs=2"]), resume=True
    )


@pytest.mark.parametrize("format", ["timm", "safetensors", "torchvision"])
def test_export_says_how_to_load_what_timm_alone_cannot_build(tmp_path, format, odcft_command):
    args = ("scratch:resnet18", tmp_path / "o", "--format", format, "--arch-args", "small_stem=true")
    code, _, told = odcft_command("export", *args)
    if format == "torchvision":  # it has no such network, and its names would be misleading
        assert code == 2
        return
    assert code == 0, told
    (line,) = (line for line in told.splitlines() if "load_backbone" in line)
    loaded = {}
    exec(line.strip(), loaded)
    assert loaded["net"].arch_args == {"small_stem": True}


# ---------------------------------------------------------------- a RUN that somebody else made


ODD = [
    "",
    "{",
    "[]",
    "3",
    "null",
    '"x"',
    "[" * 100_000,
    "{}",
    '{"checkpoint": 3}',
    '{"checkpoint": [3], "sha256": [4]}',
]
ODD += [
    '{"checkpoint": null, "sha256": {}, "asked": [], "sample": 3}',
    '{"recipe": 3, "checkpoint": "c", "sha256": "s"}',
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A RUN, its checkpoint and its images."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "c.pth")
    draw = np.random.default_rng(0)
    for number in range(12):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    data, recipe = str(folder / "images"), load_recipe("small", QUICK)
    first_memory.init_memory(str(folder / "c.pth"), data, folder / "m", recipe)
    fine_tune(str(folder / "c.pth"), data, folder / "r", recipe)
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("run.json", text) for text in ODD),
        *(("recipe.yaml", text) for text in ("[]", "3", "{", "[" * 100_000, "backbone: {evil: 1}", "backbone: 3")),
        *(("metrics.jsonl", text) for text in ("[]", "[" * 100_000)),
    ],
    ids=lambda text: text[:30],
)
def test_a_run_whose_files_say_nonsense_gets_one_sentence(name, text, finished, tmp_path, odcft_command):
    path = finished / "r" / name
    before = path.read_text()
    path.write_text(text)
    try:
        for command in (
            ("evaluate", finished / "r", finished / "images", "--protocol", "knn"),
            ("export", finished / "r", tmp_path / "o"),
            ("finetune", finished / "c.pth", finished / "images", "--out", finished / "r", "--resume", *options()),
        ):
            code, _, told = odcft_command(*command)
            assert "Traceback" not in told
            assert code in (0, 2)
    finally:
        path.write_text(before)


BOMB = "method: odc\na: &a [1, 1]\nb: &b [*a, *a]\n"


def test_a_run_whose_recipe_is_a_bomb_gets_one_sentence(finished, tmp_path, odcft_command):
    path = finished / "r" / "recipe.yaml"
    before = path.read_text()
    path.write_text(BOMB)
    try:
        code, _, told = odcft_command("evaluate", finished / "r", finished / "images", "--protocol", "knn")
        assert code == 2
        assert "aliases" in told
        assert odcft_command("export", finished / "r", tmp_path / "o")[0] == 0
    finally:
        path.write_text(before)


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:30])
def test_a_memory_whose_description_says_nonsense_gets_one_sentence(text, tmp_path, finished, odcft_command):
    memory = shutil.copytree(finished / "m", tmp_path / "m")
    (memory / "memory.json").write_text(text)
    out = ("--memory", memory, "--out", tmp_path / "x", *options())
    code, _, told = odcft_command("finetune", finished / "c.pth", finished / "images", *out)
    assert code == 2
    assert "Traceback" not in told


# ---------------------------------------------------------------- RUN and init-memory folders that somebody else made


@pytest.fixture
def theirs(finished, tmp_path, monkeypatch):
    """A copy of a RUN, its memory, checkpoint and images; the current folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "theirs"))
    return tmp_path / "theirs"


RESUMED = ("finetune", "c.pth", "images", "--out", "r", "--resume", *options())
EXPORTED, EVALUATED = ("export", "r", "o"), ("evaluate", "r", "images", "--protocol", "knn")
BEGUN = ("finetune", "c.pth", "images", "--out", "x", "--memory", "m", *options())


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_states(run, **fields):
    """Put other words into the states of a RUN, with the checksum that goes with them."""
    for path in run.glob("checkpoints/step-*/state.json"):
        state = json.loads(json.loads(path.read_text())["state"])
        text = json.dumps({name: value for name, value in {**state, **fields}.items() if value != "gone"})
        path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "state": text}))


@pytest.mark.parametrize(
    "fields",
    [
        *({"files": {"same.safetensors": "", name: ""}} for name in ("/dev/zero", "../../../pipe")),
        *({"files": []}, {"ranks": "1/../../x"}, {"ranks": 10**9}, {"ranks": 0}, {"step": "x"}, {"step": -5}),
        *({"recipe": "x"}, {"recipe": {}}, {"recipe": "gone"}, {"versions": []}, {"steps_per_epoch": 0}),
        *({"skipped": []}, {"window": 3}, {"images": "x"}),
    ],
    ids=str,
)
def test_a_state_with_altered_fields_is_refused_and_no_other_file_is_read(fields, theirs, odcft_command):
    os.mkfifo("pipe")
    change_states(theirs / "r", **fields)
    code, _, told = odcft_command(*RESUMED)
    assert code == 2
    assert "cannot be resumed" in told


@pytest.mark.parametrize(
    "fields",
    [{"sample": {name: "x"}} for name in ("/dev/zero", "../pipe", "a\0b")] + [{"arch_given": 5}, {"arch_given": ["x"]}],
    ids=str,
)
def test_a_run_json_leads_to_no_other_files(fields, theirs, odcft_command):
    os.mkfifo("pipe")
    change(theirs / "r" / "run.json", **fields)
    code, _, told = odcft_command(*RESUMED)
    assert code == 2
    assert "cannot be resumed" in told


@pytest.mark.parametrize("text", ["row,name\n1,2\n", 'row,path\n1,"' + 200_000 * "x"], ids=["no path", "no end"])
@pytest.mark.parametrize("name", ["r/images.csv", "r/quarantine.csv", "m/images.csv"])
def test_a_table_that_is_none_gets_one_sentence(name, text, theirs, odcft_command):
    (theirs / name).write_text(text)
    code, _, told = odcft_command(*(BEGUN if name.startswith("m") else RESUMED))
    assert code == 2
    assert f"{name} is damaged" in told


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "run.json"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_run_of_pipes_and_devices_is_not_waited_for(name, what, theirs, odcft_command):
    (theirs / "r" / name).unlink()
    if what == "pipe":
        os.mkfifo(theirs / "r" / name)
    else:
        (theirs / "r" / name).symlink_to("/dev/zero")
    for command in (EXPORTED, EVALUATED):
        assert odcft_command(*command)[0] in (0, 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", b"\xff\xfe\n"),
        ("metrics.jsonl", b'{"loss": 1' + 400 * b"0" + b"}\n"),
        ("metrics.jsonl", b'{"loss": 1}\n'),
        ("recipe.yaml", b"method: odc\nseed: .inf\n"),
        ("run.json", b"[" * 100_000),
    ],
)
def test_a_run_of_other_bytes_is_exported_evaluated_and_finished(name, text, theirs, odcft_command):
    (theirs / "r" / name).write_bytes(text)
    for command in (EXPORTED, EVALUATED, RESUMED):
        assert odcft_command(*command)[0] in (0, 2)


def test_a_method_that_nobody_knows_is_not_in_the_model_card(theirs, odcft_command):
    (theirs / "r" / "recipe.yaml").write_text('method: "<img src=x>\\n\\n# forged"\nseed: 1\n')
    assert odcft_command(*EXPORTED)[0] == 0
    card = (theirs / "o" / "README.md").read_text()
    assert card.startswith("# test_resnet, without its head\n")
    assert "\n# " not in card


@pytest.mark.parametrize("name", ["memory.safetensors", "neck.safetensors", "images.csv", "memory.json"])
def test_a_memory_of_pipes_is_not_waited_for(name, theirs, odcft_command):
    (theirs / "m" / name).unlink()
    os.mkfifo(theirs / "m" / name)
    code, _, told = odcft_command(*BEGUN)
    assert code == 2
    assert f"{name} is not a file" in told


@pytest.mark.parametrize(
    "other",
    [
        {"centroids": torch.zeros(2)},
        {"features": torch.zeros(12, 8, dtype=torch.float8_e4m3fn)},
        {"features": torch.zeros(12, 8, dtype=torch.int8)},
        {"labels": torch.full((12,), 0.5)},
    ],
    ids=lambda other: "".join(other),
)
def test_a_memory_of_other_tensors_gets_one_sentence(other, theirs, odcft_command):
    path = theirs / "m" / "memory.safetensors"
    save_file({**load_file(path), **other}, path)
    code, _, told = odcft_command(*BEGUN)
    assert code == 2
    assert "is not a complete folder of `odcft init-memory`" in told


# ---------------------------------------------------------------- places and sizes that cannot be


PIPES = [
    ("export", "c.pth", "p", "--format", "safetensors", "--overwrite"),
    ("pretext", "rotation", "images", "--arch", "test_resnet", "--out", "p", "--overwrite"),
    ("pretext", "rotation", "images", "--arch", "test_resnet", "--out", "p", "--resume"),
    ("evaluate", "--features", "p"),
]


@pytest.mark.parametrize("command", PIPES, ids=lambda command: f"{command[0]} {command[-1]}")
def test_a_pipe_where_a_file_should_be_is_not_waited_for(command, theirs, odcft_command):
    os.mkfifo("p")
    assert odcft_command(*command)[0] == 2


def test_overwriting_does_not_read_a_device_or_unpack_a_bomb(theirs):
    with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    for path, said in ((Path("/dev/zero"), "is not a file"), (Path("bomb.pth"), "was not written by odcft")):
        with pytest.raises(OdcftError, match=said):
            output_checks.refuse_foreign_file(path)


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "c.pth", "x" * 300),
        ("pretext", "rotation", "x" * 300, "--arch", "test_resnet", "--out", "p.pth"),
        ("evaluate", "c.pth", "long.csv"),
        ("evaluate", "c.pth", "images", "--size", "100000"),
        ("export", "c.pth", "o", "--size", "100000"),
        ("finetune", "c.pth", "images", "--out", "x", "--epochs", str(10**21)),
        *(
            ("finetune", "c.pth", "images", "--out", "x", "--set", f"{name}={10**21}")
            for name in ("data.size", "data.workers", "neck.hidden", "neck.dim", "optim.epochs")
        ),
    ],
    ids=lambda command: command[-1][:30],
)
def test_what_no_machine_can_do_is_refused_in_a_sentence(command, theirs, odcft_command):
    Path("long.csv").write_text("path," + 200_000 * "x" + "\na,b\n")
    code, _, told = odcft_command(*command)
    assert code == 2
    assert "Out of memory" not in told
    assert "--resume" not in told
