"""The same images as folder, list, tar, Parquet and saved dataset: the same rows, the same bits after training."""

import hashlib
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odcft.data.sources import find_images
from odcft.errors import OdcftError

KINDS = ("folder", "list", "tar", "shards", "parquet", "dataset", "url")


@pytest.fixture
def same_images(tmp_path, make_images):
    """A function that returns DATA of a kind, always with the same images."""
    data = make_images(tmp_path / "images", 12)
    images = find_images(data)
    names, contents = list(images.names), [images.read(i) for i in range(12)]

    def make(kind):
        if kind in ("folder", "url"):
            return data if kind == "folder" else f"file://{data}"
        if kind == "list":
            rows = "".join(f"images/{name},{name[0]}\n" for name in names)
            (tmp_path / "l.csv").write_text(f"path,label\n{rows}")
            return tmp_path / "l.csv"
        if kind == "tar":
            with tarfile.open(tmp_path / "x.tar", "w") as tar:
                tar.add(data, ".")
            return tmp_path / "x.tar"
        (tmp_path / kind).mkdir()
        table = pa.table({"image": [{"bytes": one, "path": None} for one in contents], "label": [n[0] for n in names]})
        if kind == "shards":
            for shard in range(3):
                with tarfile.open(tmp_path / kind / f"{shard}.tar", "w") as tar:
                    for name in names[4 * shard : 4 * shard + 4]:
                        tar.add(data / name, name)
        elif kind == "parquet":
            for part in range(2):
                pq.write_table(table.slice(6 * part, 6), tmp_path / kind / f"{part}.parquet", row_group_size=4)
        else:
            with pa.ipc.new_stream(str(tmp_path / kind / "data.arrow"), table.schema) as stream:
                stream.write_table(table, max_chunksize=5)
            (tmp_path / kind / "dataset_info.json").write_text("{}")
            (tmp_path / kind / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        return tmp_path / kind

    return make


def test_rows_bytes_and_classes_agree(same_images):
    folder = find_images(same_images("folder"))
    for kind in KINDS[1:]:
        images = find_images(same_images(kind))
        assert [images.read(i) for i in range(12)] == [folder.read(i) for i in range(12)], kind
        assert images.class_labels() == (folder.class_labels() if kind != "list" else ["a"] * 6 + ["b"] * 6), kind
        assert len(set(images.names)) == 12
        assert list(images.names) == sorted(images.names)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_fine_tuning_gives_the_same_bits(tmp_path, same_images, make_checkpoint, workers):
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    checkpoint, sums = str(make_checkpoint(tmp_path / "c.pth")), {}
    quick = ["optim.batch_size=4", "optim.epochs=2", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
    recipe = load_recipe("small", [*quick, f"data.workers={workers}", "data.size=32"])
    for kind in KINDS:
        run = tmp_path / f"run-{kind}"
        fine_tune(checkpoint, str(same_images(kind)), run, recipe)
        sums[kind] = hashlib.sha256((run / "backbone/model.safetensors").read_bytes()).hexdigest()
    assert len(set(sums.values())) == 1, sums


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.slow
def test_a_run_on_shards_resumes_and_is_evaluated(tmp_path, same_images, make_checkpoint, kind):
    from odcft.errors import OdcftError
    from odcft.evaluation.comparison import evaluate
    from odcft.first_memory import init_memory
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    checkpoint, data = str(make_checkpoint(tmp_path / "c.pth")), str(same_images(kind))
    quick = ["optim.batch_size=4", "optim.epochs=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
    recipe, run = load_recipe("small", [*quick, "data.workers=0", "data.size=32"]), tmp_path / "run"
    init_memory(checkpoint, data, tmp_path / "memory", recipe)
    fine_tune(checkpoint, data, run, recipe, memory=tmp_path / "memory")
    assert fine_tune(checkpoint, data, run, recipe, resume=True, epochs=2)["images"] == 12
    assert evaluate(str(run), data, None, ["knn"])["classes"] == ["a", "b"]
    assert len(pq.read_table(run / "clusters.parquet")) == 12
    with pytest.raises(OdcftError, match="has changed since: 12 are missing"):
        fine_tune(checkpoint, str(tmp_path / "images"), run, recipe, resume=True, epochs=3)


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_pipe_among_the_shards_is_refused_and_not_waited_for(tmp_path, ending):
    import os

    os.mkfifo(tmp_path / f"a.{ending}")
    with pytest.raises(OdcftError, match=rf"a\.{ending} is not a file"):
        find_images(str(tmp_path / f"*.{ending}"))
