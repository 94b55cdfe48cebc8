"""Whole runs, cut short, on a dozen images that the test makes."""

import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError
from odcft.first_memory import init_memory
from odcft.progress import Progress
from odcft.recipe import load_recipe
from odcft.run import snapshot_files
from odcft.run.non_finite import all_finite
from odcft.train import fine_tune

QUICK = ["optim.batch_size=4", "log.interval=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]


@pytest.fixture
def checkpoint(tmp_path, make_checkpoint):
    return str(make_checkpoint(tmp_path / "start.pth.tar"))


@pytest.fixture
def images(tmp_path, make_images):
    return str(make_images(tmp_path / "images"))


def quick(*overrides):
    return load_recipe("odc_small", [*QUICK, "optim.epochs=2", *overrides])


def backbone(run):
    return load_file(run / "backbone" / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_interface_says(tmp_path, checkpoint, images):
    summary = fine_tune(checkpoint, images, tmp_path / "run", quick("log.tensorboard=true"))
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
        "backbone",
        "clusters.parquet",
        "tensorboard",
    }
    assert load_recipe(run / "recipe.yaml").memory.clusters == summary["clusters"] == 2
    assert ": auto" not in (run / "recipe.yaml").read_text()
    written = lines(run)
    assert [line["step"] for line in written] == list(range(6))
    assert set(written[-1]) - {"warnings"} == {
        *("epoch", "step", "time", "loss", "loss_over_ln_k", "change_ratio", "lr", "images_per_second", "data_wait"),
        *("empty", "smallest", "largest", "nmi_previous", "largest_share", "entropy", "centroid_spread"),
    }
    assert written[-1]["epoch"] == 2

    import pyarrow.parquet as pq

    clusters = pq.read_table(run / "clusters.parquet").to_pydict()
    assert len(clusters["path"]) == 12
    assert set(clusters["cluster"]) <= {0, 1}


def test_training_changes_the_backbone_and_timm_loads_it(tmp_path, checkpoint, images):
    import timm

    fine_tune(checkpoint, images, tmp_path / "run", quick())
    after = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True, num_classes=0).state_dict()
    before = {n.removeprefix("module."): t for n, t in torch.load(checkpoint)["state_dict"].items()}
    weights = [name for name in after if name.endswith("conv1.weight")]
    assert weights
    assert not any(torch.equal(after[name], before[name]) for name in weights)
    seven = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True, num_classes=7)
    assert seven.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_same_seed_same_backbone_to_the_last_bit(tmp_path, checkpoint, images):
    for name in "ab":
        fine_tune(checkpoint, images, tmp_path / name, quick())
    first, second = backbone(tmp_path / "a"), backbone(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    fine_tune(checkpoint, images, tmp_path / "c", quick("seed=1"))
    assert not torch.equal(backbone(tmp_path / "c")["conv1.0.weight"], first["conv1.0.weight"])


def test_loader_processes_change_nothing(tmp_path, checkpoint, images):
    fine_tune(checkpoint, images, tmp_path / "none", quick("data.workers=0"))
    fine_tune(checkpoint, images, tmp_path / "two", quick("data.workers=2"))
    first, second = backbone(tmp_path / "none"), backbone(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_folder_gives_the_same_run_as_no_folder(tmp_path, checkpoint, images):
    made = init_memory(checkpoint, images, tmp_path / "memory", quick())
    assert made["images"] == 12
    tensors = load_file(tmp_path / "memory" / "memory.safetensors")
    assert tensors["features"].shape == (12, 8)
    assert tensors["labels"].shape == (12,)
    assert tensors["centroids"].shape == (2, 8)
    fine_tune(checkpoint, images, tmp_path / "with", quick(), memory=tmp_path / "memory")
    fine_tune(checkpoint, images, tmp_path / "without", quick())
    first, second = backbone(tmp_path / "with"), backbone(tmp_path / "without")
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-5) for name in first)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("neck.dim=16", "was made with neck.dim=8, but this run has neck.dim=16"),
        ("neck.hidden=32", "neck.hidden=16"),
        ("data.size=40", "data.size=32, but this run has data.size=40"),
        ("data.crop_fraction=0.5", "data.crop_fraction=1.0"),
        ("memory.start_layer=layer2", "memory.start_layer=last, but this run has memory.start_layer=layer2"),
        ("backbone.input=bgr", "backbone.input=None, but this run has backbone.input=bgr"),
        ("memory.clusters=3", "has 2 clusters, but 3 were requested"),
        ("memory.clusters=10000", "has 2 clusters, but 10,000 were requested"),
    ],
)
def test_memory_of_another_recipe_is_refused(memory_folder, tmp_path, field, message):
    checkpoint, images, memory = memory_folder
    with pytest.raises(OdcftError, match=message):
        fine_tune(checkpoint, images, tmp_path / "run", quick(field), memory=memory)
    assert not (tmp_path / "run").exists()


def test_memory_of_another_seed_is_refused_where_weights_are_random(tmp_path, images):
    init_memory("scratch:test_resnet", images, tmp_path / "memory", quick("seed=1"))
    with pytest.raises(OdcftError, match="was made with seed=1, but this run has seed=0"):
        fine_tune("scratch:test_resnet", images, tmp_path / "run", quick(), memory=tmp_path / "memory")


@pytest.fixture(scope="module")
def memory_folder(tmp_path_factory):
    """A checkpoint, a dozen images, and their memory; only read."""
    import timm

    folder, draw = tmp_path_factory.mktemp("memory"), np.random.default_rng(0)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "c.pth")
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(folder / "images" / f"{i:02d}.png")
    init_memory(str(folder / "c.pth"), str(folder / "images"), folder / "memory", quick())
    return str(folder / "c.pth"), str(folder / "images"), folder / "memory"


DAMAGE = {
    "labels beyond the clusters": lambda t: {**t, "labels": t["labels"] + 2},
    "negative labels": lambda t: {**t, "labels": t["labels"] - 1},
    "fewer labels": lambda t: {**t, "labels": t["labels"][:-1].clone()},
    "other width": lambda t: {**t, "centroids": t["centroids"][:, :-1].contiguous()},
    "nothing": lambda t: {},
    "not finite": lambda t: {**t, "features": t["features"] * float("nan")},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_memory_that_was_tampered_with_is_refused(memory_folder, tmp_path, damage):
    checkpoint, images, memory = memory_folder
    shutil.copytree(memory, tmp_path / "memory")
    path = tmp_path / "memory" / "memory.safetensors"
    save_file(DAMAGE[damage](load_file(path)), path)
    with pytest.raises(OdcftError, match="is not a complete folder of `odcft init-memory`"):
        fine_tune(checkpoint, images, tmp_path / "run", quick(), memory=tmp_path / "memory")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 1, "checkpoint": [], "recipe": "x"}', "null"])
def test_memory_without_its_description_is_refused(memory_folder, tmp_path, content):
    checkpoint, images, memory = memory_folder
    shutil.copytree(memory, tmp_path / "memory")
    (tmp_path / "memory" / "memory.json").write_text(content)
    with pytest.raises(OdcftError):
        fine_tune(checkpoint, images, tmp_path / "run", quick(), memory=tmp_path / "memory")


def test_memory_of_another_checkpoint_is_refused(tmp_path, checkpoint, images, make_checkpoint):
    init_memory(checkpoint, images, tmp_path / "memory", quick())
    other = make_checkpoint(tmp_path / "other.pth", seed=9)
    with pytest.raises(OdcftError, match="was made from another checkpoint"):
        fine_tune(str(other), images, tmp_path / "run", quick(), memory=tmp_path / "memory")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, checkpoint, images, optimizer):
    same = ("optim.schedule=step", "optim.final_epochs=0", f"optim.optimizer={optimizer}", "optim.lr=0.001")
    same += ("memory.start_epochs=1.5", "optim.freeze=1") if optimizer == "adamw" else ()
    fine_tune(checkpoint, images, tmp_path / "whole", quick(*same))
    one = quick(*same, "optim.epochs=1")
    fine_tune(checkpoint, images, tmp_path / "parts", one)
    fine_tune(checkpoint, images, tmp_path / "parts", one, resume=True, epochs=2)
    first, second = backbone(tmp_path / "whole"), backbone(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_recipe(tmp_path / "parts" / "recipe.yaml").optim.epochs == 2
    keep = ("step", "loss", "change_ratio", "lr", "smallest")
    assert [[a[k] for k in keep] for a in lines(tmp_path / "whole")] == [
        [a[k] for k in keep] for a in lines(tmp_path / "parts")
    ]


def test_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_state(tmp_path, checkpoint, images):
    with pytest.raises(OdcftError, match=r"loss is not finite at step \d+ \(learning rate 1e\+20\)"):
        fine_tune(
            checkpoint, images, tmp_path / "run", quick("optim.lr=1e20", "optim.schedule=step", "optim.final_epochs=0")
        )
    assert not (tmp_path / "run" / "backbone").exists()
    newest = snapshot_files.load(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    assert all_finite([*newest.same.values(), *newest.rows.values()])


@pytest.mark.parametrize("method", ["odc", "dc"])
def test_a_checkpoint_whose_features_overflow_is_refused_before_clustering(tmp_path, images, make_checkpoint, method):
    checkpoint = make_checkpoint(tmp_path / "huge.pth", wrap=None)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: tensor * 1e30 if tensor.dim() > 1 else tensor for name, tensor in state.items()}, checkpoint)
    recipe = quick(f"method={method}")
    with pytest.raises(OdcftError, match=r"huge\.pth gives features that are NaN or infinite for 12 of 12 images"):
        fine_tune(str(checkpoint), str(images), tmp_path / "run", recipe, progress=Progress())
    assert not (tmp_path / "run").exists()


def test_unreadable_image_is_named_and_skipped(tmp_path, checkpoint, images):
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"no image")
    summary = fine_tune(checkpoint, images, tmp_path / "run", quick())
    assert (summary["images"], summary["unreadable"]) == (12, 1)
    assert "a/broken.png" in (tmp_path / "run" / "quarantine.csv").read_text()


def test_image_that_vanishes_during_the_run_is_skipped(tmp_path, checkpoint, images, monkeypatch):
    from odcft.data import sources

    whole, calls = sources.read_file, []

    def read(path):
        calls.append(path)
        if len(calls) > 44 and path.endswith("000.png"):
            raise OSError("gone")
        return whole(path)

    monkeypatch.setattr(sources, "read_file", read)
    assert fine_tune(checkpoint, images, tmp_path / "run", quick())["steps"] == 6


FIELDS = {
    "seed": 5, "backbone.input": "bgr", "data.size": 40, "data.crop_fraction": 0.5,
    "data.mean": [0.1, 0.2, 0.3], "data.std": [1, 2, 3], "augment.crop_scale": [0.5, 0.6],
    "augment.crop_ratio": [1, 1.0001],
    "augment.vertical_flip": 1.0, "augment.quarter_turns": True, "augment.flip": 1.0, "augment.rotation": 45.0,
    "augment.brightness": 0.9, "augment.contrast": 0.9,
    "augment.saturation": 0.0, "augment.hue": 0.5, "augment.gray": 1.0, "neck.hidden": 32, "neck.dim": 4,
    "neck.relu": False,
    "neck.dropout": 0.5, "neck.bn_momentum": 0.9, "memory.clusters": 3, "memory.momentum": 0.9,
    "memory.centroid_interval": 1, "memory.min_cluster": 5, "memory.start_layer": "layer2", "memory.start_epochs": 1.0,
    "memory.instance_share": 0.5,
    "memory.variant": "official", "memory.reweight": False,
    "memory.dtype": "float16", "kmeans.iterations": 1, "optim.epochs": 3, "optim.batch_size": 6, "optim.lr": 0.01,
    "optim.schedule": "step", "optim.warmup_epochs": 1.0, "optim.momentum": 0.0, "optim.head_momentum": 0.0,
    "method": "dc", "optim.optimizer": "adamw", "optim.head_lr": 10.0, "optim.freeze": 2, "optim.weight_decay": 0.1,
    "optim.precision": "bfloat16",
}  # fmt: skip
# Speed and speech only: they must not change the backbone.
SPEECH = {
    "backbone.arch_args",  # of a network that is built by name: tests/backbone/test_checkpoint_metadata.py
    "optim.auto_steps",  # of epochs=auto: tests/test_plan.py
    "backbone.part",  # of a file with several backbones: tests/backbone/test_backbone_parts.py
    "data.workers",
    "data.decoder",  # the images of this test are PNG; of JPEGs: tests/data_tests/test_jpeg_crops.py
    "optim.checkpointing",  # of networks without batch norm: tests/backbone/test_network.py
    "memory.start_features",  # needs neck.relu=false: a test of its own below
    "optim.skip_padding",  # of smaller images, by rounding: tests/backbone/test_one_pixel_maps.py
    "optim.compile",  # tests/model/test_members.py
    "optim.accumulate",  # needs networks with batch norm, or more images: tests/model/test_backpropagation.py
    "optim.sync_bn",  # of several GPUs: tests/distributed/test_fake_gpu.py
    "data.bands",  # of other images: tests/backbone/test_band_widening.py
    "data.cache",  # images are the same: tests/data_tests/test_decoded_cache.py
    "data.max_broken",  # when to give up: tests/run/test_broken_images.py
    "backbone.allow_partial",
    "optim.channels_last",
    "optim.tf32",
    "log.interval",
    "log.tensorboard",
    "log.trackers",
    "log.sheet_minutes",
    "log.report",
    "log.snapshot_minutes",
    "log.snapshot_share",
    "optim.skip_non_finite",
    "kmeans.engine",
}
# Of one schedule, or of one method, and what it takes to see them.
STEP = {"optim.final_epochs": 1, "optim.final_factor": 0.5}
DC = {"dc.interval": 2, "dc.pca": 3, "dc.balance": "reweighting"}
CODC = {"codc.members": [{"cluster": 1, "rotation": 1}], "codc.alpha": 0.2}
DEEP = {"data.range"}  # of images with more than 8 bits a channel: test_intensity_range.py


def test_every_field_is_in_one_of_the_lists():
    from odcft.recipe import all_field_paths

    assert set(all_field_paths()) == set(FIELDS) | SPEECH | set(STEP) | set(DC) | set(CODC) | DEEP


@pytest.fixture(scope="module")
def final_state(tmp_path_factory):
    """A function: overrides in, every tensor of the run's last state out; each run is done once."""
    from functools import cache

    import timm

    folder = tmp_path_factory.mktemp("knobs")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "c.pth")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(40):
        pixels = draw.integers(0, 255, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(folder / "images" / f"{i:02d}.png")

    @cache
    def run(*overrides):
        base = [
            "memory.centroid_interval=2",
            "optim.lr=0.1",
            "memory.clusters=6",
            "memory.min_cluster=1",
            "optim.epochs=2",
        ]
        recipe = load_recipe("odc_small", [*QUICK, "optim.batch_size=8", *base, *overrides])
        fine_tune(str(folder / "c.pth"), str(folder / "images"), folder / str(hash(overrides)), recipe)
        newest = sorted((folder / str(hash(overrides)) / "checkpoints").iterdir())[-1]
        state = snapshot_files.load(newest)
        return {**state.same, **state.rows}

    return run


@pytest.mark.parametrize("field", [*FIELDS, *STEP, *DC, *CODC])
def test_every_knob_turns_something(final_state, field):
    base = ("optim.schedule=step",) if field in STEP else ("method=dc",) if field in DC else ()
    if field in CODC:
        base = ("method=codc", "codc.members=[{mixup: 1}]")
    if field == "kmeans.iterations":  # few clusters of few images are done after one
        base = ("memory.clusters=10", "memory.min_cluster=0")
    before, after = (
        final_state(*base),
        final_state(*base, f"{field}={json.dumps({**FIELDS, **STEP, **DC, **CODC}[field])}"),
    )
    assert set(before) != set(after) or any(
        before[name].shape != after[name].shape or not torch.equal(before[name].float(), after[name].float())
        for name in before
    ), f"{field} changes nothing"


def test_alexnet_from_scratch_is_the_papers_and_its_backbone_loads_as_the_run_says(tmp_path, make_images):
    overrides = ["optim.epochs=1", "optim.final_epochs=0", "data.size=64", "memory.clusters=2", *QUICK]
    recipe = load_recipe("odc_alexnet", overrides)
    summary = fine_tune("scratch:alexnet", str(make_images(tmp_path / "images")), tmp_path / "run", recipe)
    assert {"conv1.weight", "bn5.running_var"} <= set(backbone(tmp_path / "run"))
    assert backbone(tmp_path / "run")["conv1.weight"].shape[:2] == (96, 3)
    loaded = {}
    exec(summary["load"], loaded)
    assert loaded["net"].input.color == "rgb"
    assert torch.equal(loaded["net"].net.state_dict()["conv1.weight"], backbone(tmp_path / "run")["conv1.weight"])


def test_the_last_epochs_are_a_sixth_or_as_many_as_leave_some_at_the_full_rate(tmp_path, checkpoint, images):
    step = ("optim.schedule=step", "optim.epochs=3")
    fine_tune(checkpoint, images, tmp_path / "run", quick(*step, "optim.final_epochs=auto"))
    rates = [0.03] * 8 + [0.003]  # 3 steps an epoch
    assert [line["lr"] for line in lines(tmp_path / "run")] == pytest.approx(rates)
    fine_tune(checkpoint, images, tmp_path / "run", quick(*step), resume=True, epochs=6)
    rates += [0.003] * 9  # the rate has dropped, and does not rise again
    assert [line["lr"] for line in lines(tmp_path / "run")] == pytest.approx(rates)
    with pytest.raises(OdcftError, match=r"optim\.final_epochs=3 of 3 epochs leaves none at the full learning rate"):
        fine_tune(checkpoint, images, tmp_path / "none", quick(*step, "optim.final_epochs=3"))
    assert not (tmp_path / "none").exists()


def test_images_keep_the_labels_of_a_layer_in_the_first_epochs_and_frozen_stages_their_weights(
    tmp_path, checkpoint, images
):
    start = quick("memory.start_layer=layer2", "memory.start_epochs=1", "optim.freeze=2", "memory.min_cluster=1")
    said, progress = [], Progress(quiet=True)
    progress.say = said.append
    fine_tune(checkpoint, images, tmp_path / "run", start, progress=progress)
    note = "The first labels are clusters of layer2. For 1 of 2 epochs images keep them."
    assert any(note in line for line in said)
    assert [line["change_ratio"] for line in lines(tmp_path / "run")[:3]] == [0, 0, 0]
    before = {n.removeprefix("module."): t for n, t in torch.load(checkpoint)["state_dict"].items()}
    after = backbone(tmp_path / "run")
    same = {name for name, tensor in after.items() if name in before and torch.equal(tensor, before[name])}
    assert {name for name in after if name.startswith(("conv1", "bn1", "layer1"))} <= same
    assert not any(name.startswith("layer2") and name.endswith("conv1.weight") for name in same)
    fine_tune("scratch:test_resnet", images, tmp_path / "random", quick("optim.freeze=2"), progress=progress)
    assert "stages have random weights, and will keep them. Pass --set optim.freeze=0." in "".join(said)
    with pytest.raises(OdcftError, match=r"optim\.freeze=5 leaves nothing of test_resnet to learn"):
        fine_tune(checkpoint, images, tmp_path / "all", quick("optim.freeze=5"))
    assert not (tmp_path / "all").exists()


def test_the_memory_starts_with_features_of_a_layer_which_the_network_learns_first(tmp_path, checkpoint, images):
    layer = ["memory.start_layer=layer2", "memory.start_features=layer", "neck.relu=false", "memory.min_cluster=1"]
    start = quick(*layer, "optim.epochs=4", "log.snapshot_share=1")
    said, progress = [], Progress(quiet=True)
    progress.say = said.append
    init_memory(checkpoint, images, tmp_path / "m", start)
    fine_tune(checkpoint, images, tmp_path / "run", start, memory=tmp_path / "m", progress=progress)
    note = "starts with features of layer2. For 2 of 4 epochs the network learns to find each image's own among them."
    assert any(note in line for line in said)
    assert [line["change_ratio"] for line in lines(tmp_path / "run")[:6]] == [0] * 6
    fine_tune(checkpoint, images, tmp_path / "same", start)  # the memory is made the same way inside a run
    assert all(torch.equal(t, backbone(tmp_path / "same")[n]) for n, t in backbone(tmp_path / "run").items())
    with pytest.raises(OdcftError, match=r"was made with memory\.start_features=layer, but this run has .*=neck"):
        fine_tune(
            checkpoint, images, tmp_path / "no", quick(*layer, "memory.start_features=neck"), memory=tmp_path / "m"
        )
    with pytest.raises(OdcftError, match=r"cannot reach with a ReLU at its end\. Pass --set neck\.relu=false"):
        fine_tune(checkpoint, images, tmp_path / "no", quick("memory.start_layer=auto", "memory.start_features=layer"))
    assert not (tmp_path / "no").exists()


def test_a_transformer_learns_the_features_of_one_of_its_blocks_first(tmp_path, images):
    settings = ["optim.batch_size=4", "optim.epochs=2", "memory.start_layer=blocks.2", "log.tensorboard=false"]
    said, progress = [], Progress(quiet=True)
    progress.say = said.append
    recipe = load_recipe("small_vit", settings)
    fine_tune("scratch:test_vit", images, tmp_path / "run", recipe, progress=progress)
    assert any("The memory starts with features of blocks.2." in line for line in said)
    written = lines(tmp_path / "run")
    assert [line["change_ratio"] for line in written[: len(written) // 2]] == [0] * (len(written) // 2)
    before, after = load_backbone("scratch:test_vit").backbone.net.state_dict(), backbone(tmp_path / "run")
    assert not torch.equal(before["blocks.0.mlp.fc1.weight"], after["blocks.0.mlp.fc1.weight"])  # nothing is frozen


def test_dc_may_start_with_labels_of_a_layer_too_and_codc_may_not(tmp_path, checkpoint, images):
    layer = ["memory.start_layer=layer2", "optim.epochs=4"]
    fine_tune(checkpoint, images, tmp_path / "dc", quick(*layer, "method=dc"))
    assert [line["epoch"] for line in lines(tmp_path / "dc") if "nmi_previous" in line] == [3, 4]  # else 2, 3, 4
    said, progress = [], Progress(quiet=True)
    progress.say = said.append
    only_odc = ["memory.start_features=layer", "memory.instance_share=0.5"]
    fine_tune(checkpoint, images, tmp_path / "same", quick(*layer, "method=dc", *only_odc), progress=progress)
    assert any("memory.instance_share are for --method odc, and not used here" in line for line in said)
    assert all(torch.equal(t, backbone(tmp_path / "same")[n]) for n, t in backbone(tmp_path / "dc").items())
    with pytest.raises(OdcftError, match=r"memory\.start_layer='layer2' is for --method odc or dc"):
        fine_tune([checkpoint] * 2, images, tmp_path / "codc", quick(*layer, "method=codc"))


def test_images_too_small_for_a_network_are_refused_with_a_size_that_works(tmp_path, images):
    with pytest.raises(OdcftError, match=r"alexnet_deepcluster cannot process images of 32 pixels.*data\.size=224"):
        fine_tune("scratch:alexnet", images, tmp_path / "run", quick())
    assert not (tmp_path / "run").exists()
    assert load_backbone("scratch:alexnet").backbone.accepts_size(224)


def test_a_run_says_who_made_it_where_and_when(tmp_path, checkpoint, images):
    fine_tune(checkpoint, images, tmp_path / "run", quick())
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"odcft", "id", "host", "started", "ended", "finished"} <= set(about)
    assert about["checkpoint_path"] == checkpoint
    assert datetime.fromisoformat(about["started"]) <= datetime.fromisoformat(about["ended"])
    times = [datetime.fromisoformat(line["time"]) for line in lines(tmp_path / "run")]
    assert times == sorted(times)
    init_memory(checkpoint, images, tmp_path / "memory", quick())
    assert {"odcft", "id", "host", "started"} <= set(json.loads((tmp_path / "memory" / "memory.json").read_text()))


def test_init_memory_announces_no_epochs(tmp_path, checkpoint, images):
    said = []
    progress = Progress(quiet=True)
    progress.say = said.append
    init_memory(checkpoint, images, tmp_path / "memory", quick(), progress=progress)
    assert not any("epoch" in line for line in said)
    fine_tune(checkpoint, images, tmp_path / "run", quick("optim.epochs=1"), progress=progress)
    assert any("· 1 epoch ·" in line for line in said)


def test_clusters_without_images_are_noted(tmp_path, checkpoint, images):
    said = []
    progress = Progress(quiet=True)
    progress.say = said.append
    copies = tmp_path / "copies"
    copies.mkdir()
    for i in range(8):
        shutil.copy(tmp_path / "images" / "a" / f"{i % 2 * 2:03d}.png", copies / f"{i}.png")
    recipe = quick("memory.clusters=3", "memory.min_cluster=0")
    init_memory(checkpoint, str(copies), tmp_path / "memory", recipe, progress=progress)
    assert any("Only 2 of 3 clusters have images" in line and "copies --duplicates`" in line for line in said)
    said.clear()
    init_memory(checkpoint, images, tmp_path / "other", recipe, progress=progress)
    assert said
    assert not any("clusters have images" in line for line in said)
