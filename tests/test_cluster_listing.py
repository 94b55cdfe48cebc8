"""`odcft clusters RUN`: the summary, the table, --json, and what is refused."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from run_folders import finished_run
from safetensors.torch import save_file

import odcft
from odcft import cluster_listing


@pytest.fixture
def run(tmp_path, make_images):
    return finished_run(tmp_path / "run", make_images(tmp_path / "images", 20), clusters=3, labels=[2] * 12 + [0] * 8)


def test_the_summary_says_how_large_and_tight_clusters_are_and_how_to_go_on(run, odcft_command):
    code, out, err = odcft_command("clusters", run)
    assert (code, out) == (0, "")
    assert f"3 of 20 images in {run} · sizes 8 … 12, median 10 · 1 empty" in err
    assert "            cluster 2: 12 images, distance 0.10" in err
    assert err.count("cluster 2:") == err.count("cluster 0:") == 1
    assert f"odcft clusters {run} --sheets SHEETS/" in err


def test_of_many_clusters_those_at_the_ends_are_named():
    per_cluster = [{"cluster": k, "images": 40 - k, "mean_distance": k / 100} for k in range(30)]
    largest, smallest, tightest, loosest = cluster_listing._describe_some(per_cluster)
    assert largest.startswith("Largest     cluster 0: 40 images, distance 0.000 · cluster 1")
    assert smallest.startswith("Smallest    cluster 29: 11 images, distance 0.290 · cluster 28")
    assert tightest.startswith("Tightest    cluster 0")
    assert loosest.startswith("Loosest     cluster 29")


def test_the_clusters_of_a_memory_are_shown_too(tmp_path, make_images, odcft_command):
    images, memory = make_images(tmp_path / "images", 6), tmp_path / "memory"
    memory.mkdir()
    labels, features = torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.int32), torch.eye(6)
    tensors = {"features": features, "labels": labels, "centroids": torch.eye(6)[[0, 1, 5]]}
    save_file(tensors, memory / "memory.safetensors")
    save_file({"weight": torch.ones(1)}, memory / "neck.safetensors")
    about = {"checkpoint": "c.pth", "sha256": "0", "data": str(images), "recipe": {"method": "odc"}}
    (memory / "memory.json").write_text(json.dumps(about))
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    (memory / "images.csv").write_text("row,path\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    values = odcft.clusters(memory, sheets=tmp_path / "sheets", progress=False)
    assert (values["clusters"], values["empty"], values["per_cluster"][0]["images"]) == (3, 1, 4)
    assert values["per_cluster"][1]["mean_distance"] == pytest.approx(2**0.5 / 2)
    assert (tmp_path / "sheets" / "cluster_0001.png").exists()
    code, _, err = odcft_command("clusters", memory, "--near-duplicates")
    assert code == 2
    assert "has no fine-tuned backbone" in err
    (memory / "memory.safetensors").write_bytes(b"rubbish")
    code, _, err = odcft_command("clusters", memory)
    assert code == 2
    assert "is not a complete folder of `odcft init-memory`" in err


def test_json_is_one_object_and_the_table_lists_all_images(run, odcft_command, tmp_path):
    code, out, err = odcft_command("clusters", run, "--out", tmp_path / "t.parquet", "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["images"], values["clusters"], values["empty"], values["step"]) == (20, 3, 1, None)
    assert values["per_cluster"][0] == {"cluster": 2, "images": 12, "mean_distance": 0.1055}
    assert "t.parquet: path, cluster, distance of 20 images" in err
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == pq.read_table(run / "clusters.parquet").to_pydict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "t.txt"], "end the name with .csv or .parquet"),
        (["--links", "hard", "--folders", "F"], "choose absolute, relative or copy"),
        (["--folders", "F", "--sheets", "F"], "Give each output a place of its own"),
        (["--threshold", "0.9"], "--threshold belongs to --near-duplicates"),
        (["--near-duplicates", "--folders", "F"], "--folders is for clusters"),
        (["--near-duplicates"], "has no backbone yet"),
        (["--sheets", "S", "--data", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(run, odcft_command, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = odcft_command("clusters", run, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_it_is_a_python_function_too(run, tmp_path):
    values = odcft.clusters(run, out=tmp_path / "t.csv", progress=False)
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == "a/000.png,2,0.1"
    assert values["out"] == str(tmp_path / "t.csv")


def test_a_full_disk_is_one_sentence(run, odcft_command, tmp_path, monkeypatch):
    from odcft.reports import tables

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write_rows", full)
    code, out, err = odcft_command("clusters", run, "--out", tmp_path / "t.csv")
    assert (code, out) == (2, "")
    assert "t.csv cannot be written: No space left on device. Make room" in err
