"""The paper's tables and figures: arguments, resuming, and the subsets of images."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from odcft.data.sources import find_images
from odcft.errors import OdcftError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A function that imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("paper", "fine_tuning", "long_tail", "runs"):
        sys.modules.pop(name, None)


@pytest.fixture
def call(load, monkeypatch, capsys):
    """A function that runs a script with these words; returns its exit code, what it prints, and its errors."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        code = 0
        try:
            load(script).main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


# ---------------------------------------------------------------- long-tailed subsets


def classes(*sizes):
    starts = np.cumsum([0, *sizes])
    return {f"c{i}": np.arange(starts[i], starts[i + 1]) for i in range(len(sizes))}


@pytest.mark.parametrize("ratio", [1, 4, 64])
def test_the_largest_class_has_ratio_times_as_many_images_as_the_smallest(load, ratio):
    by_class = classes(*[2000] * 10)
    drawn = load("long_tail").long_tail(by_class, ratio, 4000, seed=3)
    sizes = [len(rows) for rows in drawn.values()]
    assert sum(sizes) == 4000
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[-1] == pytest.approx(ratio, rel=0.03)
    for name, rows in drawn.items():
        assert set(rows) <= set(by_class[name])
        assert len(set(rows.tolist())) == len(rows)
    assert sizes[1] < (sizes[0] + sizes[2]) / 2 or ratio == 1  # convex: a tail, not a ramp


def test_the_same_seed_draws_the_same_images_and_another_one_others(load):
    draw = load("long_tail").long_tail
    one, same, other = (draw(classes(*[50] * 4), 4, 60, seed) for seed in (0, 0, 1))
    assert {name: rows.tolist() for name, rows in one.items()} == {name: rows.tolist() for name, rows in same.items()}
    assert list(one) != list(other) or any(one[name].tolist() != other[name].tolist() for name in one)


def test_small_classes_limit_the_subset_and_become_its_tail(load):
    long_tail = load("long_tail")
    drawn = long_tail.long_tail(classes(100, 4, 30), 10, None, seed=0)
    sizes = {name: len(rows) for name, rows in drawn.items()}
    assert list(sizes) == ["c0", "c2", "c1"]
    assert sizes["c1"] <= 4
    assert sizes["c0"] == 40
    assert long_tail.most_images([100, 4, 30], 10) == sum(sizes.values())


def test_a_smallest_class_without_images_is_refused(load):
    with pytest.raises(OdcftError, match="ratio of 64 the smallest class would have none"):
        load("long_tail").long_tail(classes(30, 30, 30), 64, None, seed=0)


def test_the_list_names_images_in_place_and_is_never_overwritten_silently(call, make_images, tmp_path):
    images = make_images(tmp_path / "images", count=40)
    out = tmp_path / "lists" / "tail.csv"
    code, printed, _ = call("long_tail", images, "--ratio", 4, "--out", out, "--json")
    values = json.loads(printed)
    assert code == 0
    assert (values["largest"], values["smallest"], values["images"]) == (20, 5, 25)
    listed = find_images(out)
    assert Counter(listed.class_labels()) == values["sizes"]
    assert all(Path(listed.path(i)).is_file() for i in range(len(listed)))
    code, _, errors = call("long_tail", images, "--ratio", 4, "--out", out)
    assert (code, errors) == (2, f"long_tail.py: {out} exists. Choose another place, or pass --overwrite.\n")
    assert call("long_tail", images, "--ratio", 2, "--out", out, "--overwrite")[0] == 0
    mine, link = tmp_path / "mine.csv", tmp_path / "link.csv"
    mine.write_text("path,label\na.png,a\n")
    link.symlink_to(out)
    for other in (mine, link):
        code, _, errors = call("long_tail", images, "--ratio", 2, "--out", other, "--overwrite")
        assert code == 2
        assert "was not written by long_tail.py" in errors
    assert mine.read_text() == "path,label\na.png,a\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "0.5"], "--ratio 0.5: give 1 (all classes the same size) or more"),
        (["--ratio", "nan"], "--ratio nan: give 1"),
        (["--ratio", "2", "--images", "0"], "--images 0: give 1 or more"),
        (["--ratio", "2", "--classes", "1"], "--classes 1: give 2 or more"),
    ],
)
def test_arguments_of_long_tail(call, make_images, tmp_path, words, message):
    code, _, errors = call("long_tail", make_images(tmp_path / "images", count=4), "--out", tmp_path / "x.csv", *words)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "x.csv").exists()


# ---------------------------------------------------------------- arguments of paper.py


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fig2"], "invalid choice: 'fig2'"),
        (["table3", "--labelled", "a", "--labelled", "b"], "table3 takes one --labelled; table1 and table2"),
        (["table1", "--labelled", "a", "--labelled", "b", "--test", "c"], "1 --test for 2 --labelled"),
        (["fig5", "--epochs", "0"], "--epochs 0: give 1 or more"),
        (["table3", "--ckpt", "x/a.pth", "--ckpt", "y/a.pth"], "the same file name up to the first dot"),
        (["fig5", "--set", "memory.clutsers=3"], "paper.py: memory.clutsers: no such field"),
        (["fig5", "--data", "nowhere"], "paper.py: nowhere does not exist. Give a folder of images"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(call, make_images, tmp_path, words, message):
    images, out = make_images(tmp_path / "images"), tmp_path / "out"
    code, _, errors = call("paper", "--data", images, "--scale", "tiny", "--out", out, *words)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_table_4_in_full_needs_checkpoints(call, make_images, tmp_path):
    images = make_images(tmp_path / "images")
    code, _, errors = call("paper", "table4", "--data", images, "--scale", "full", "--out", tmp_path / "out")
    assert code == 2
    assert "give one or more --ckpt" in errors


def test_images_without_classes_are_refused(call, make_images, tmp_path):
    images = make_images(tmp_path / "images") / "a"
    code, _, errors = call("paper", "fig5", "--data", images, "--scale", "tiny", "--out", tmp_path / "out")
    assert code == 2
    assert "no labels" in errors


# ---------------------------------------------------------------- resuming


@pytest.fixture
def trained(load, monkeypatch):
    """Runs that are only pretended: what was asked of odcft, and a number of runs after which it is stopped."""
    runs, calls = load("runs"), []

    def odcft(verb, *words):
        words = [str(word) for word in words]
        run = Path(words[words.index("--out") + 1])
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text("{}")
        calls.append((run.name, "--resume" in words))
        if len(calls) == stopped.get("at"):
            sys.exit(runs.EXIT_STOPPED)
        lines = [{"epoch": e / 2, "loss": 3.0 - e / 10, "change_ratio": 1 / e} for e in range(1, 5)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"seconds": 1}

    stopped = {}
    monkeypatch.setattr(runs, "odcft", odcft)
    return calls, stopped


def test_a_stopped_target_resumes_its_run_and_repeats_no_finished_one(call, trained, make_images, tmp_path):
    calls, stopped = trained
    words = ("--data", make_images(tmp_path / "images"), "--scale", "tiny", "--out", tmp_path / "out")
    stopped["at"] = 2
    assert call("paper", "fig1b", *words)[0] == 75
    assert calls == [("resnet-odc", False), ("resnet-dc", False)]
    assert not (tmp_path / "out" / "fig1b.json").exists()
    calls.clear()
    stopped.clear()
    code, printed, _ = call("paper", "fig1b", *words, "--json")
    assert code == 0
    assert calls == [("resnet-dc", True)]
    assert json.loads(printed)["final loss"] == {"ODC": 2.6, "DC": 2.6}
    assert (tmp_path / "out" / "fig1b.png").stat().st_size > 1000
    calls.clear()
    assert call("paper", "fig5", *words)[0] == 0  # shares the ResNet's run with fig. 1b
    assert calls == [("alexnet-odc", False)]
    code, _, errors = call("paper", "fig5", *words, "--seed", 1)
    assert code == 2
    assert "has different settings (seed): choose another --out" in errors


def test_a_finished_run_that_was_deleted_is_named(call, trained, make_images, tmp_path):
    words = ("fig5", "--data", make_images(tmp_path / "images"), "--scale", "tiny", "--out", tmp_path / "out")
    assert call("paper", *words)[0] == 0
    (tmp_path / "out" / "runs" / "resnet-odc" / "metrics.jsonl").unlink()
    code, _, errors = call("paper", *words)
    assert code == 2
    assert "resnet-odc is gone" in errors


def test_a_result_is_computed_once_and_a_failed_one_is_not_kept(load, tmp_path):
    once, path, done = load("runs").once, tmp_path / "results" / "a.json", []
    with pytest.raises(KeyboardInterrupt):
        once(path, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not list(path.parent.iterdir())
    assert [once(path, lambda: done.append(1) or {"x": len(done)}) for _ in range(3)] == [{"x": 1}] * 3


@pytest.fixture
def evaluated(monkeypatch):
    """Evaluations that are only pretended: the backbones they were asked for."""
    from odcft.evaluation import comparison

    asked = []

    def evaluate(backbone, data, test, protocols, **options):
        asked.append(Path(backbone).parent.name if "/" in backbone else backbone)
        svm = {"layer": "layer3", "mAP": 50.0 + len(asked), "best_on_test": {"layer": "layer2", "mAP": 60.0}}
        low = {"mAP": 40.0, "per_k": {"1": 30.0, "2": 40.0}}
        return {"svm": svm, "low_shot": {**low, "oracle": low}}

    monkeypatch.setattr(comparison, "evaluate", evaluate)
    return asked


def test_table_3_and_figure_3_share_their_evaluations(call, trained, evaluated, make_images, tmp_path):
    words = ("--data", make_images(tmp_path / "images"), "--scale", "tiny", "--out", tmp_path / "out")
    code, printed, _ = call("paper", "table3", *words)
    assert code == 0
    assert "| ODC | layer3 | 53.0 | layer2 | 60.0 | 40.0 | 40.0 |" in printed
    assert "| ODC | 78.2 | 57.1 |" in printed  # the paper's
    assert call("paper", "fig3", *words)[0] == 0
    assert evaluated == ["scratch:resnet18", "resnet-dc", "resnet-odc"]
    assert len(trained[0]) == 2


def test_figure_4_trains_the_point_that_both_panels_share_once(call, trained, evaluated, make_images, tmp_path):
    words = ("fig4", "--data", make_images(tmp_path / "images"), "--scale", "tiny", "--out", tmp_path / "out")
    code, printed, _ = call("paper", *words, "--json")
    assert code == 0
    assert [name for name, _ in trained[0]] == ["fig4-1-20", "fig4-10-20", "fig4-10-5", "fig4-10-40"] == evaluated
    found = json.loads(printed)
    assert found["centroids every n steps"]["10"] == found["smallest cluster"]["20"]


def test_figure_6_trains_on_lists_of_the_same_length(call, trained, evaluated, make_images, tmp_path):
    data = make_images(tmp_path / "images", count=200)
    words = ("fig6", "--data", data, "--scale", "tiny", "--out", tmp_path / "out")
    code, printed, _ = call("paper", *words, "--json")
    assert code == 0
    found = json.loads(printed)
    for ratio, point in found["ratios"].items():
        listed = find_images(tmp_path / "out" / "lists" / f"fig6-{ratio}.csv")
        assert len(listed) == found["images"] == sum(point["sizes"])
        assert point["sizes"][0] / point["sizes"][-1] == pytest.approx(int(ratio), rel=0.5)


def test_few_images_get_fewer_clusters(load):
    clusters_for = load("paper").clusters_for
    assert [clusters_for(n, 16) for n in (400, 399, 257, 60, 3)] == [16, 15, 10, 2, 2]
    assert clusters_for(78_000, 3_000) == 3_000


def test_too_little_memory_is_refused_before_anything_is_trained(
    call, load, trained, make_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(load("paper"), "FEW_IMAGES", 10)
    monkeypatch.setattr(load("paper"), "free_host_memory", lambda: 1_000_000)
    words = ("--data", make_images(tmp_path / "images"), "--scale", "tiny", "--out", tmp_path / "out")
    code, _, errors = call("paper", "table1", *words)
    assert code == 2
    assert "table1 keeps the features of every layer of 12 labelled images in memory" in errors
    assert "--per-class 4" in errors
    assert not trained[0]


@pytest.mark.slow
def test_figure_7_of_a_real_run(call, make_images, tmp_path):
    images = make_images(tmp_path / "images", count=48)
    settings = ("memory.clusters=3", "memory.min_cluster=2", "optim.batch_size=24")
    changes = [word for one in settings for word in ("--set", one)]
    words = ("--data", images, "--scale", "tiny", "--epochs", 1, *changes, "--out", tmp_path / "out")
    code, printed, errors = call("paper", "fig7", *words, "--json")
    assert code == 0, errors
    figure = json.loads(printed)
    assert sum(one["images"] for one in figure["clusters"]) <= 48
    assert 0 <= figure["nmi"] <= 1
    assert (tmp_path / "out" / "fig7.png").stat().st_size > 5000
