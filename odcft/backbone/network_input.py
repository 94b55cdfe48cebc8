"""A network's input, and the adapter from RGB images in 0..1 to the colours, range and normalisation it expects."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft.data.lab_colors import rgb_to_lab
from odcft.data.view import View, describe_view
from odcft.errors import OdcftError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# By colour: channels of the first convolution, and the largest value before normalisation.
CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1, "lab_l": 1, "sobel": 2}
RANGES = {"rgb": 1.0, "bgr": 1.0, "gray": 1.0, "lab_l": 100.0, "sobel": 1.0, "bands": 1.0}
COLORS = (*CHANNELS, "bands")


@dataclass(frozen=True)
class Input:
    """The input a network expects.

    Attributes:
        color: one of COLORS. "sobel" is the two gradients of the mean of the normalised channels (DeepCluster);
            "lab_l" is the lightness of Lab (colorization); "gray" is luma; "bands" are those of the image as they are,
            any number but 3.
        size: side in pixels of the images it was made for, or trained with.
        mean, std: for values in 0..`range`, one number for each channel (of RGB for "sobel").
        channels: of the first convolution; 0 means as many as the colour has. Further channels are filled with zeros:
            the hints and the mask of Zhang et al., SIGGRAPH 2017.
        range: the largest value before normalisation; 0 means the colour's own (1, or 100 for lightness). Some
            networks take 0..255.
        crop_fraction, interpolation, intensity: as in `View`.
        measured: False if mean and std stand for unknown ones, and should be measured from the images.
    """

    color: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 0
    range: float = 0.0
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    intensity: tuple[float, float] | None = None
    measured: bool = True

    def __post_init__(self) -> None:
        if self.color not in COLORS:
            raise OdcftError(f"--input {self.color}: no such input. Choose from {', '.join(CHANNELS)}.")
        object.__setattr__(self, "channels", self.channels or CHANNELS.get(self.color, len(self.mean)))
        object.__setattr__(self, "range", self.range or RANGES[self.color])
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        object.__setattr__(self, "intensity", None if self.intensity is None else tuple(self.intensity))

    @property
    def bands(self) -> int:
        """Channels of the images it is shown, before the adapter: 3 for RGB."""
        return self.channels if self.color == "bands" else 3

    @property
    def view(self) -> View:
        """How an image file becomes the square of pixels that is normalised."""
        return View(self.size, self.crop_fraction, self.interpolation, self.intensity, self.bands)

    def describe_view(self) -> str:
        """That in a phrase, for a line of output."""
        return describe_view(self.view)

    def describe_color(self) -> str:
        """Its colours, or how many bands, in a word or two."""
        return f"{self.channels} bands" if self.color == "bands" else self.color

    def with_view(self, view: View) -> "Input":
        """The same colours and normalisation with another view; how it crops is not the network's affair."""
        return replace(self, **{name: value for name, value in vars(view).items() if name not in ("bands", "crop")})

    def dump(self) -> dict[str, Any]:
        """As JSON; `load` reads it back."""
        return {
            "channels": self.channels,
            "color": self.color,
            "range": [0, self.range],
            "mean": list(self.mean),
            "std": list(self.std),
            "size": self.size,
            "crop_fraction": self.crop_fraction,
            "interpolation": self.interpolation,
            "intensity": None if self.intensity is None else list(self.intensity),
            **({} if self.measured else {"measured": False}),
        }


def input_from_json(about: dict[str, Any]) -> Input:
    """Read what `dump` wrote. Files of odcft 0.1 have no view fields, and those of `odcft pretext` no channels."""
    optional: dict[str, Any] = {
        name: about[name]
        for name in ("channels", "crop_fraction", "interpolation", "intensity", "measured")
        if name in about
    }
    if "range" in about:
        optional["range"] = about["range"][1]
    return Input(about["color"], about["size"], about["mean"], about["std"], **optional)


def default_input(color: str, size: int) -> Input:
    """The usual normalisation for a colour: ImageNet's, or that of Goyal et al. (2019) for lightness."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean, std = IMAGENET
    if color == "bgr":
        mean, std = mean[::-1], std[::-1]
    if color == "gray":
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if color == "lab_l":
        mean, std = (50.0,), (1.0,)
    return Input(color, size, mean, std)


def bands_input(size: int, bands: int) -> Input:
    """The input of a network for images of several bands; its mean and std are to be measured from the images."""
    return Input("bands", size, (0.5,) * bands, (0.25,) * bands, channels=bands, measured=False)


class Adapter(nn.Module):
    """Convert RGB images in 0..1 to a network's input. It has no parameters and adds nothing to the state dict."""

    def __init__(self, input: Input) -> None:
        super().__init__()
        self.input = input
        self.mean: Tensor
        self.std: Tensor
        self.kernel_2133: Tensor
        self.register_buffer("mean", torch.tensor(input.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(input.std).view(1, -1, 1, 1), persistent=False)
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernel_2133", torch.stack([across, across.T]).unsqueeze(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Convert RGB images (B, 3, H, W) in 0..1, or images of the network's bands, to (B, channels, H, W)."""
        color = self.input.color
        if color == "bgr":
            images = images.flip(1)
        elif color == "gray":
            red, green, blue = images.unbind(1)
            images = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
        elif color == "lab_l":
            images = rgb_to_lab(images)[:, :1]
        images = (images * (self.input.range / RANGES[color]) - self.mean) / self.std
        if color == "sobel":
            images = F.conv2d(images.mean(1, keepdim=True), self.kernel_2133.to(images.dtype), padding=1)
        if self.input.channels > images.shape[1]:
            images = F.pad(images, (0, 0, 0, 0, 0, self.input.channels - images.shape[1]))
        return images
