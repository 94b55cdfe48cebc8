"""Freed memory stays with the process."""

import platform
import resource

import pytest
import torch

from odcft.data import heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns memory so eagerly")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    heap.keep_freed_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            images = torch.ones(1 << 20)  # 4 MiB: 1024 pages
            del images
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 2 * 1024


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("loaded"))
    heap.keep_freed_memory.__wrapped__()
