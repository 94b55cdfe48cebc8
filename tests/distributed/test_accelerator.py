"""Which device is used, by what this machine has and what the user asks for."""

from types import SimpleNamespace

import pytest
import torch

from odcft.distributed import accelerator as module
from odcft.distributed import dist
from odcft.distributed.delayed_reader import DelayedReader
from odcft.errors import OdcftError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(module, "_chosen", "auto")
    for name in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def have(monkeypatch, name):
    monkeypatch.setattr(torch.backends.mps if name == "mps" else getattr(torch, name), "is_available", lambda: True)


@pytest.mark.parametrize(("there", "taken"), [(None, "cpu"), ("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu")])
def test_auto_takes_a_gpu_but_apples_only_on_request(monkeypatch, there, taken):
    if there:
        have(monkeypatch, there)
    assert module.kind() == taken
    assert dist.this_device() == torch.device(taken, 0 if taken in ("cuda", "xpu") else None)
    if there:
        module.choose(there)
        assert module.kind() == dist.this_device().type == there
    module.choose("cpu")
    assert module.kind() == "cpu"
    assert (module.free_memory(), module.most_memory_used(), module.device_count()) == (None, 0, 1)


def test_what_is_not_there_is_refused_with_what_is(monkeypatch):
    have(monkeypatch, "xpu")
    with pytest.raises(OdcftError, match=r"--accelerator cuda: this machine has no such device.*Here is: cpu, xpu\."):
        module.choose("cuda")
    with pytest.raises(OdcftError, match=r"--accelerator tpu: no such kind\. Choose one of auto, cpu, cuda, mps, xpu"):
        module.choose("tpu")
    assert module.kind() == "xpu"


def test_the_command_line_refuses_it_too(odcft_command, tmp_path):
    code, _, told = odcft_command("embed", "scratch:resnet18", tmp_path, "--out", "x.npz", "--accelerator", "cuda")
    assert code == 2
    assert "--accelerator cuda: this machine has no such device" in told


def test_each_kind_has_its_backend_and_several_processes_cannot_share_apples(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    have(monkeypatch, "mps")
    module.choose("mps")
    with pytest.raises(OdcftError, match="cannot share work on mps"):
        dist.start(dist.this_device())
    assert module.BACKENDS == {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


def test_free_memory_is_what_the_device_says(monkeypatch):
    have(monkeypatch, "xpu")
    said = SimpleNamespace(
        is_available=lambda: True, mem_get_info=lambda: (5, 9), max_memory_reserved=lambda: 3, device_count=lambda: 2
    )
    monkeypatch.setattr(torch, "xpu", said)
    assert (module.free_memory(), module.most_memory_used(), module.device_count()) == (5, 3, 2)


def test_results_come_a_step_late_only_where_the_host_need_not_wait():
    assert [DelayedReader.delay(torch.device(kind)) for kind in ("cpu", "mps", "cuda", "xpu")] == [0, 0, 1, 1]
