"""Class weights of colours, and fine-tuning a network that sees only lightness."""

import torch
from PIL import Image

from odcft.data.lab_colors import ab_bins, nearest_bin, rgb_to_lab
from odcft.data.sources import find_images
from odcft.pretexts.colorization import class_weights
from odcft.pretexts.training import train_pretext
from odcft.recipe import load_recipe


def test_rare_colours_weigh_more(tmp_path):
    for i in range(9):
        Image.new("RGB", (16, 16), (200, 30, 30) if i else (30, 30, 200)).save(tmp_path / f"{i}.png")
    bins = ab_bins()
    weights = class_weights(find_images(tmp_path), 16, bins)
    red, blue = (
        weights[nearest_bin(rgb_to_lab(torch.tensor(c).view(1, 3, 1, 1) / 255)[:, 1:].flatten(1), bins)]
        for c in ((200.0, 30.0, 30.0), (30.0, 30.0, 200.0))
    )
    assert blue > 2 * red
    assert weights.isfinite().all()


def test_a_lightness_network_is_fine_tuned_on_colour_images_and_stays_one(tmp_path, rows_of_stripes, quick_recipe):
    import timm

    from odcft.train import fine_tune

    out = tmp_path / "out" / "c.pth"
    train_pretext("colorization", rows_of_stripes, "test_resnet", out, quick_recipe("optim.epochs=1"))
    fine_tune(str(out), rows_of_stripes, tmp_path / "run", load_recipe("small", ["optim.epochs=1"]))
    net = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True, num_classes=0)
    assert net.conv1[0].weight.shape[1] == 1
