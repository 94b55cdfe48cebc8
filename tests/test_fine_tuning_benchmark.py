"""The benchmark of Table 4 refuses what it cannot do before it writes anything."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from odcft.exports import export

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "fine_tuning.py"


def test_without_a_test_set_nothing_is_written(tmp_path, make_images):
    images = make_images(tmp_path / "images")
    command = [sys.executable, str(SCRIPT), "c.pth", str(images), "--test", "nowhere", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere does not exist. Give a folder of images" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("fine_tuning")
    for name in ("fine_tuning", "runs"):
        sys.modules.pop(name, None)


def test_last_best_and_published_layer_are_three_figures(benchmark):
    last = {"svm": {"mAP": 50.0}, "knn": {"top1": 40.0}}
    best = {
        "svm": {"mAP": 60.0, "layer": "layer3", "best_on_test": {"layer": "layer2", "mAP": 61.0}},
        "knn": {"top1": 40.0, "layer": "last", "best_on_test": {"layer": "last", "top1": 40.0}},
    }
    assert benchmark.figures_of(last, best) == {
        **{"svm": 50.0, "svm_best": 60.0, "svm_published": 61.0, "knn": 40.0, "knn_best": 40.0, "knn_published": 40.0},
        "layers": {"svm_best": "layer3", "svm_published": "layer2", "knn_best": "last", "knn_published": "last"},
    }
    assert benchmark.figures_of(last, None) == {"svm": 50.0, "knn": 40.0, "layers": {}}


def test_names_of_results(benchmark):
    assert benchmark.column_and_row("a-b-original") == ("a-b", "original")
    assert benchmark.column_and_row("a-b-odc-3") == ("a-b", "odc")
    assert benchmark.column_and_row("a+b-codc-0") == ("a+b", "codc")


@pytest.mark.slow
def test_kept_runs_are_evaluated_without_training(
    tmp_path, make_images, make_checkpoint, benchmark, monkeypatch, capsys
):
    """Also those of an older version, which has no figures of the best layer."""
    images, ckpt, out = make_images(tmp_path / "images"), make_checkpoint(tmp_path / "c.pth"), tmp_path / "out"
    for method, seed in (("odc", 1), ("dc", 2)):
        export(str(make_checkpoint(tmp_path / "other.pth", seed=seed)), out / f"c-{method}-0" / "backbone")
    (out / "results").mkdir(parents=True)
    (out / "results" / "c-original.json").write_text('{"svm": 1.0, "knn": 1.0}')
    monkeypatch.setattr(benchmark.runs, "odcft", lambda *args, **options: pytest.fail("it was trained"))
    monkeypatch.setattr(benchmark, "draw", lambda *args: None)
    command = ["fine_tuning.py", str(ckpt), str(images), "--test", str(images), "--out", str(out), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:3] == ["c", "original", "last"]
    assert [line.split()[0] for line in said[2:4]] == ["best", "best*"]
    verdicts = [line for line in said if ", best layer: " in line]
    assert [line.split(",")[0] for line in verdicts] == ["c-dc-0", "c-odc-0", "c-odc-0"]
    assert "DC" in verdicts[2].split("SVM mAP")[0]
    monkeypatch.setattr(benchmark, "evaluated", lambda *args: pytest.fail("it was evaluated again"))
    benchmark.main()
