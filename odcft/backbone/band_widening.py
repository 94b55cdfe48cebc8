"""Give a network for RGB another number of bands, as images from satellites and microscopes have."""

import torch
from torch import nn

from odcft.backbone.network import Backbone
from odcft.backbone.network_input import Adapter, bands_input
from odcft.errors import OdcftError


def set_bands(backbone: Backbone, bands: int, random: bool) -> tuple[Backbone, list[str]]:
    """Let a network take images of so many bands.

    A first convolution for RGB is widened: each new filter is the mean of its three, times 3 / bands, so that an image
    whose bands are all alike gives the same features as before.

    Args:
        backbone: changed, or replaced.
        bands: 3 for RGB.
        random: whether its weights are random, so that a network can be built for these bands instead.

    Returns:
        The backbone, and notes for the user.

    Raises:
        OdcftError: it takes something else than RGB or that many bands.
    """
    input = backbone.input
    if bands == input.bands and (bands == 3 or input.color == "bands"):
        return backbone, []
    if input.color != "bands" and input.channels == bands:  # two channels, which were taken for gradients
        backbone.adapter = Adapter(bands_input(input.size, bands))
        return backbone, []
    if bands == 3 or input.color not in ("rgb", "bgr") or input.channels != 3:
        takes = f"{input.channels} bands" if input.color == "bands" else input.color
        raise OdcftError(
            f"data.bands={bands}: {backbone.arch} takes {takes}, and there is no way to adapt its first convolution. "
            "A network for RGB can be widened."
        )
    if random:
        backbone = Backbone(backbone.arch, input, **{**backbone.arch_args, "in_chans": bands}).eval()
        notes = []
    else:
        _widen_first_convolution(backbone, bands)
        notes = [
            f"the first convolution takes {bands} bands instead of RGB: each filter is the mean of its three, "
            f"times 3/{bands}"
        ]
    backbone.adapter = Adapter(bands_input(input.size, bands))
    return backbone, notes


@torch.no_grad()
def _widen_first_convolution(backbone: Backbone, bands: int) -> None:
    first = next((m for m in backbone.net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)
    if first is None or first.groups != 1:
        raise OdcftError(f"data.bands={bands}: {backbone.arch} has no first convolution for RGB that could be widened.")
    weight = first.weight.mean(1, keepdim=True).expand(-1, bands, -1, -1) * (3 / bands)
    first.weight, first.in_channels = nn.Parameter(weight.clone()), bands
    backbone.arch_args = {**backbone.arch_args, "in_chans": bands}
