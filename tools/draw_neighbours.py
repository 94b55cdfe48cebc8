"""Draw docs/neighbours.png from a finished demo: what lies next to an image before and after fine-tuning.

python tools/draw_neighbours.py demo

A row for the hundredth image of each digit, so none is picked by hand: the image, its nearest neighbours among all
others by the cosine of their features, those of the checkpoint on the left, of the fine-tuned backbone on the right.
Neighbours of another digit have a red frame. Prints how many of all images' neighbours are of the same digit.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import odcft

ROOT = Path(__file__).parent.parent
NEIGHBOURS, SIDE, GAP, TITLE = 6, 32, 6, 22  # neighbours of an image; pixels
RED = (220, 40, 40)


def nearest(features: np.ndarray) -> np.ndarray:
    """The rows (N, NEIGHBOURS) nearest to each row of features (N, F), itself left out."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    closeness = unit @ unit.T
    np.fill_diagonal(closeness, -1)
    return np.argsort(-closeness, axis=1, kind="stable")[:, :NEIGHBOURS]


def main() -> None:
    """See the top of the file."""
    demo = Path(sys.argv[1])
    found = [odcft.embed(demo / name, demo / "digits", progress=False) for name in ("rotation.pth", "run")]
    paths = found[0]["paths"]
    digits = np.array([path.split("/")[0] for path in paths])
    rows = [nearest(one["features"]) for one in found]
    for name, near in zip(("before", "after"), rows, strict=True):
        print(
            f"{name}: {(digits[near] == digits[:, None]).mean():.1%} of {NEIGHBOURS} neighbours are of the same digit"
        )

    step = SIDE + GAP
    left = [2 * step, (3 + NEIGHBOURS) * step]  # where the neighbours before and after begin
    picture = Image.new("RGB", (left[1] + NEIGHBOURS * step, TITLE + 10 * step), "white")
    draw = ImageDraw.Draw(picture)
    for x, text in zip((GAP // 2, *left), ("image", "nearest before", "nearest after ODC"), strict=True):
        draw.text((x, 3), text, fill="black", font=ImageFont.load_default(13))
    for row, digit in enumerate(sorted(set(digits))):
        query, y = int(np.flatnonzero(digits == digit)[99]), TITLE + row * step
        tiles = [(GAP // 2, query)]
        tiles += [
            (x + i * step, int(near[query, i])) for x, near in zip(left, rows, strict=True) for i in range(NEIGHBOURS)
        ]
        for x, index in tiles:
            picture.paste(Image.open(demo / "digits" / paths[index]).convert("RGB"), (x, y))
            if digits[index] != digit:
                draw.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1), outline=RED, width=2)
    picture.quantize(64).save(ROOT / "docs" / "neighbours.png", optimize=True)


if __name__ == "__main__":
    main()
