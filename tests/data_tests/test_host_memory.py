"""How much memory is free, from the files in which Linux says so."""

import pytest

from odcft.data import host_memory


@pytest.fixture
def limits(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_LIMITS", ((str(tmp_path), "most", "now", "inactive_file"),))
    return tmp_path


def test_without_a_container_it_is_what_the_machine_has(limits):
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    assert 0 < host_memory.free_host_memory() < total


@pytest.mark.parametrize(("now", "free"), [("600", 450), ("2000", 0)])
def test_a_container_has_what_is_left_of_its_limit_and_the_files_that_it_need_not_keep(limits, now, free):
    (limits / "most").write_text("1000\n")
    (limits / "now").write_text(now)
    (limits / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    assert host_memory.free_host_memory() == free


def test_a_container_without_a_limit_has_what_the_machine_has(limits):
    (limits / "most").write_text("max\n")
    (limits / "now").write_text("600\n")
    assert host_memory.free_host_memory() > 1000
