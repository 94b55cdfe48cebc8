import json

import pytest
import timm
import torch
from backbone_helpers import contents

from odcft.backbone.backbone_parts import Part, only_part, why_taken
from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError
from odcft.recipe import load_options, load_recipe


def weights(seed, prefix="", arch="test_resnet"):
    torch.manual_seed(seed)
    net = timm.create_model(arch, num_classes=0)
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def equal(backbone, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in backbone.net.state_dict().items())


@pytest.fixture
def dino(tmp_path):
    """A file of a student and a teacher, as DINO's code saves it."""
    student, teacher = weights(1, "module.backbone."), weights(2, "backbone.")
    torch.save({"student": student, "teacher": teacher, "epoch": 1}, tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


def byol_learner(path):
    """A file of byol-pytorch's whole learner: the online network twice, and the target first in the alphabet's way."""
    online, target = weights(1), weights(2)
    state = {f"target_encoder.net.{name}": tensor for name, tensor in target.items()}
    state |= {f"net.{name}": tensor for name, tensor in online.items()}
    state |= {f"online_encoder.net.{name}": tensor for name, tensor in online.items()}
    for encoder in ("online_encoder", "target_encoder"):
        state[f"{encoder}.projector.net.0.weight"] = torch.ones(8, 8)
    torch.save(state, path)
    return online, target


def test_byol_gives_its_online_network(tmp_path):
    online, target = byol_learner(tmp_path / "byol.pth")
    loaded = load_backbone(tmp_path / "byol.pth")
    assert equal(loaded.backbone, online)
    assert loaded.parts[0] == Part("online_encoder.net.", True)
    assert set(loaded.parts[1:]) == {Part("net.", True), Part("target_encoder.net.", False)}
    assert "online network is the one that is trained" in loaded.why
    taken = load_backbone(tmp_path / "byol.pth", part="target_encoder.net.")
    assert equal(taken.backbone, target)
    assert taken.why == "as --part asks"
    assert {part.where for part in taken.parts} == {part.where for part in loaded.parts}


def test_msn_still_gives_its_target_encoder(tmp_path):
    torch.save({"encoder": weights(1, "module."), "target_encoder": weights(2, "module.")}, tmp_path / "msn.pth")
    assert equal(load_backbone(tmp_path / "msn.pth").backbone, weights(2))


@pytest.mark.parametrize("part", ["student", "student/", "student/module.backbone", "student/module.backbone."])
def test_another_part_is_taken_by_any_of_its_names(dino, part):
    assert equal(load_backbone(dino).backbone, weights(2))
    assert equal(load_backbone(dino, part=part).backbone, weights(1))


def test_a_part_may_be_another_network(tmp_path):
    small, other = weights(1, "encoder."), weights(2, arch="test_vit")
    torch.save({"model": small, "teacher": other}, tmp_path / "c.pth")
    assert load_backbone(tmp_path / "c.pth").backbone.arch == "test_resnet"
    assert load_backbone(tmp_path / "c.pth", part="teacher").backbone.arch == "test_vit"


@pytest.mark.parametrize("part", ["stud", "student/module.backbone.x", "teacher.backbone.head", "", "/"])
def test_a_part_that_is_not_there_is_refused_with_those_that_are(dino, part):
    with pytest.raises(OdcftError, match=r"no tensors there. Give student/module\.backbone\., teacher/backbone\. or"):
        load_backbone(dino, part=part)


def test_names_have_no_parts():
    with pytest.raises(OdcftError, match="scratch:test_resnet is not a file, so it has no parts"):
        load_backbone("scratch:test_resnet", part="student")


def test_a_part_keeps_the_names_of_its_tensors():
    one = {"a.b.w": torch.zeros(1), "a.bc.w": torch.zeros(1)}
    assert only_part(contents(one), "a.b").state_dicts == {"": {"a.b.w": one["a.b.w"]}}


def test_why_a_part_is_taken():
    assert "moving average of the student" in why_taken([Part("teacher/x.", True), Part("student", False)], None)
    assert why_taken([Part("a.", True), Part("b.", True)], None) == "the others are the same tensors"
    assert why_taken([Part("a.", True), Part("b.", False)], None) == "its name suits best, or it comes first"


def test_one_backbone_is_one_part(tmp_path, make_checkpoint):
    loaded = load_backbone(make_checkpoint(tmp_path / "c.pth"))
    assert [part.where for part in loaded.parts] == [loaded.match.where]
    assert loaded.why == ""


@pytest.mark.slow
def test_a_run_remembers_its_part(tmp_path, make_images, dino, odcft_command):
    data, run = make_images(tmp_path / "data"), tmp_path / "run"
    args = ("finetune", dino, data, "--out", run, "--recipe", "small", "--set", "optim.batch_size=4", "--epochs")
    code, _, err = odcft_command(*args, 1, "--part", "student")
    assert code == 0, err
    assert "under student/module.backbone." in err
    assert load_recipe(run / "recipe.yaml").backbone.part == "student"
    code, _, err = odcft_command(*args[:5], "--resume", "--epochs", 2)
    assert code == 0, err
    code, _, err = odcft_command(*args[:5], "--resume", "--epochs", 3, "--part", "teacher")
    assert code == 2
    assert "was started with backbone.part=student, not teacher" in err


@pytest.mark.slow
def test_before_is_the_part_the_run_was_started_from(tmp_path, make_images, dino, odcft_command):
    data, run = make_images(tmp_path / "data", count=24), tmp_path / "run"
    args = ("--recipe", "small", "--set", "optim.batch_size=4", "--epochs", 1, "--part", "student")
    assert odcft_command("finetune", dino, data, "--out", run, *args)[0] == 0
    _, out, _ = odcft_command("evaluate", run, data, "--protocol", "knn", "--json")
    _, alone, _ = odcft_command(
        "evaluate", dino, data, "--protocol", "knn", "--json", "--part", "student", "--size", 32
    )
    before = json.loads(out)["before"]
    assert before["knn"] == json.loads(alone)["knn"]


@pytest.mark.slow
def test_memory_and_export_take_a_part(tmp_path, make_images, dino, odcft_command):
    data = make_images(tmp_path / "data")
    args = ("--recipe", "small", "--set", "optim.batch_size=4", "--part", "student")
    assert odcft_command("init-memory", dino, data, "--out", tmp_path / "memory", *args)[0] == 0
    refused = ("finetune", dino, data, "--out", tmp_path / "no", "--memory", tmp_path / "memory", *args[:4])
    code, _, err = odcft_command(*refused)
    assert code == 2
    assert "backbone.part" in err
    assert odcft_command("export", dino, tmp_path / "out", "--part", "student")[0] == 0
    assert equal(load_backbone(tmp_path / "out").backbone, weights(1))


def test_the_parts_named_are_networks_not_layers(tmp_path):
    names = ("student", "teacher")
    torch.save({name: weights(1) for name in names} | {"optimizer": {"0": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(OdcftError, match="Give student, teacher or a name within"):
        load_backbone(tmp_path / "a.pth", part="x")
    moco = {**weights(1, "module.encoder_q."), **weights(2, "module.encoder_k."), "module.queue": torch.zeros(8, 9)}
    torch.save({"state_dict": moco}, tmp_path / "b.pth")
    with pytest.raises(OdcftError, match=r"Give state_dict/module\.encoder_q\., state_dict/module\.encoder_k\. or"):
        load_backbone(tmp_path / "b.pth", part="x")
    torch.save(weights(1), tmp_path / "c.pth")
    with pytest.raises(OdcftError, match="Drop --part: it holds one network"):
        load_backbone(tmp_path / "c.pth", part="x")


def test_copies_under_unknown_names_are_parts_too(tmp_path):
    def words(prefix, seed):
        path = {name: f"{prefix}w{number}" for number, name in enumerate({n.rpartition(".")[0]: 0 for n in weights(1)})}
        return {f"{path[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in weights(seed).items()}

    torch.save({**words("alpha.", 1), **words("beta.", 2), **words("gamma.", 1)}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert loaded.parts == [Part("alpha.", True), Part("beta.", False), Part("gamma.", True)]
    assert equal(loaded.backbone, weights(1))
    assert equal(load_backbone(tmp_path / "c.pth", part="beta").backbone, weights(2))


def test_each_of_several_checkpoints_has_its_part(dino):
    recipe = load_recipe("small", ['backbone.part=["student", null]'])
    parts = [load_options(recipe, member, 2)["part"] for member in range(2)]
    assert parts == ["student", None]
    one = load_recipe("small", ["backbone.part=student"])
    assert [load_options(one, member, 2)["part"] for member in range(2)] == ["student", "student"]
    with pytest.raises(OdcftError, match=r"lists 2 parts, but there are 3 checkpoints. Give one for all"):
        load_options(recipe, 0, 3)


@pytest.mark.slow
def test_the_command_line_takes_a_part_for_each_checkpoint(tmp_path, make_images, dino, odcft_command):
    data, run = make_images(tmp_path / "data", count=24), tmp_path / "run"
    args = ("finetune", dino, dino, data, "--out", run, "--method", "codc", "--recipe", "small", "--epochs", 1)
    code, _, err = odcft_command(*args, "--set", "optim.batch_size=4", "--part", "student", "--part", "")
    assert code == 0, err
    assert "under student/module.backbone." in err
    assert "under teacher/backbone." in err
    assert load_recipe(run / "recipe.yaml").backbone.part == ["student", None]
    code, out, err = odcft_command("evaluate", run, data, "--protocol", "knn", "--json")
    assert code == 0, err
    assert json.loads(out)["before"]
    code, _, err = odcft_command(*args[:3], tmp_path, *args[3:], "--overwrite", "--part", "student", "--part", "x")
    assert code == 2
    assert "backbone.part lists 2 parts, but there are 3 checkpoints" in err
