"""Device discipline without a device: a step on fake tensors of a fake GPU, where mixing devices is an error."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from odcft.clustering import deepcluster, odc, small_clusters
from odcft.clustering.clusters import Clusters
from odcft.clustering.memory import VARIANTS, Memory
from odcft.clustering.nearest import NearestByScores
from odcft.data.augmentation import augment_batch, rotate_quarters
from odcft.distributed.delayed_reader import DelayedReader
from odcft.model.losses import instance_loss, losses
from odcft.model.members import joint_features
from odcft.model.neck_and_head import Output
from odcft.model.views import Views
from odcft.plan import CODCPlan, fill_autos
from odcft.recipe import AugmentRecipe, MemberRecipe, MemoryRecipe, Recipe

CUDA = torch.device("cuda", 0)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a number, shapes that depend on values, copies back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.is_cuda for tensor in tensors)
        if on_device:
            assert name not in WAITING, f"{name} waits for the device"
            if name in ("index", "index_put", "index_put_"):
                assert not any(a.dtype == torch.bool for a in args[1] if a is not None), f"{name} by a mask waits"
        result = func(*args, **(kwargs or {}))
        assert not (on_device and isinstance(result, torch.Tensor) and not result.is_cuda), f"{name} copies back"
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(DelayedReader, "_exchange", lambda self, value: None)  # pins host memory
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake_state(variant, dtype, method="odc", S=200, K=20, D=16):
    memory = Memory(
        torch.empty(S, D, dtype=dtype, device=CUDA),
        torch.empty(S, dtype=torch.int32, device=CUDA),
        torch.empty(K, D, dtype=torch.int64, device=CUDA),
        torch.empty(K, dtype=torch.int64, device=CUDA),
        torch.empty(K, dtype=torch.int64, device=CUDA),
        torch.empty(K, D, device=CUDA),
        torch.empty(K, device=CUDA),
    )
    return Clusters(memory, fill_autos(Recipe(method=method, memory=MemoryRecipe(clusters=K, variant=variant))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_memory_step_stays_on_the_device_and_never_waits(fake_gpu, variant, dtype):
    state = fake_state(variant, dtype)
    row_B, features_BD = torch.empty(8, dtype=torch.int64, device=CUDA), torch.empty(8, 16, device=CUDA)
    with NoWaiting():
        for step in (0, 9):  # 9: with a refresh of the centroids
            label_B, weight_K = odc.targets(state, row_B)
            moved = odc.update(state, row_B, features_BD, step)
    assert label_B.device == weight_K.device == moved.device == CUDA
    assert state.memory.centroids_KD.device == CUDA


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.to("cpu"),
        lambda x: torch.ops.aten.nonzero(x),
        lambda x: torch.ops.aten.index(x, [x > 0]),
    ],
)
def test_waiting_would_be_noticed(fake_gpu, wait):
    on_device = torch.empty(8, device=CUDA)
    with NoWaiting(), pytest.raises(AssertionError):
        wait(on_device)


def test_head_loss_and_memory_stay_on_the_device_and_never_wait(fake_gpu):
    """What a step does besides backbone, backward and SGD, which a CPU build of torch cannot run on a fake GPU."""
    state, head = fake_state("paper", torch.float16), torch.empty(20, 16, device=CUDA)
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8).to(CUDA).to(torch.float32).div_(255)
    row_B = torch.empty(8, dtype=torch.int64, device=CUDA)
    with NoWaiting():
        features_BD = images.flatten(1).narrow(1, 0, 16).relu()
        label_B, weight_K = odc.targets(state, row_B)
        loss = F.cross_entropy(F.linear(features_BD, head), label_B, weight_K)
        state.plan.memory.instance_share = 0.5
        entry_BD, _ = odc.entries_to_find(state, row_B, 0)
        instances = instance_loss(features_BD, entry_BD, torch.arange(8, device=CUDA))
        odc.update(state, row_B, features_BD, 0)
    assert loss.device == instances.device == CUDA


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_iteration_of_kmeans_stays_on_the_device_and_never_waits(fake_gpu, dtype):
    with NoWaiting():
        nearest = NearestByScores(torch.empty(200, 16, dtype=dtype, device=CUDA), torch.empty(20, 16, device=CUDA), 30)
        changed = nearest.follow(torch.empty(20, 16, device=CUDA))
    assert len(nearest.pieces) == 7
    assert {nearest.label_S.device, nearest.sums.sums_KD.device, changed.device} == {CUDA}


def test_augmentation_follows_the_images(monkeypatch):
    """Factors are drawn on the host; only they travel, one way. (Real draws: fake ones have no values to sort.)"""
    moved = []
    whole = torch.Tensor.to

    def to(self, *args, **kwargs):
        moved.append((self.numel(), kwargs.get("non_blocking", False)))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    augment_batch(torch.rand(8, 3, 16, 16), AugmentRecipe(), torch.Generator())
    assert moved
    assert all(count <= 8 * 6 and without_waiting for count, without_waiting in moved)


def test_members_copies_and_losses_stay_on_the_device_and_never_wait(fake_gpu):
    recipe = CODCPlan(members=[MemberRecipe(), MemberRecipe(rotation=1, mixup=1)])
    images, row_B = torch.empty(8, 3, 32, 32, device=CUDA), torch.empty(8, dtype=torch.int64, device=CUDA)
    state = fake_state("paper", torch.float16)
    with NoWaiting():
        turn_B = torch.empty(8, dtype=torch.int64).to(CUDA)
        copy = rotate_quarters(images, turn_B)
        outputs = [
            Output(*(torch.empty(8, n, device=CUDA) for n in (8, 20))),
            Output(*(torch.empty(8, n, device=CUDA) for n in (8, 20, 4, 20))),
        ]
        label_B, weight_K = odc.targets(state, row_B)
        made = Views(images, copy, turn_B, copy, row_B, 0.3)
        total, shown = losses(outputs, recipe, label_B, weight_K, made)
        odc.update(state, row_B, joint_features([output.features_BD for output in outputs]), 0)
    assert total.device == shown.device == CUDA


def test_parts_of_a_batch_and_their_losses_stay_on_the_device_and_never_wait(fake_gpu):
    recipe = CODCPlan(members=[MemberRecipe(rotation=1, mixup=1)])
    images, row_B = torch.empty(8, 3, 32, 32, device=CUDA), torch.empty(8, dtype=torch.int64, device=CUDA)
    state = fake_state("paper", torch.float16)
    with NoWaiting():
        label_B, weight_K = odc.targets(state, row_B)
        views = Views(images, images, row_B, images, row_B, 0.3).parts(3)
        for part, part_label_B in zip(views, label_B.tensor_split(3), strict=True):
            output = Output(*(torch.empty(len(part_label_B), n, device=CUDA) for n in (16, 20, 4, 20)))
            total, shown = losses([output], recipe, part_label_B, weight_K, part, label_B)
            assert total.device == shown.device == CUDA
    assert [len(part.images) for part in views] == [3, 3, 2]


def test_dc_step_stays_on_the_device_and_never_waits(fake_gpu):
    state, row_B = fake_state("paper", torch.float16, "dc"), torch.empty(8, dtype=torch.int64).to(CUDA)
    with NoWaiting():
        label_B, weight_K = deepcluster.targets(state, row_B)
        moved = deepcluster.update(state, row_B, torch.empty(8, 16, device=CUDA), 0)
    assert label_B.device == weight_K.device == moved.device == CUDA


@pytest.mark.parametrize("gathered", [True, False])
def test_small_clusters_are_changed_on_the_device_wherever_their_members_are(fake_gpu, monkeypatch, gathered):
    """Members that were gathered are on the host. How many rows there are is what the host waits for; here it is 7."""
    memory, where = fake_state("paper", torch.float16).memory, torch.device("cpu") if gathered else CUDA
    found = SimpleNamespace(nonzero=lambda: torch.empty(7, 1, dtype=torch.int64, device=where))
    monkeypatch.setattr(small_clusters, "rows_of_clusters", lambda *args: torch.empty(7, dtype=torch.int64).to(CUDA))
    monkeypatch.setattr(small_clusters.ownership, "is_mine", lambda images: found)
    image_M = torch.empty(9, dtype=torch.int64).to(where)
    members = {label: small_clusters._Members(image_M, image_M, 3) for label in (3, 5)}
    with NoWaiting():
        small_clusters._disperse(memory, [5], torch.empty(19, dtype=torch.int64).to(CUDA), VARIANTS["paper"])
        _, own = small_clusters._own_members(memory, [3])
        small_clusters._set_members(memory, members, {label: torch.empty(16).to(where) for label in members})
    assert own[3].image_M.device == memory.centroids_KD.device == memory.sizes_K.device == CUDA
