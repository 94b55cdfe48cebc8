"""The bench of equal minutes: minutes to epochs, and what the table says."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def budget():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("budget")
    for name in ("budget", "fine_tuning", "runs"):
        sys.modules.pop(name, None)


def test_minutes_become_whole_epochs_and_at_least_one(budget):
    times = {"start": 30.0, "epoch": 20.0}
    assert [budget.epochs_within(minutes, times) for minutes in (0.1, 1, 1.5, 10)] == [1, 1, 3, 28]


def test_the_table_has_means_intervals_and_gains_and_names_what_ended_below_the_checkpoint(budget):
    figures = dict.fromkeys(budget.SHOWN, 40.0)
    results = {
        "original": figures,
        "small-5-0": {**figures, "svm": 44.0, "epochs": 9},
        "small-5-1": {**figures, "svm": 46.0, "epochs": 9},
        "dc-small-5-0": {**figures, "knn": 39.0, "epochs": 8},
    }
    summed = budget.table(results)
    cell = summed["small"]["5"]
    assert (cell["svm"], cell["svm_gain"], cell["svm_worst_gain"], cell["seeds"]) == (45, 5, 4, 2)
    assert cell["svm_interval"] == pytest.approx(12.706 * 2**0.5 / 2**0.5, rel=1e-6)
    assert "svm_interval" not in summed["dc-small"]["5"]
    last = budget.as_text(summed).splitlines()[-1]
    assert last == "A run ended below the checkpoint: dc-small at 5 minutes (kNN)."
    del results["original"]["svm_best"], results["original"]["knn_best"]  # --layers last
    assert "best layer" not in budget.as_text(budget.table(results))


def test_other_settings_and_impossible_minutes_are_refused(budget, tmp_path, monkeypatch, capsys):
    def refused(*words):
        monkeypatch.setattr(
            sys, "argv", ["budget.py", "c.pth", "images", "--test", "t", "--out", str(tmp_path), *words]
        )
        with pytest.raises(SystemExit):
            budget.parse_arguments()
        return capsys.readouterr().err

    assert "give minutes" in refused("--minutes", "5,x")
    assert "this process may use" in refused("--core", "9999")
    kept = {"ckpt": "other.pth", "data": "images", "test": "t", "overrides": [], "layers": "best"}
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    assert "different settings (ckpt)" in refused()
