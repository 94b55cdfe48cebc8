"""RUN folders as finetune leaves them, but written by hand: no network is trained."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

NASTY = [  # names of files that want to be more than names
    "</script><script>document.title='owned'</script>.png",
    '"><img src=x onerror=document.title=1>.png',
    "it's {{ 7*7 }} & <b>bold</b>.png",
    "  blanks  in  it .png",
    "кошка на окне.png",
    "javascript:alert(1).png",
    "new\nline.png",
]


def line_of(step, epochs=0.1, **figures):
    """A line of metrics.jsonl."""
    usual = {"loss": 1.0, "loss_over_ln_k": 0.9 - step / 1000, "change_ratio": 0.5 / (1 + step), "lr": 0.1}
    usual |= {"images_per_second": 50.0, "data_wait": 0.05, "empty": 0, "smallest": 2, "largest": 9}
    usual |= {"largest_share": 0.2, "entropy": 0.97, "centroid_spread": 0.5, "nmi_previous": 0.8}
    return {"step": step, "time": "2026-01-01T00:00:00+00:00", "epoch": (step + 1) * epochs, **usual, **figures}


def write_run(folder, names=None, clusters=3, lines=None, finished=True, checkpoint="scratch:test_resnet", pixels=True):
    """Write images and a RUN into a folder; return the RUN.

    Image i is in cluster i modulo `clusters`; an earlier state had images 0 and 1 the other way round.
    """
    from odcft.recipe import dump, load_recipe

    names = [f"{i:03d}.png" for i in range(24)] if names is None else names
    draw, images, run = np.random.default_rng(0), folder / "images", folder / "run"
    for name in names if pixels else ():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (12, 16, 3)).astype(np.uint8)).save(images / name)
    run.mkdir(parents=True)
    about = {"checkpoint": checkpoint, "sha256": checkpoint, "arch": "test_resnet", "data": str(images)}
    about |= {"images": len(names), "odcft": "0.2.0", "started": "2026-01-01T00:00:00+00:00", "sample": {}}
    fields = [f"memory.clusters={clusters}", "data.size=32", "data.range=[0, 255]", "optim.epochs=3"]
    (run / "recipe.yaml").write_text(dump(load_recipe("small", fields)))
    lines = [line_of(step) for step in range(30)] if lines is None else lines
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        label_N = np.arange(len(names)) % clusters
        columns = {"path": names, "cluster": label_N, "distance": (np.arange(len(names)) / 100).astype(np.float32)}
        pq.write_table(pa.table(columns), run / "clusters.parquet")
        earlier_N = label_N.copy()
        earlier_N[[0, 1]] = label_N[[1, 0]]
        for step, labels_N in ((20, earlier_N), (30, label_N)):
            state = run / "checkpoints" / f"step-{step:09d}"
            state.mkdir(parents=True)
            centroids = draw.normal(size=(clusters, 8)).astype(np.float32)
            save_file({"method.centroids": centroids}, state / "same.safetensors")
            for rank in range(2):
                save_file({"rows.labels": labels_N[rank::2].copy()}, state / f"rank-{rank}-of-2.safetensors")
        about |= {"finished": 30, "ended": "2026-01-01T01:00:00+00:00"}
    (run / "run.json").write_text(json.dumps(about))
    return run
