"""What is written for people never lies where it would do harm later."""

import pytest

from odcft.errors import OdcftError
from odcft.reports.output_places import refuse_places


@pytest.fixture
def run(make_run, tmp_path):
    return make_run(tmp_path)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"--out": "run/x.html"}, "lies in the RUN"),
        ({"--out": "elsewhere/../run/backbone/x.csv"}, "lies in the RUN"),
        ({"--folders": "link/deep/er"}, "lies in the RUN"),
        ({"--sheets": "run"}, "lies in the RUN"),
        ({"--out": "images/x.csv"}, "among the images"),
        ({"--sheets": "images"}, "among the images"),
        ({"--folders": "a", "--sheets": "a/b"}, r"--sheets \S*b lies in --folders"),
        ({"--folders": "a/b/c.csv", "--out": "a/b/c.csv"}, "Give each output a place of its own"),
        ({"--out": "a/t.csv", "--sheets": "a"}, "--out .* lies in --sheets"),
    ],
)
def test_harmful_places_are_refused(run, tmp_path, outputs, said):
    (tmp_path / "link").symlink_to(run / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OdcftError, match=said):
        refuse_places({option: tmp_path / path for option, path in outputs.items()}, run, None)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_memory_and_images_named_by_data_are_guarded_too(run, tmp_path):
    (tmp_path / "memory").mkdir()
    for name in ("memory.json", "memory.safetensors"):
        (tmp_path / "memory" / name).touch()
    with pytest.raises(OdcftError, match="lies in the memory"):
        refuse_places({"--out": tmp_path / "memory" / "x.csv"}, run, None)
    (tmp_path / "photos").mkdir()
    refuse_places({"--out": tmp_path / "photos" / "x.csv"}, run, None)
    with pytest.raises(OdcftError, match="among the images"):
        refuse_places({"--out": tmp_path / "photos" / "x.csv"}, run, str(tmp_path / "photos"))


def test_other_places_are_taken(run, tmp_path):
    (tmp_path / "run.json").write_text("{}")  # a file of somebody's own, of that name
    paths = {"--out": tmp_path / "run_by_cluster.csv", "--folders": tmp_path / "a", "--sheets": tmp_path / "ab"}
    refuse_places(paths, run, None)
