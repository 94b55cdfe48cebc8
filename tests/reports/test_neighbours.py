"""Neighbours before and after fine-tuning."""

import numpy as np
import pytest
from stopped_runs import quick, write_inputs

from odcft.data.sources import find_images
from odcft.progress import Progress
from odcft.reports.neighbours import Neighbours, before_and_after
from odcft.reports.run_report import report
from odcft.train import fine_tune


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A RUN of 16 images, and the folder of its inputs."""
    folder = tmp_path_factory.mktemp("trained")
    write_inputs(folder, 16)
    fine_tune(str(folder / "c.pth"), str(folder / "images"), folder / "run", quick(), progress=Progress(quiet=True))
    return folder


def test_neighbours_are_those_of_the_run_and_of_the_checkpoint_it_began_with(trained):
    from odcft.backbone.load import load_backbone
    from odcft.evaluation.features import features_of
    from odcft.evaluation.starting_checkpoint import view_of_run

    images, run = find_images(str(trained / "images")), trained / "run"
    found = before_and_after(run, images, np.arange(1, 15), Progress(quiet=True))
    assert found.rows.tolist() == list(range(1, 15))
    for ckpt, neighbours in ((run, found.after), (trained / "c.pth", found.before)):
        backbone = load_backbone(str(ckpt)).backbone
        features = features_of(backbone, images, view_of_run(str(run)), Progress(quiet=True)).layers["last"][1:15]
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        cosine = features @ features.T - 2 * np.eye(14)
        assert (1 + np.argsort(-cosine, 1)[:, :6]).tolist() == neighbours.tolist()


def test_without_the_checkpoint_there_is_no_before(trained, tmp_path):
    import shutil

    run = shutil.copytree(trained / "run", tmp_path / "run")
    about = (run / "run.json").read_text()
    (run / "run.json").write_text(about.replace('"sha256": "', '"sha256": "0'))
    page = report(run, data=str(trained / "images"), progress=Progress(quiet=True))
    assert page["neighbours"] == 16
    assert "There is nothing before it to compare with" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:vit_giant_patch14_dinov2", "but the backbone is"),
        ("timm:test_resnet.r160_in1k", "is not on this machine"),
    ],
)
def test_a_name_in_run_json_is_neither_fetched_nor_built_at_any_size(trained, tmp_path, monkeypatch, name, says):
    import json
    import shutil

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **how: pytest.fail("it asked the network"))
    run = shutil.copytree(trained / "run", tmp_path / "run")
    about = json.loads((run / "run.json").read_text()) | {"checkpoint": name, "sha256": name, "checkpoint_path": name}
    (run / "run.json").write_text(json.dumps(about))
    found = before_and_after(run, find_images(str(trained / "images")), np.arange(16), Progress(quiet=True))
    assert found.before is None
    assert says in found.why_no_before


def test_the_share_of_neighbours_that_stay():
    after, before = np.array([[1, 2], [0, 2], [0, 1]]), np.array([[2, 1], [0, 3], [3, 4]])
    assert Neighbours(np.arange(3), after, before).kept == pytest.approx((1 + 0.5 + 0) / 3)
