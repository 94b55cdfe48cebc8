"""`odcft clusters RUN`: the summary, the table, --json, and what is refused."""

import json

import pyarrow.parquet as pq
import pytest
from run_folders import finished_run

import odcft


@pytest.fixture
def run(tmp_path, make_images):
    return finished_run(tmp_path / "run", make_images(tmp_path / "images", 20), clusters=3, labels=[2] * 12 + [0] * 8)


def test_the_summary_says_how_large_and_tight_clusters_are_and_how_to_go_on(run, odcft_command):
    code, out, err = odcft_command("clusters", run)
    assert (code, out) == (0, "")
    assert f"3 of 20 images in {run} · sizes 8 … 12, median 10 · 1 empty" in err
    assert "Largest     cluster 2: 12 images, distance 0.10" in err
    assert "Tightest    cluster 2" in err
    assert f"odcft clusters {run} --sheets SHEETS/" in err


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
        (["--folders", "F", "--sheets", "F"], "two different folders"),
        (["--threshold", "0.9"], "--threshold is of --near-duplicates"),
        (["--near-duplicates", "--folders", "F"], "--folders is of clusters"),
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
    values = odcft.clusters(run, out=tmp_path / "t.csv")
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
