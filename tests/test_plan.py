"""The plan decides every `auto` of a recipe once, and refuses what cannot work."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from odcft import plan as plan_module
from odcft.backbone.activation_memory import bytes_per_image
from odcft.backbone.load import load_backbone
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.plan import automatic_size, decide_clusters, fill_autos, make_plan, with_clusters_for
from odcft.recipe import Recipe, dump, flatten, load_recipe, shipped


@pytest.mark.parametrize("recipe", [name for name in shipped() if name not in ("demo", "pretext")])
@pytest.mark.parametrize(
    ("count", "clusters"), [(1_281_167, 10_000), (10_000_000, 10_000), (20_000, 156), (400, 3), (100, 2), (43, 2)]
)
def test_automatic_clusters_are_the_papers_on_imagenet_and_work_for_any_set(recipe, count, clusters):
    assert decide_clusters(load_recipe(recipe), count)[0] == clusters


def test_too_many_clusters_are_refused_with_a_number_that_works():
    recipe = load_recipe("odc_r50_finetune", ["memory.clusters=10000"])
    with pytest.raises(
        OdcftError, match=r"10,000 clusters for 1,300 images cannot work.*would use 10; 61 is the maximum"
    ):
        decide_clusters(recipe, 1300)
    recipe.memory.clusters = 61
    assert decide_clusters(recipe, 1300)[0] == 61


def test_a_threshold_raised_above_images_per_cluster_is_allowed_with_a_note():
    """As in fig. 4 of the paper; at the usual threshold, so many clusters are a mistake."""
    recipe = load_recipe("odc_r50_scratch", ["memory.clusters=3000", "memory.min_cluster=160"])
    clusters, min_cluster, (note,) = decide_clusters(recipe, 90_000)
    assert (clusters, min_cluster) == (3000, 160)
    assert "leave 30 for each of 3,000 clusters, no more than memory.min_cluster=160" in note
    assert "at most 559 clusters can be larger" in note
    recipe.memory.min_cluster = 20
    assert decide_clusters(recipe, 90_000)[2] != []  # 30 each: many will be refilled
    with pytest.raises(OdcftError, match="each needs more than 20 images"):
        decide_clusters(recipe, 50_000)
    recipe.memory.min_cluster = 160
    with pytest.raises(OdcftError, match="3,000 clusters for 2,000 images cannot work: each needs more than 160"):
        decide_clusters(recipe, 2_000)


def test_tiny_sets_lower_the_threshold():
    clusters, min_cluster, notes = decide_clusters(load_recipe("small"), 12)
    assert (clusters, min_cluster) == (2, 2)
    assert notes == ["12 images cannot make two clusters of more than 20: memory.min_cluster lowered to 2."]


def test_settings_of_odc_alone_are_said_to_be_unused():
    resnet, vit = (load_backbone(f"scratch:{name}").backbone for name in ("test_resnet", "test_vit"))
    plan = fill_autos(load_recipe("small", ["method=dc"]))
    assert plan_module._check_first_labels(plan, [resnet])[0].endswith("--recipe dc_small is made for --method dc.")
    assert plan_module._check_first_labels(plan, [vit])[0].endswith("for --method odc, and not used here.")


def test_dc_notes_when_clusters_would_have_few_images():
    (note,) = decide_clusters(load_recipe("dc_r50_finetune", ["memory.clusters=10000"]), 20_000)[2]
    assert "leave only 2 for each of 10,000 clusters, too few to learn well: --clusters auto would use 156" in note
    assert decide_clusters(load_recipe("dc_r50_finetune"), 1_281_167)[2] == []
    assert decide_clusters(load_recipe("dc_small"), 20_000)[2] == []


def test_odc_notes_when_clusters_would_be_refilled_all_the_time():
    (note,) = decide_clusters(load_recipe("small", ["memory.clusters=60"]), 2_000)[2]
    assert "2,000 images leave only 33 for each of 60 clusters, little more than memory.min_cluster=20" in note


def test_a_plan_has_nothing_left_to_decide_and_is_what_recipe_yaml_says(make_images, tmp_path):
    backbone, images = load_backbone("scratch:test_resnet").backbone, find_images(make_images(tmp_path))
    recipe = load_recipe("odc_r50_finetune", ["data.size=auto", "optim.batch_size=4"])
    plan, _ = make_plan(recipe, [backbone], images)
    assert "auto" not in flatten(yaml.safe_load(dump(plan))).values()
    assert Recipe.model_validate(yaml.safe_load(dump(plan))).model_dump() == plan.model_dump()
    assert (plan.data.size, plan.memory.clusters, plan.optim.final_epochs) == (32, 2, 20)
    assert recipe.data.size == "auto"  # the given recipe is not changed


@pytest.mark.parametrize(
    ("recipe", "count", "epochs"),
    [
        ("small", 20_000, 28),
        ("small", 5_000, 113),
        ("small", 1_000, 300),  # the most
        ("small", 1_000_000, 10),  # the least
        ("small", 7, 300),
        ("fast", 20_000, 10),
        ("fast", 5_000, 41),
        ("fast", 1_000, 229),
    ],
)
def test_fewer_images_are_seen_more_often(recipe, count, epochs):
    assert plan_module.automatic_epochs(load_recipe(recipe).optim, count) == epochs


def test_epochs_are_decided_with_what_depends_on_them_unless_the_recipe_says_how_many(make_images, tmp_path):
    backbone, images = load_backbone("scratch:test_resnet").backbone, find_images(make_images(tmp_path, 40))
    automatic = ["optim.epochs=auto", "optim.auto_steps=120", "optim.batch_size=8", "memory.start_layer=layer2"]
    for given, epochs in ([], 24), (["optim.epochs=12"], 12):
        plan, _ = make_plan(load_recipe("odc_small", [*automatic, *given]), [backbone], images)
        assert (plan.optim.epochs, plan.memory.start_epochs, plan.optim.final_epochs) == (
            epochs,
            epochs / 2,
            epochs / 6,
        )


def test_what_the_recipe_says_is_not_decided_again(make_images, tmp_path):
    backbone, images = load_backbone("scratch:test_resnet").backbone, find_images(make_images(tmp_path))
    asked = ["data.size=64", "data.range=[0,9]", "data.workers=1", "memory.clusters=3", "memory.dtype=float16"]
    asked += ["memory.start_epochs=0"]
    asked += [
        "data.decoder=pil",
        "kmeans.engine=faiss",
        "optim.sync_bn=on",
        "optim.final_epochs=1",
        "optim.precision=bfloat16",
        "optim.batch_size=4",
    ]
    recipe = load_recipe("odc_small", [*asked, "memory.min_cluster=2"])
    plan, notes = make_plan(recipe, [backbone], images)
    then, now = flatten(recipe.model_dump()), flatten(plan.model_dump())
    assert {name for name in now if now[name] != then[name]} == {"codc.members", "data.bands"}
    assert len(notes) == 1  # three clusters of twelve images are close to the threshold


def test_without_simplejpeg_pillow_decodes_and_a_note_says_so(make_images, tmp_path, monkeypatch):
    backbone, images = load_backbone("scratch:test_resnet").backbone, find_images(make_images(tmp_path))
    for installed, decoder in ((True, "turbo"), (False, "pil")):
        monkeypatch.setattr(plan_module.jpeg_crops, "is_available", lambda installed=installed: installed)
        plan, notes = make_plan(load_recipe("small", ["optim.batch_size=4"]), [backbone], images)
        assert plan.data.decoder == decoder
        assert any("simplejpeg is not installed" in note for note in notes) != installed
    with pytest.raises(OdcftError, match=r"data\.decoder=turbo needs simplejpeg"):
        make_plan(load_recipe("small", ["optim.batch_size=4", "data.decoder=turbo"]), [backbone], images)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_batch_norm_is_synchronised_on_gpus_and_a_note_says_that_cpus_cannot(
    make_images, tmp_path, monkeypatch, asked, gpu, ranks
):
    monkeypatch.setattr(plan_module.dist, "world_size", lambda: ranks)
    monkeypatch.setattr(plan_module.dist, "this_device", lambda: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(plan_module.dist, "gather_dict", lambda mine: mine)
    monkeypatch.setattr(plan_module, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(plan_module, "has_fast_float16", lambda device: False)
    backbone, images = load_backbone("scratch:test_resnet").backbone, find_images(make_images(tmp_path))
    recipe = load_recipe("small", [f"optim.sync_bn={asked}", "optim.batch_size=4", "memory.min_cluster=2"])
    plan, notes = make_plan(recipe, [backbone], images)
    assert plan.optim.sync_bn == ({True: "on", False: "off"}[gpu] if asked == "auto" else asked)
    said = [note for note in notes if "each process normalises over its own images" in note]
    assert len(said) == (asked == "on" and not gpu and ranks > 1)


@pytest.mark.parametrize(("free", "parts"), [(None, 1), (40e9, 1), (24e9, 2), (12e9, 3), (1e9, 86), (1e8, 128)])
def test_a_batch_is_divided_into_as_few_parts_as_fit(monkeypatch, free, parts):
    """A ResNet-50 with 256 images of 224 pixels: about 86 MB of each in float32."""
    monkeypatch.setattr(plan_module.accelerator, "free_memory", lambda: free)
    monkeypatch.setattr(plan_module, "bytes_per_image", lambda *args: 86_000_000)
    recipe = load_recipe("odc_r50_finetune", ["optim.accumulate=auto", "optim.batch_size=256"])
    backbone = load_backbone("scratch:test_resnet").backbone
    plan, notes = plan_module.decide_parts(fill_autos(recipe), recipe, [backbone], 10_000)
    assert plan.optim.accumulate == parts
    assert any(f"optim.accumulate={parts}" in note for note in notes) == (parts > 1)


def test_more_parts_than_pairs_of_images_are_refused(make_images, tmp_path):
    backbone, images = load_backbone("scratch:test_resnet").backbone, find_images(make_images(tmp_path))
    plan, _ = make_plan(load_recipe("small", ["optim.batch_size=8", "optim.accumulate=4"]), [backbone], images)
    assert plan.optim.accumulate == 4
    with pytest.raises(OdcftError, match=r"a process has 8 images of a batch. Choose at most 4"):
        make_plan(load_recipe("small", ["optim.batch_size=8", "optim.accumulate=5"]), [backbone], images)


def test_what_a_pass_keeps_of_an_image_is_known_without_computing():
    """As measured on real tensors."""
    backbone, kept = load_backbone("scratch:test_resnet").backbone.train(), {}
    buffers = {name: tensor.clone() for name, tensor in backbone.named_buffers()}
    found = [bytes_per_image(backbone, 64, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in backbone.named_buffers())

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(torch.rand(8, 3, 64, 64))
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    measured = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    assert found[0] == pytest.approx(measured / 8, rel=0.02)
    assert found[1] == found[2] < 0.6 * found[0]


def test_clusters_follow_the_images_that_can_be_read():
    recipe = load_recipe("small")
    plan, notes = with_clusters_for(fill_autos(recipe, clusters=200), recipe, 1280)
    assert (plan.memory.clusters, notes) == (10, [])


def test_members_share_an_image_size_that_all_accept(make_images, tmp_path):
    backbones = [load_backbone(f"scratch:{name}").backbone for name in ("test_vit", "test_resnet")]
    images = find_images(make_images(tmp_path, side=200))
    recipe = load_recipe("small", ["data.size=auto", "optim.batch_size=4"])
    assert make_plan(recipe, backbones, images)[0].data.size == backbones[0].size
    asked = load_recipe("small", ["data.size=40", "optim.batch_size=4"])
    with pytest.raises(OdcftError, match="a multiple of 16 pixels, not 40: try 32 or 48"):
        make_plan(asked, backbones, images)


def network(size, step=0, only=False):
    """What the plan asks of a network: step 0 for one that takes any size, `only` where timm cannot resample it."""
    return SimpleNamespace(
        size=size,
        fixed_size=step > 0,
        size_step=step,
        input=SimpleNamespace(bands=3, color="rgb", measured=True),
        why_not=lambda s: "no" if s != size and (only or (step and s % step)) else "",
    )


@pytest.mark.parametrize(
    ("backbone", "side", "size"),
    [
        (network(224), 40, 40),
        (network(224), 20, 32),
        (network(224), 500, 224),
        (network(288), 0, 288),
        (network(518, 14), 500, 224),
        (network(518, 14), 32, 42),
        (network(518, 14), 0, 224),
        (network(518, 14), 100, 112),
        (network(224, 16), 500, 224),
        (network(224, 16), 33, 48),
        (network(384, 32), 32, 32),
        (network(160, 16), 500, 160),
        (network(224, 32, only=True), 40, 224),
        (network(384, 32, only=True), 500, 384),
    ],
)
def test_input_size_follows_small_images_up_to_the_networks_own(backbone, side, size):
    assert automatic_size(backbone, side) == size


def test_a_transformer_of_another_size_is_announced(make_images, tmp_path):
    backbone, images = load_backbone("scratch:test_vit").backbone, find_images(make_images(tmp_path))
    plan, notes = make_plan(load_recipe("odc_vit", ["optim.batch_size=4"]), [backbone], images)
    assert plan.data.size == 32
    assert "test_vit was made for images of 160 pixels: it is built for 32" in notes[0] + notes[1]


def test_members_with_different_patches_meet_at_a_size_that_both_take(make_images, tmp_path):
    images = find_images(make_images(tmp_path))
    recipe = load_recipe("odc_vit", ["optim.batch_size=4"])
    assert _decided_for(recipe, [network(518, 14), network(224, 16)], images) == 112
    assert _decided_for(recipe, [network(518, 14), network(224, 16, only=True)], images) == 224
    assert _decided_for(recipe, [network(518, 14), network(288)], images) == 42


def _decided_for(recipe, backbones, images):
    for number, backbone in enumerate(backbones):
        backbone.arch = f"network {number}"
    return make_plan(recipe, backbones, images)[0].data.size
