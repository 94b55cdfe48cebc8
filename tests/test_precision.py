"""What is rounded, and where it must not be."""

import math

import pytest
import torch
from torch import nn

from odcft.clustering import deepcluster, kmeans, memory, odc
from odcft.clustering.memory import VARIANTS
from odcft.plan import automatic_precision, fill_autos
from odcft.precision import GOOD_STEPS, LossScale, allow_tf32, exact_products, has_bfloat16, has_fast_float16
from odcft.recipe import MemoryRecipe, Recipe


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("generation", "has_it"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_only_emulates_bfloat16_does_not_have_it(monkeypatch, generation, has_it):
    """V100 (7.0) and T4 (7.5): `torch.cuda.is_bf16_supported()` says yes, and they crawl."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_bfloat16(torch.device("cuda", 0)) == has_it
    assert has_fast_float16(torch.device("cuda", 0))
    assert automatic_precision(torch.device("cuda", 0)) == ("bfloat16" if has_it else "float16")


def test_a_gpu_without_tensor_cores_and_a_cpu_train_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    assert {automatic_precision(torch.device(kind)) for kind in ("cuda", "cpu", "mps")} == {"float32"}


def test_the_loss_is_scaled_in_float16_only_and_the_factor_adapts():
    model, plain, scale = nn.Linear(2, 2), LossScale(False), LossScale(True)
    model.weight.grad = torch.full((2, 2), 3.0)
    assert plain.allows_step(model)
    assert (plain.factor, plain.stored(), plain.lower()) == (1, {}, False)
    assert torch.equal(model.weight.grad, torch.full((2, 2), 3.0))
    assert scale.allows_step(model)
    assert torch.equal(model.weight.grad, torch.full((2, 2), 3.0 / 2**16))
    model.weight.grad[0, 0] = math.inf
    assert not scale.allows_step(model)
    assert scale.factor == 2**15
    again = LossScale(True)
    again.restore(scale.stored())
    assert again.stored() == scale.stored()
    for _ in range(GOOD_STEPS):
        scale.step_was_finite()
    assert scale.factor == 2**16
    while scale.lower():
        pass
    assert scale.factor == 1


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_cudnns_as_well(allowed):
    allow_tf32(allowed)
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_exact_products_leave_the_setting_as_it_was():
    allow_tf32(True)
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


def test_labels_are_decided_by_exact_products(monkeypatch):
    """TF32 has 10 bits: it decides between centroids that are nearer to each other than a thousandth."""
    allow_tf32(True)
    seen = []

    def watched(module, name):
        whole = getattr(module, name)

        def call(*args, **kwargs):
            seen.append((name, torch.get_float32_matmul_precision()))
            return whole(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watched(torch, "addmm")
    watched(torch, "mm")
    watched(memory, "nearest_centroid")
    features_SD = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    labels_S = kmeans.assign(features_SD, kmeans.kmeans(features_SD, 4, 0))[0]
    plan = fill_autos(Recipe(memory=MemoryRecipe(clusters=4, dtype="float32", min_cluster=20)))
    state = odc.start(features_SD.clone(), labels_S, plan)
    odc.update(state, torch.arange(10), features_SD[:10].flip(1), 0)
    deepcluster.start(features_SD.clone(), labels_S, plan)
    assert {name for name, _ in seen} == {"addmm", "mm", "nearest_centroid"}
    assert {precision for _, precision in seen} == {"highest"}
    assert VARIANTS["paper"].nearest == "euclidean"
