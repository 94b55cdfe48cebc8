"""Collaborative ODC: members share one clustering, and one member alone is ODC."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from odcft.backbone.load import load_backbone
from odcft.backbone.network import Backbone
from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.model.losses import losses
from odcft.model.members import joint_features, make_members, make_necks, on_all_ranks
from odcft.model.neck_and_head import Output
from odcft.model.views import Views, with_copies
from odcft.plan import CODCPlan, fill_autos
from odcft.recipe import MemberRecipe, load_recipe
from odcft.train import fine_tune

QUICK = ["optim.batch_size=4", "log.interval=1", "log.tensorboard=false", "neck.hidden=16", "neck.dim=8"]
ALL_KINDS = "codc.members=[{cluster: 1}, {cluster: 1, rotation: 0.5}, {cluster: 0, mixup: 1}]"


@pytest.fixture
def checkpoints(tmp_path, make_checkpoint):
    archs = ("test_resnet", "test_resnet", "test_efficientnet")
    return [str(make_checkpoint(tmp_path / f"{i}.pth", arch, seed=i)) for i, arch in enumerate(archs)]


@pytest.fixture
def images(tmp_path, make_images):
    return str(make_images(tmp_path / "images"))


def quick(*overrides):
    return load_recipe("odc_small", ["method=codc", *QUICK, "optim.epochs=2", *overrides])


def state(run):
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "same.safetensors")


def test_one_member_is_odc_bit_for_bit(tmp_path, checkpoints, images):
    runs = []
    for method in ("odc", "codc"):
        fine_tune(checkpoints[:1], images, tmp_path / method, quick(f"method={method}", "neck.dropout=0.5"))
        runs.append(state(tmp_path / method))
    assert set(runs[0]) == set(runs[1])
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("sync_bn", ["on", "off"])
def test_batch_norm_of_backbones_is_synchronised_on_gpus_that_of_necks_never(monkeypatch, sync_bn):
    class Wrapped(Exception):
        """The throwaway pass after it needs the GPU."""

    def wrap(model, device_ids):
        raise Wrapped

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", wrap)
    plan = fill_autos(load_recipe("odc_small", [f"optim.sync_bn={sync_bn}", *QUICK]), members=2)
    backbones = [load_backbone("scratch:test_resnet").backbone for _ in range(2)]
    necks, dim = make_necks(backbones, plan)
    network = make_members(backbones, necks, dim, plan)
    names, layers = list(network.state_dict()), sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    with pytest.raises(Wrapped):
        on_all_ranks(network, torch.device("cuda", 0))
    synchronised = [name for name, m in network.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(synchronised) == (layers if sync_bn == "on" else 0)
    assert layers > 0
    assert not any("neck" in name for name in synchronised)
    assert sum(type(m) is torch.nn.BatchNorm1d for m in network.modules()) == 2  # the necks'
    assert list(network.state_dict()) == names


def test_three_kinds_of_members_train_together_and_each_is_exported(tmp_path, checkpoints, images):
    import timm

    summary = fine_tune(checkpoints, images, tmp_path / "run", quick(ALL_KINDS))
    assert len(summary["backbones"]) == 3
    for folder, checkpoint in zip(summary["backbones"], checkpoints, strict=True):
        after = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).state_dict()
        before = {n.removeprefix("module."): t for n, t in torch.load(checkpoint)["state_dict"].items()}
        assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("conv.weight"))
    tensors = state(tmp_path / "run")
    assert tensors["method.centroids"].shape == (2, 24)  # three of 8 numbers, side by side
    assert any("turn_head" in name for name in tensors)
    assert ": auto" not in (tmp_path / "run" / "recipe.yaml").read_text()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)  # that of the clustering alone: chance, at the start


def test_resumed_run_equals_uninterrupted_run(tmp_path, checkpoints, images):
    same = ("optim.schedule=step", "optim.final_epochs=0", ALL_KINDS)
    fine_tune(checkpoints, images, tmp_path / "whole", quick(*same))
    fine_tune(checkpoints, images, tmp_path / "parts", quick(*same), epochs=1)
    fine_tune(checkpoints, images, tmp_path / "parts", quick(*same), resume=True, epochs=2)
    first, second = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(OdcftError, match="was started from"):
        fine_tune(checkpoints[::-1], images, tmp_path / "parts", quick(*same), resume=True, epochs=3)


def test_members_have_the_same_say_in_the_joint_memory():
    small, large = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 500.0]])
    assert joint_features([small, large]).tolist() == [[pytest.approx(0.6), pytest.approx(0.8), 0, 1]]
    assert joint_features([small]) is small


def test_copies_are_made_only_for_members_that_want_them():
    images = torch.rand(6, 3, 8, 8)
    plain = with_copies(images, CODCPlan(members=[MemberRecipe()]), torch.Generator().manual_seed(0))
    assert plain.rotated is None
    assert plain.mixed is None
    made = with_copies(
        images, CODCPlan(members=[MemberRecipe(rotation=1), MemberRecipe(mixup=1)]), torch.Generator().manual_seed(0)
    )
    for image, turn, copy in zip(images, made.quarters_B, made.rotated, strict=True):
        assert torch.equal(copy, torch.rot90(image, int(turn), (1, 2)))
    assert torch.allclose(made.mixed, made.share * images + (1 - made.share) * images[made.partner_B])
    again = with_copies(
        images, CODCPlan(members=[MemberRecipe(rotation=1), MemberRecipe(mixup=1)]), torch.Generator().manual_seed(0)
    )
    assert torch.equal(again.mixed, made.mixed)


def test_every_loss_counts_with_its_weight():
    draw = torch.Generator().manual_seed(0)
    logits_BK, turn_B4, mixed_BK = (torch.randn(5, k, generator=draw) for k in (3, 4, 3))
    label_B, turn_B, partner_B = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([3, 2, 1, 0, 0]), torch.arange(4, -1, -1)
    weight_K = torch.tensor([1.0, 2.0, 3.0])
    member = MemberRecipe(cluster=2, rotation=3, mixup=5)
    output = Output(torch.zeros(5, 2), logits_BK, turn_B4, mixed_BK)
    made = Views(torch.zeros(5), quarters_B=turn_B, partner_B=partner_B, share=0.25)
    total, shown = losses([output], CODCPlan(members=[member]), label_B, weight_K, made)
    cluster = F.cross_entropy(logits_BK, label_B, weight_K)
    mixup = 0.25 * F.cross_entropy(mixed_BK, label_B, weight_K) + 0.75 * F.cross_entropy(
        mixed_BK, label_B[partner_B], weight_K
    )
    assert torch.allclose(total, 2 * cluster + 3 * F.cross_entropy(turn_B4, turn_B) + 5 * mixup)
    assert torch.equal(shown, cluster)


def test_evaluation_shows_each_member_and_all_together(odcft_command, tmp_path, checkpoints, images):
    fine_tune(checkpoints[:2], images, tmp_path / "run", quick("optim.epochs=1"))
    code, out, _ = odcft_command("evaluate", tmp_path / "run", images, "--protocol", "knn", "--json")
    assert code == 0
    results = json.loads(out)
    assert [member["source"] for member in results["members"]] == [
        str(tmp_path / "run" / "backbone"),
        str(tmp_path / "run" / "backbone_2"),
    ]
    assert {"knn", "before", "change"} <= set(results)
    assert all({"knn", "before", "change"} <= set(member) for member in results["members"])
    code, _, err = odcft_command("evaluate", tmp_path / "run", images, "--protocol", "knn")
    assert "All 2 members side by side" in err
    assert "backbone_2 alone" in err


@pytest.mark.parametrize(
    ("method", "count", "override", "message"),
    [
        ("odc", 2, "seed=0", "odc takes one checkpoint and then the images; 2 checkpoints were given"),
        ("dc", 2, "seed=0", "Several are for --method codc"),
        ("codc", 1, ALL_KINDS, "lists 3 members under codc.members, and 1 checkpoint was given"),
        ("codc", 2, ALL_KINDS, "lists 3 members under codc.members, and 2 checkpoints were given"),
    ],
)
def test_members_and_checkpoints_must_go_together(
    odcft_command, tmp_path, checkpoints, images, method, count, override, message
):
    flags = ["--recipe", "small", "--method", method, "--set", override, "--out", tmp_path / "run"]
    code, _, err = odcft_command("finetune", *checkpoints[:count], images, *flags)
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_member_that_learns_nothing_from_the_clusters_is_refused():
    with pytest.raises(OdcftError, match="a member needs a weight for cluster or mixup"):
        quick("codc.members=[{cluster: 0, rotation: 1}]")


@pytest.mark.slow
def test_compiled_backbones_train_alike_under_the_same_names(tmp_path, checkpoints, images):
    states = {}
    for compiled in (False, True):
        fine_tune(checkpoints[:1], images, tmp_path / f"{compiled}", quick(f"optim.compile={compiled}", "method=odc"))
        states[compiled] = state(tmp_path / f"{compiled}")
    plain, compiled = states[False], states[True]
    assert set(plain) == set(compiled)
    assert all(torch.allclose(plain[name].float(), compiled[name].float(), atol=1e-3) for name in plain)
    assert any(not torch.equal(plain[name], compiled[name]) for name in plain)


def test_failing_to_compile_is_a_sentence(tmp_path, checkpoints, images, monkeypatch, capfd):
    from torch._dynamo.exc import BackendCompilerFailed

    def fail(*args, **options):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(Backbone, "compile", fail)
    with pytest.raises(OdcftError, match=r"torch\.compile failed \(.*Start again without optim\.compile"):
        fine_tune(checkpoints[:1], images, tmp_path / "run", quick("optim.compile=true", "method=odc"))
    assert "Compiling   the network" in capfd.readouterr().err
