"""RUN folders as a finished run leaves them, made without training."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from odcft.data.sources import find_images
from odcft.files import write_table
from odcft.recipe import dump, load_recipe


def finished_run(run, data, clusters=3, names=None, labels=None, distances=None, reader=None):
    """Write a RUN on images: image i is in cluster i % clusters, the nearer the earlier; return it."""
    run.mkdir(parents=True)
    names = list(find_images(data).names) if names is None else names
    labels = [i % clusters for i in range(len(names))] if labels is None else labels
    distances = [0.1 + i / 1000 for i in range(len(names))] if distances is None else distances
    recipe = load_recipe("small", [f"memory.clusters={clusters}", "data.size=32", "data.range=full", "data.bands=3"])
    (run / "recipe.yaml").write_text(dump(recipe))
    about = {"id": "0" * 32, "data": str(data), "data_path": str(Path(data).absolute()), "finished": 12}
    (run / "run.json").write_text(json.dumps(about))
    write_table(run / "images.csv", ["row", "path"], enumerate(names))
    paths = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]
    numbers = {"cluster": np.array(labels, np.int32), "distance": np.array(distances, np.float32)}
    pq.write_table(pa.table({"path": pa.array(paths, pa.string()), **numbers}), run / "clusters.parquet")
    return run
