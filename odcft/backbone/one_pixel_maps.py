"""Convolutions to maps of one pixel, without the part of their filters that only meets padding (`optim.skip_padding`).

A ResNet-18 turns an image of 32 x 32 pixels into maps of one pixel. There, eight of the nine weights of a 3 x 3 filter
multiply zeros around the map. Outputs and gradients are the same without them, but for the order of sums.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class OnePixelConv2d(nn.Conv2d):
    """nn.Conv2d, but an output of one pixel is computed as a matrix product of what the filters meet of the map."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, filters, H', W')."""
        (height, width), (rows, columns) = maps.shape[2:], self.kernel_size
        top, left = (int(pad) for pad in self.padding)
        room = (height + 2 * top - rows, width + 2 * left - columns)  # for the filters to move
        one_pixel = all(0 <= pixels < stride for pixels, stride in zip(room, self.stride, strict=True))
        if not one_pixel or top >= rows or left >= columns:  # such a filter would meet only padding
            return super().forward(maps)
        bottom, right = min(rows, top + height), min(columns, left + width)  # this part of the filters meets the map
        met = self.weight[:, :, top:bottom, left:right]
        seen = maps[:, :, : bottom - top, : right - left]
        # Pixels before channels, the order in which `channels_last` keeps both.
        outputs = F.linear(seen.permute(0, 2, 3, 1).flatten(1), met.permute(0, 2, 3, 1).flatten(1), self.bias)
        return outputs[:, :, None, None]


def skip_padding(network: nn.Module) -> None:
    """Let all plain convolutions of a network skip the padding around maps of one pixel; weights and names stay."""
    for module in network.modules():
        if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
            continue
        if module.groups == 1 and module.dilation == (1, 1):
            module.__class__ = OnePixelConv2d
