"""The benchmark that calibrates the verdict without labels: which runs it plans, and how it counts them."""

import argparse
import importlib.util
from pathlib import Path

import pytest

from odcft.errors import OdcftError
from odcft.evaluation.unlabelled_verdict import BETTER, CANNOT_TELL, RULE, WORSE, calibration

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "unlabelled_calibration.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("unlabelled_calibration", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_half_of_the_runs_of_every_checkpoint_are_held_back(script):
    runs = script.planned({"a": "a.pth", "one/b": "b.pth"}, ["one", "two"])
    assert runs == script.planned({"a": "a.pth", "one/b": "b.pth"}, ["one", "two"])
    assert {(run.data, run.start) for run in runs} == {("one", "a"), ("two", "a"), ("one", "one/b")}
    for start in ("a", "one/b"):
        mine = [run for run in runs if run.start == start and run.data == "one"]
        assert len(mine) == len({run.name for run in mine}) == len(script.SETTINGS) + len(script.LONGER)
        assert [run.held_back for run in mine] == [place % 2 == 1 for place in range(len(mine))]


def pair(neighbours, rank, change, held_back=False):
    before = dict.fromkeys(calibration()[0]["measures"]["before"], 1.0)
    after = {**before, "neighbour_agreement": 1 + neighbours, "effective_rank": rank}
    score = {"change": change, "low": change - 1, "high": change + 1}
    start = {"data": "one", "checkpoint": "a", "held_back": held_back}
    return {**start, "svm": score, "knn": score, "measures": {"before": before, "after": after}}


def test_verdicts_are_counted(script):
    pairs = [pair(0.02, 1, 2), pair(0.02, 1, -0.5), pair(0.02, 0.5, -3), pair(0.0, 1, 4)]
    assert script.verdicts_on(pairs, RULE) == {
        BETTER: {"said": 2, "right": 1, "surely right": 1, "surely wrong": 0},
        WORSE: {"said": 1, "right": 1, "surely right": 1, "surely wrong": 0},
        CANNOT_TELL: 1,
    }
    found = script.summary(pairs)
    assert found["all"]["pairs"] == 4
    assert found["on one"]["measures"]["neighbour_agreement"]["sign"] == 0.25
    assert len(list(script.as_text(found))) > 8


def test_the_best_rule_rather_abstains_than_errs(script):
    pairs = [pair(0.016, 1, 2), pair(0.013, 1, -2), pair(0.0, 0.5, -3), pair(0.0, 0.7, 1)]
    rule = script.best_rule(pairs)
    assert (rule.neighbours, rule.rank_lost) == (0.015, 0.6)
    assert script.verdicts_on(pairs, rule)[BETTER]["right"] == 1


def test_mistakes_get_a_sentence(script, tmp_path, make_images):
    with pytest.raises(OdcftError, match="x: write NAME=VALUE"):
        script.named(["x"])
    for name, about in (("one/b", "rotation:resnet18"), ("two/b", "rotation:resnet18:4"), ("one/b", "x:resnet18:4")):
        with pytest.raises(OdcftError, match="write DATA/NAME=TASK:ARCH:EPOCHS"):
            script.parts_of(name, about, {"one": {}})
    (tmp_path / "mine.json").write_text('{"pairs": 3}')
    args = argparse.Namespace(out=tmp_path, table=tmp_path / "mine.json", ckpt=["a=scratch:resnet18"])
    with pytest.raises(OdcftError, match="is not a table of this script"):
        script.refuse_places(args)
    args.ckpt = [f"a={tmp_path / 'none.pth'}"]
    with pytest.raises(OdcftError, match=r"none.pth does not exist"):
        script.refuse_places(args)
    with pytest.raises(OdcftError, match="has 12 images in sub-folders; give at least"):
        script.lists_of(tmp_path, "few", str(make_images(tmp_path / "few")))
