"""The optimizer's groups, its schedule and what is kept of it, held against their definitions."""

import math

import pytest
import torch
from torch import nn

from odcft.optim import lr_at, make_optimizer, optimizer_state, restore_optimizer, set_lr
from odcft.recipe import OptimRecipe


def parts():
    """A body of a filter, a bias and a frozen bias, and a head."""
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    body[1].bias.requires_grad_(False)
    return body, nn.Linear(4, 3)


def shapes(group):
    return [tuple(p.shape) for p in group["params"]]


def test_sgd_decays_everything_and_the_head_has_momentum_and_rate_of_its_own():
    body, head = parts()
    recipe = OptimRecipe(lr=0.06, momentum=0.8, head_momentum=0.3, head_lr=7.0, weight_decay=0.01)
    optimizer = make_optimizer(body.parameters(), head.parameters(), recipe)
    assert type(optimizer) is torch.optim.SGD
    first, second = optimizer.param_groups
    assert shapes(first) == [(4, 2, 3, 3), (4,), (4,)]  # what is frozen is left out
    assert shapes(second) == [(3, 4), (3,)]
    assert [(g["momentum"], g["lr_factor"], g["weight_decay"], g["lr"]) for g in (first, second)] == [
        (0.8, 1.0, 0.01, 0.06),
        (0.3, 7.0, 0.01, 0.06),
    ]


def test_adamw_decays_matrices_and_filters_only():
    body, head = parts()
    recipe = OptimRecipe(optimizer="adamw", lr=0.001, momentum=0.8, head_momentum=0.3, head_lr=7.0, weight_decay=0.05)
    optimizer = make_optimizer(body.parameters(), head.parameters(), recipe)
    assert type(optimizer) is torch.optim.AdamW
    assert [(shapes(g), g["betas"], g["lr_factor"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [
        ([(4, 2, 3, 3)], (0.8, 0.999), 1.0, 0.05, 0.001),
        ([(4,), (4,)], (0.8, 0.999), 1.0, 0.0, 0.001),
        ([(3, 4)], (0.3, 0.999), 7.0, 0.05, 0.001),
        ([(3,)], (0.3, 0.999), 7.0, 0.0, 0.001),
    ]


def test_cosine_falls_from_lr_to_nothing_over_the_run():
    recipe = OptimRecipe(lr=0.5, epochs=4, schedule="cosine")
    rates = [lr_at(step, 5, recipe) for step in range(21)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(21)])
    assert rates[0] == 0.5
    assert rates[10] == pytest.approx(0.25)
    assert rates[20] == pytest.approx(0)


def test_warm_up_rises_in_equal_steps_and_the_cosine_has_the_rest():
    recipe = OptimRecipe(lr=0.6, epochs=4, schedule="cosine", warmup_epochs=1.2)  # 6 of 20 steps
    assert [lr_at(step, 5, recipe) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    rest = [0.6 * (1 + math.cos(math.pi * step / 14)) / 2 for step in range(14)]
    assert [lr_at(step, 5, recipe) for step in range(6, 20)] == pytest.approx(rest)


def test_step_is_constant_and_a_fraction_for_the_last_epochs():
    recipe = OptimRecipe(lr=0.6, epochs=4, schedule="step", final_epochs=1.4, final_factor=0.25, warmup_epochs=0.4)
    rates = [lr_at(step, 5, recipe) for step in range(20)]
    assert rates == pytest.approx([0.3, 0.6, *[0.6] * 11, *[0.15] * 7])
    recipe = OptimRecipe(lr=0.6, epochs=4, schedule="step", final_epochs=0)
    assert {lr_at(step, 5, recipe) for step in range(20)} == {0.6}
    with pytest.raises(AssertionError, match="resolved"):
        lr_at(0, 5, OptimRecipe(schedule="step"))


def test_every_group_gets_its_share_of_the_rate():
    body, head = parts()
    optimizer = make_optimizer(body.parameters(), head.parameters(), OptimRecipe(head_lr=7.0))
    set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 3.5]


def stepped(kind, layout=torch.contiguous_format, steps=2):
    """A network and its optimizer after some steps on the same numbers."""
    torch.manual_seed(0)
    body, head = parts()
    body = body.to(memory_format=layout)
    recipe = OptimRecipe(optimizer=kind, momentum=0.9, head_momentum=0.5, lr=0.1)
    optimizer = make_optimizer(body.parameters(), head.parameters(), recipe)
    images = torch.rand(5, 2, 6, 6)
    for _ in range(steps):
        step(body, head, optimizer, images)
    return body, head, optimizer, images


def step(body, head, optimizer, images):
    optimizer.zero_grad()
    head(body(images).mean((2, 3))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_restored_optimizer_continues_as_if_nothing_had_happened(kind):
    body, head, optimizer, images = stepped(kind)
    kept = {name: tensor.clone() for name, tensor in optimizer_state(optimizer).items()}
    slots = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}[kind]
    assert set(kept) == {f"{number}.{slot}" for number in range(5) for slot in slots}
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(groups):
        for slot in slots - {"step"}:
            assert torch.equal(kept[f"{number}.{slot}"], optimizer.state[parameter][slot])

    other_body, other_head, other, _ = stepped(kind, steps=0)
    other_body.load_state_dict(body.state_dict())
    other_head.load_state_dict(head.state_dict())
    restore_optimizer(other, kept)
    step(body, head, optimizer, images)
    step(other_body, other_head, other, images)
    for one, two in ((body, other_body), (head, other_head)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_is_restored_is_a_copy_laid_out_as_the_parameter():
    """One laid out otherwise gives other last bits where torch multiplies and adds at once."""
    kept = optimizer_state(stepped("adamw")[2])
    optimizer = stepped("adamw", torch.channels_last, steps=0)[2]
    restore_optimizer(optimizer, kept)
    filters = optimizer.param_groups[0]["params"][0]
    slots = optimizer.state[filters]
    assert slots["exp_avg"].stride() == filters.stride() != kept["0.exp_avg"].stride()
    assert torch.equal(slots["exp_avg"], kept["0.exp_avg"])
    assert slots["step"].shape == ()
    for name in ("exp_avg", "step"):
        slots[name].add_(1)
        assert not torch.equal(slots[name], kept[f"0.{name}"])


def test_only_tensors_are_stored():
    optimizer = stepped("sgd")[2]
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["note"] = "not a tensor"
    assert "0.note" not in optimizer_state(optimizer)
