"""`odcft evaluate --protocol unlabelled`: a RUN or checkpoints, on images that nobody labelled."""

import json
import shutil

import numpy as np
import pytest
from evaluation_helpers import RecordedProgress, strict_json

from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation import unlabelled_comparison
from odcft.evaluation.results_table import json_values
from odcft.evaluation.starting_checkpoint import origins_of
from odcft.evaluation.unlabelled_comparison import evaluate_unlabelled, sample
from odcft.evaluation.unlabelled_table import unlabelled_lines

NAMES = {
    *("neighbour_agreement", "cluster_stability", "effective_rank", "lidar", "spectrum_decay", "spread", "dead_share")
}


@pytest.fixture(autouse=True)
def few_images_are_enough(monkeypatch):
    monkeypatch.setattr(unlabelled_comparison, "LEAST", 40)


@pytest.fixture
def images(tmp_path, make_images):
    """A folder of 48 images without sub-folders."""
    made = make_images(tmp_path / "made", 48)
    for path in sorted(made.rglob("*.png")):
        path.rename(made / path.name)
    return made


@pytest.fixture
def run(tmp_path, images, make_checkpoint):
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    overrides = ["optim.epochs=1", "optim.batch_size=8", "log.tensorboard=false"]
    checkpoint = str(make_checkpoint(tmp_path / "c.pth"))
    fine_tune(checkpoint, str(images), tmp_path / "run", load_recipe("small", overrides), progress=RecordedProgress())
    return tmp_path / "run"


def test_a_run_beside_its_checkpoint(run, tmp_path, images, odcft_command):
    code, out, err = odcft_command("evaluate", run, images, "--protocol", "unlabelled", "--json")
    assert code == 0, err
    values = strict_json(out)["unlabelled"]
    assert values["verdict"] in ("better", "worse", "cannot tell")
    assert set(values["measures"]) == NAMES
    assert all(set(one) == {"before", "after"} for one in values["measures"].values())
    assert (values["images"], values["found"], values["unreadable"], values["seed"]) == (48, 48, 0, 0)
    alone = evaluate_unlabelled(str(tmp_path / "c.pth"), str(images), progress=RecordedProgress())
    assert alone["measures"]["lidar"]["after"] == pytest.approx(values["measures"]["lidar"]["before"], rel=1e-4)
    assert any(line.split() == ["before", "after"] for line in err.splitlines())
    assert err.splitlines()[-2].startswith(values["verdict"].capitalize())


def test_a_checkpoint_alone_gets_measures_and_no_verdict(tmp_path, images, make_checkpoint):
    found = evaluate_unlabelled(str(make_checkpoint(tmp_path / "c.pth")), str(images), progress=RecordedProgress())
    assert found["verdict"] is None
    assert set(found["measures"]["spread"]) == {"after"}
    assert unlabelled_lines(found)[-1].startswith("No verdict: ")


def test_several_checkpoints_are_compared_with_the_last(tmp_path, images, make_checkpoint):
    one, other = (str(make_checkpoint(tmp_path / f"{seed}.pth", seed=seed)) for seed in (0, 1))
    found = evaluate_unlabelled([one, one, other], str(images), progress=RecordedProgress())
    assert [column["source"] for column in found["columns"]] == [one, one, other]
    assert found["columns"][0] | {"source": ""} == found["columns"][1] | {"source": ""}
    assert found["columns"][2]["verdict"] is None
    assert found["measures"] == found["columns"][0]["measures"]
    lines = unlabelled_lines(found)
    assert lines[3].split() == ["[1]", "[2]", "[3]"]
    assert lines[-2].startswith(f"{one}: ")
    strict_json(json.dumps(json_values(found)))
    assert found["columns"][0]["verdict"] == "cannot tell"
    assert "only runs of one checkpoint" in found["reason"]
    same = evaluate_unlabelled([other, other], str(images), progress=RecordedProgress())
    assert same["verdict"] == "cannot tell"  # nothing changed
    assert "changed too little" in same["reason"]


def test_runs_of_one_checkpoint_can_be_compared_and_others_cannot(run, tmp_path, make_checkpoint):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    other = make_checkpoint(tmp_path / "other.pth", seed=1)
    assert origins_of(str(run)) & origins_of(str(again))
    assert origins_of(str(run)) & origins_of(str(tmp_path / "c.pth"))
    assert origins_of(str(run)) & origins_of(str(run / "backbone"))
    assert not origins_of(str(run)) & origins_of(str(other))
    assert not origins_of("scratch:resnet18") & origins_of("scratch:resnet50")
    (again / "run.json").write_text("[]")
    assert len(origins_of(str(again))) == 1


def test_labels_are_not_read(tmp_path, images, make_checkpoint):
    checkpoint = str(make_checkpoint(tmp_path / "c.pth"))
    names = sorted(path.name for path in images.glob("*.png"))
    (images / "list.csv").write_text(
        "path,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    )
    found = [
        evaluate_unlabelled(checkpoint, str(data), progress=RecordedProgress())
        for data in (images, images / "list.csv")
    ]
    assert found[0]["measures"] == found[1]["measures"]


def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path, images, make_checkpoint):
    checkpoint, progress = str(make_checkpoint(tmp_path / "c.pth")), RecordedProgress()
    (images / "000.png").write_bytes(b"no image")
    found = evaluate_unlabelled(checkpoint, str(images), progress=progress)
    assert (found["images"], found["found"], found["unreadable"]) == (47, 48, 1)
    assert any(line.startswith("Left out    1 of 48 images cannot be read: 000.png (") for line in progress.lines)


def test_a_large_set_is_sampled_the_same_way_each_time(images, monkeypatch):
    monkeypatch.setattr(unlabelled_comparison, "MOST", 10)
    chosen = list(sample(find_images(images)).names)
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen)
    assert list(sample(find_images(images)).names) == chosen


def test_ranks_give_what_one_gives(tmp_path, images, make_checkpoint, on_threads):
    checkpoint = str(make_checkpoint(tmp_path / "c.pth"))

    def work():
        return evaluate_unlabelled(checkpoint, str(images), progress=RecordedProgress())

    first, second = on_threads(2, work)
    assert second == {}
    for name, values in work()["measures"].items():
        assert first["measures"][name]["after"] == pytest.approx(values["after"], rel=1e-3), name


def test_mistakes_get_one_sentence(tmp_path, images, make_checkpoint, odcft_command):
    checkpoint = make_checkpoint(tmp_path / "c.pth")

    def message(*args):
        code, out, err = odcft_command("evaluate", *args)
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    unlabelled = ("--protocol", "unlabelled")
    assert "--test" in message(checkpoint, images, *unlabelled, "--test", images)
    assert "--layers all" in message(checkpoint, images, *unlabelled, "--layers", "all")
    np.savez(tmp_path / "f.npz", features=np.zeros((4, 2)))
    assert "instead of --features" in message("--features", tmp_path / "f.npz", *unlabelled)
    for path in list(images.glob("*.png"))[:10]:
        path.unlink()
    assert message(checkpoint, images, *unlabelled).endswith(f"{images} has 38. Give more.")


def test_features_that_are_not_finite_are_refused(tmp_path, images, make_checkpoint, monkeypatch):
    def broken(*args, **more):
        return np.full((48, 2, 3), np.nan)

    monkeypatch.setattr(unlabelled_comparison, "random_views", broken)
    checkpoint = str(make_checkpoint(tmp_path / "c.pth"))
    with pytest.raises(OdcftError, match=r"c.pth gives features that are NaN or infinite for 48 of 48 images"):
        evaluate_unlabelled(checkpoint, str(images), progress=RecordedProgress())


def test_protocols_with_and_without_labels_in_one_call(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 48)
    checkpoint = make_checkpoint(tmp_path / "c.pth")
    code, out, err = odcft_command("evaluate", checkpoint, images, "--protocol", "knn,unlabelled", "--json")
    assert code == 0, err
    assert {"knn", "unlabelled"} <= set(strict_json(out))
