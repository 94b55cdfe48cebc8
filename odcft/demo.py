"""`odcft demo`: every step on real images that need no download, scikit-learn's 1,797 handwritten digits."""

import time
from pathlib import Path
from typing import Any

from odcft.errors import OdcftError
from odcft.pretexts.training import train_pretext
from odcft.progress import Progress
from odcft.recipe import load_recipe
from odcft.run.folder import MEMORY_FILES, RUN_FILES, Layout
from odcft.run.output_checks import clear_folder, refuse_non_empty, refuse_unwritable
from odcft.text import duration

ARCH = "test_resnet"  # 0.4 million parameters
SIZE = 32  # pixels; the originals have 8
PRETEXT = [
    *("data.size=32", "optim.epochs=6", "optim.batch_size=64", "optim.lr=0.05", "optim.weight_decay=1e-4"),
    # Digits have no colour to jitter, and a flipped digit is no longer the same one.
    *("augment.crop_scale=[0.5, 1.0]", "augment.flip=0", "augment.rotation=10", "augment.brightness=0.2"),
    *("augment.contrast=0.2", "augment.saturation=0", "augment.hue=0", "augment.gray=0"),
]
DEMO_FILES: Layout = {
    "digits": {"[0-9]": {"[0-9][0-9][0-9][0-9].png": None}},
    **{"rotation.pth": None, "memory": MEMORY_FILES, "run": RUN_FILES, "run_dc": RUN_FILES},
}
# The reason for the schedule is in recipes/dc_small.yaml. The demo shows one report, that of ODC.
DC = ["method=dc", "optim.schedule=step", "log.report=false"]

CONTENTS = (
    "  digits/         the images, one folder per class (training ignores the folders)",
    "  rotation.pth    the starting checkpoint",
    "  memory/         samples memory and centroids memory, from `odcft init-memory`",
    "  run/            fine-tuning by ODC: report.html, metrics.jsonl, clusters.parquet, backbone/",
    "  run_dc/         fine-tuning by DeepCluster, for comparison",
)


def run_demo(out: Path, overwrite: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Write images, train a starting checkpoint, build the memories, fine-tune by ODC and by DC, evaluate all three.

    Args:
        out: folder to write everything to; must be empty or new, unless `overwrite`.
        overwrite: replace an earlier demo.

    Returns:
        The results (ODC's, and DC's under `dc`), and lines to print.
    """
    from odcft.evaluation.comparison import evaluate
    from odcft.evaluation.results_table import json_values, table_lines
    from odcft.first_memory import init_memory
    from odcft.reports.run_report import report
    from odcft.train import fine_tune

    progress = Progress()
    started = time.monotonic()
    refuse_non_empty(out, DEMO_FILES, overwrite)
    refuse_unwritable(out / "digits")
    clear_folder(out, DEMO_FILES)
    digits = write_digits(out / "digits")
    count = len(list(digits.glob("*/*.png")))
    progress.say(f"Images      {count:,} handwritten digits (scikit-learn), {SIZE} px, in {digits}")

    checkpoint = out / "rotation.pth"
    rotation = train_pretext(
        "rotation", str(digits), ARCH, checkpoint, load_recipe("pretext", PRETEXT), progress=progress
    )
    progress.say(
        f"Checkpoint  {checkpoint}: {ARCH}, predicts the rotation correctly {rotation['accuracy']:.0%} of the time"
    )

    recipe = load_recipe("demo")
    init_memory(str(checkpoint), str(digits), out / "memory", recipe, progress=progress)
    run = fine_tune(str(checkpoint), str(digits), out / "run", recipe, memory=out / "memory", progress=progress)
    run_dc = fine_tune(str(checkpoint), str(digits), out / "run_dc", load_recipe("demo", DC), progress=progress)
    after_odc, after_dc = (
        evaluate(str(out / name), str(digits), None, ["svm", "knn"], progress=progress) for name in ("run", "run_dc")
    )
    report(out / "run", labels=str(digits), evaluation=json_values(after_odc), progress=Progress(quiet=True))

    seconds = time.monotonic() - started
    values = {
        **{**json_values(after_odc), "run": run, "dc": {**json_values(after_dc), "run": run_dc}},
        **{"out": str(out), "seconds": round(seconds, 1)},
    }
    lines = [
        "",
        f"Before and after ODC ({duration(run['seconds'])}), on {count // 2:,} held-out digits:",
        *table_lines(after_odc),
        f"Before and after DeepCluster ({duration(run_dc['seconds'])}):",
        *table_lines(after_dc),
        "",
        f"Look at the clusters, and at neighbours before and after: {out / 'run' / 'report.html'}",
        f"Everything is in {out} ({duration(seconds)}):",
        *CONTENTS,
        "Your turn:    odcft finetune CKPT IMAGES/ --recipe small --out RUN",
    ]
    return values, lines


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's 1,797 digits as PNG files, enlarged from 8 to 32 pixels, one folder per class.

    Raises:
        OdcftError: the folder cannot be written.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    try:
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            )
            path = folder / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    except OSError as error:
        raise OdcftError(f"{folder} cannot be written: {error.strerror}.") from None
    return folder
