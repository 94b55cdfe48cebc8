"""`odcft doctor`: what it finds on machines that have what usually makes trouble, and the line before a run."""

import importlib.metadata
import json
import shutil
import sys
import time
from collections import namedtuple

import pytest
import torch

from odcft import doctor
from odcft.recipe import load_recipe

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch):
    """Importing them all takes seconds."""
    monkeypatch.setattr(doctor, "LIBRARIES", {})
    monkeypatch.setattr(doctor, "TRIAL", 1 << 20)


def found(result, name):
    (check,) = [check for check in result["checks"] if check["name"] == name]
    return check


def test_every_check_has_an_answer_and_nothing_is_left_behind(odcft_command, tmp_path):
    code, out, err = odcft_command("doctor", tmp_path, "--json")
    values = json.loads(out)
    names = [check["name"] for check in values["checks"]]
    assert code == (0 if values["usable"] else 2)
    assert {"packages", "torch", "bfloat16", "faiss", "jpeg", "images", "cores", "open files", "disk"} <= set(names)
    assert all(check["fix"] for check in values["checks"] if check["status"] != "ok")
    assert all(name in err for name in names)
    assert list(tmp_path.iterdir()) == []


def test_of_a_folder_that_does_not_exist_yet_the_one_above_is_tried(tmp_path):
    check = found(doctor.check_machine(tmp_path / "runs" / "new"), "disk")
    assert f"in {tmp_path}, where the folder that you named will be made" in check["found"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "file"])
def test_what_is_not_a_folder_is_refused(tmp_path, monkeypatch, odcft_command, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, err = odcft_command("doctor", name)
    assert code == 2
    assert f"{name or repr('')} is not a folder. Name the one that RUN folders go to" in err


def test_a_version_that_is_too_old_fails_with_the_command(odcft_command, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99", 'faiss-cpu>=99; extra == "faiss"'])
    code, _, err = odcft_command("doctor", tmp_path)
    assert code == 2
    assert f"torch {importlib.metadata.version('torch')} (needs >=99)" in err
    assert 'pip install "torch>=99"' in err
    assert "faiss-cpu" not in err.partition("torch>=99")[0]  # an extra is not needed


def test_a_library_that_crashes_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "faiss.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(doctor, "LIBRARIES", {"faiss": "faiss-cpu"})
    check = found(doctor.check_machine(tmp_path), "faiss")
    assert check["status"] == "warn"
    assert "cannot be imported: crashed" in check["found"]


def test_a_library_that_never_ends_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "faiss.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(doctor, "LIBRARIES", {"faiss": "faiss-cpu"})
    monkeypatch.setattr(doctor, "PATIENCE", 1)
    assert "faiss could not be tried" in found(doctor.check_machine(tmp_path), "libraries")["found"]


def test_a_check_that_breaks_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA driver: out of its mind\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    result = doctor.check_machine(tmp_path)
    assert any("out of its mind" in check["found"] and check["status"] == "warn" for check in result["checks"])
    assert found(result, "disk")["status"] in ("ok", "warn")


def test_a_gpu_that_torch_cannot_use_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "570.86")
    result = doctor.check_machine(tmp_path)
    assert not result["usable"]
    assert "driver (570.86), but torch is a CPU build" in found(result, "GPU")["found"]


def test_a_containers_quota_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(doctor, "core_quota", lambda: 1.5)
    check = found(doctor.check_machine(tmp_path), "cores")
    assert check["status"] == "warn"
    assert "may use 2 of the 64 it sees" in check["found"]


def test_few_open_files_are_a_warning(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    check = found(doctor.check_machine(tmp_path), "open files")
    assert (check["status"], check["fix"]) == ("warn", "ulimit -n 4096")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12, 12))
    assert found(doctor.check_machine(tmp_path), "open files")["fix"].startswith("a hard limit above 12: docker run")


@pytest.fixture
def little_shared_memory(monkeypatch):
    usual = shutil.disk_usage
    docker = Usage(64_000_000, 0, 64_000_000)  # its default
    monkeypatch.setattr(shutil, "disk_usage", lambda path: docker if path == "/dev/shm" else usual(path))
    monkeypatch.setattr(doctor.os.path, "isdir", lambda path: True)


def test_little_shared_memory_is_said_before_a_run_that_needs_more(tmp_path, little_shared_memory):
    line = doctor.machine_line(load_recipe(overrides=["data.workers=8"]), tmp_path / "runs" / "new")
    assert "/dev/shm: 64 MB free, and batches read ahead by data workers take up to 2.5 GB" in line
    assert "docker run --shm-size=8g" in line
    assert "/dev/shm" not in doctor.machine_line(load_recipe(overrides=["data.workers=0"]), tmp_path)
    assert found(doctor.check_machine(tmp_path), "/dev/shm")["status"] == "warn"


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 500, "\udcff"])
def test_no_name_of_a_run_folder_breaks_the_line(tmp_path, name):
    assert doctor.machine_line(load_recipe("small"), tmp_path / name).startswith("Machine     ")


def test_the_line_before_a_run_costs_nothing(tmp_path):
    recipe = load_recipe("small")
    doctor.machine_line(recipe, tmp_path)
    began = time.process_time()
    line = doctor.machine_line(recipe, tmp_path)
    assert time.process_time() - began < 0.05
    assert line.startswith("Machine     ")
    assert "\n" not in line


@pytest.mark.slow
def test_the_libraries_work_here(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "PATIENCE", 600)
    result = doctor.check_machine(tmp_path)
    assert result["usable"], doctor.describe(result)
    assert found(result, "timm")["status"] == "ok"
