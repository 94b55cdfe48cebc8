"""Build networks: timm's, and those that published checkpoints need and timm lacks, each as a list of its layers.

Sources: the papers' own code, whose tensor names are kept here. `alexnet` is torchvision's; the other AlexNets differ
from it and from each other in widths, groups, normalisation and first stride, so weights for one fit no other. A
network ends where its authors took features: it has their fully connected layers, if any, but not the classifier of
the pretext task.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from odcft.backbone.network_input import IMAGENET, Input
from odcft.errors import OdcftError, ran_out_of_memory
from odcft.text import short_repr

Layers = list[tuple[str, nn.Module]]


class NamedLayers(nn.Module):
    """Layers one after another, under the names that checkpoints give them."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.order = [name for name, _ in layers]
        for name, layer in layers:
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, layer)

    def layers(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the output of each layer in turn, for images in the network's own input."""
        for name in self.order:
            images = self.get_submodule(name)(images)
            yield name, images

    def forward(self, images: Tensor) -> Tensor:
        """Map images in the network's own input to features (B, F); feature maps are averaged."""
        *_, (_, features) = self.layers(images)
        return features.mean((2, 3)) if features.ndim == 4 else features

    @property
    def num_features(self) -> int:
        """F, the number of outputs of the last layer with weights."""
        *_, last = self.parameters()
        return len(last)


class Subsample(nn.Module):
    """Keep every second row and column of a feature map."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H/2, W/2)."""
        return maps[:, :, ::2, ::2]


def _alexnet(
    channels: int,
    widths: tuple[int, ...],
    stride: int,
    padding: int,
    groups: int = 1,
    norms: tuple[int, ...] = (1, 2, 3, 4, 5),
    lrn: bool = False,
    fc: str = "",
) -> Layers:
    """conv1 … conv5 with pools after 1, 2 and 5; `fc` adds fc6 and fc7, with a bias ("bias") or batch norm ("norm")."""
    layers: Layers = []
    kernels, paddings = (11, 5, 3, 3, 3), (padding, 2, 1, 1, 1)
    inputs = (channels, *widths)
    for n in range(1, 6):
        g = groups if n in (2, 4, 5) else 1
        s = stride if n == 1 else 1
        layers.append((f"conv{n}", nn.Conv2d(inputs[n - 1], inputs[n], kernels[n - 1], s, paddings[n - 1], groups=g)))
        if n in norms:
            layers.append((f"bn{n}", nn.BatchNorm2d(inputs[n])))
        layers.append((f"relu{n}", nn.ReLU()))
        if n in (1, 2, 5):
            layers.append((f"pool{n}", nn.MaxPool2d(3, 2)))
        if lrn and n in (1, 2):
            layers.append((f"lrn{n}", nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)))
    if fc:
        layers.append(("flatten", nn.Flatten()))
        for n, wide in ((6, 36 * widths[-1]), (7, 4096)):
            layers.append((f"fc{n}", nn.Linear(wide, 4096, bias=fc == "bias")))
            if fc == "norm":
                layers.append((f"bn{n}", nn.BatchNorm1d(4096)))
            layers.append((f"relu{n}", nn.ReLU()))
    return layers


def _torchvision_alexnet(channels: int) -> Layers:
    widths, places = (channels, 64, 192, 384, 256, 256), (0, 3, 6, 8, 10)
    layers: Layers = []
    for n, place in enumerate(places):
        kernel, stride, padding = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))[n]
        layers.append((f"features.{place}", nn.Conv2d(widths[n], widths[n + 1], kernel, stride, padding)))
        layers.append((f"features.{place + 1}", nn.ReLU()))
        if n in (0, 1, 4):
            layers.append((f"features.{place + 2}", nn.MaxPool2d(3, 2)))
    layers += [("avgpool", nn.AdaptiveAvgPool2d(6)), ("flatten", nn.Flatten())]
    for place, wide in ((1, 9216), (4, 4096)):
        layers += [(f"classifier.{place}", nn.Linear(wide, 4096)), (f"classifier.{place + 1}", nn.ReLU())]
    return layers


def _network_in_network(channels: int, blocks: int) -> Layers:
    """Gidaris et al., ICLR 2018: three convolutions per block, the second and third of them 1 x 1."""
    layers: Layers = []
    wide = channels
    for block in range(1, blocks + 1):
        first = 5 if block < 3 else 3
        for n, (width, kernel) in enumerate(
            ((192, first), (160 if block == 1 else 192, 1), (96 if block == 1 else 192, 1)), start=1
        ):
            name = f"_feature_blocks.{block - 1}.Block{block}_ConvB{n}.layers"
            layers += [
                (f"{name}.Conv", nn.Conv2d(wide, width, kernel, padding=kernel // 2, bias=False)),
                (f"{name}.BatchNorm", nn.BatchNorm2d(width)),
                (f"{name}.ReLU", nn.ReLU()),
            ]
            wide = width
        if block == 1:
            layers.append(("_feature_blocks.0.Block1_MaxPool", nn.MaxPool2d(3, 2, 1)))
        if block == 2:
            layers.append(("_feature_blocks.1.Block2_AvgPool", nn.AvgPool2d(3, 2, 1)))
    return layers


def _colorization(channels: int, slicing: bool) -> Layers:
    """The encoders of Zhang et al.: ECCV 2016 with strides, SIGGRAPH 2017 with slicing between blocks."""
    layers: Layers = []
    wide = channels
    for block, (width, convs) in enumerate(
        ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3), (512, 3), (512, 3)), start=1
    ):
        for n in range(convs):
            stride = 2 if block < 4 and n == convs - 1 and not slicing else 1
            dilation = 2 if block in (5, 6) else 1
            layers.append((f"model{block}.{2 * n}", nn.Conv2d(wide, width, 3, stride, dilation, dilation)))
            layers.append((f"model{block}.{2 * n + 1}", nn.ReLU()))
            wide = width
        layers.append((f"model{block}.{2 * convs}", nn.BatchNorm2d(width)))
        if slicing and block < 4:
            layers.append((f"sub{block}", Subsample()))
    return layers


_DEEPCLUSTER = (96, 256, 384, 384, 256)
_ROTNET = (64, 192, 384, 256, 256)
# RotNet gives them for values in 0..255.
_CIFAR10 = tuple(v / 255 for v in (125.3, 123.0, 113.9)), tuple(v / 255 for v in (63.0, 62.1, 66.7))
RGB = Input("rgb", 224, *IMAGENET)
SOBEL = Input("sobel", 224, *IMAGENET)
GOYAL = Input("lab_l", 227, (50.0,), (1.0,))  # L in -50..50
ZHANG = Input("lab_l", 256, (50.0,), (100.0,))  # L in -0.5..0.5

# By name: its layers for a number of input channels, its input, and whether it takes no other image size.
NETWORKS: dict[str, tuple[Callable[[int], Layers], Input, bool]] = {
    "alexnet": (_torchvision_alexnet, RGB, False),
    "alexnet_deepcluster_fc": (lambda c: _alexnet(c, _DEEPCLUSTER, 4, 2, fc="bias"), SOBEL, True),
    "alexnet_deepcluster": (lambda c: _alexnet(c, _DEEPCLUSTER, 4, 2), SOBEL, False),
    "alexnet_rotnet_fc": (lambda c: _alexnet(c, _ROTNET, 4, 2, fc="norm"), RGB, True),
    "alexnet_rotnet": (lambda c: _alexnet(c, _ROTNET, 4, 2), RGB, False),
    "alexnet_jigsaw": (
        lambda c: _alexnet(c, _DEEPCLUSTER, 2, 0, groups=2, norms=(3, 4, 5), lrn=True),
        Input("rgb", 227, *IMAGENET),
        False,
    ),
    # Its authors normalise each tile of 75 pixels by the tile's own mean and std; ImageNet's come closest to that.
    "alexnet_jigsaw_nobn": (
        lambda c: _alexnet(c, _DEEPCLUSTER, 2, 0, groups=2, norms=(), lrn=True),
        Input("rgb", 75, *IMAGENET),
        False,
    ),
    "alexnet_colorization": (lambda c: _alexnet(c, _DEEPCLUSTER, 4, 0, groups=2), GOYAL, False),
    "rotnet_nin3": (lambda c: _network_in_network(c, 3), Input("rgb", 32, *_CIFAR10), False),
    "rotnet_nin4": (lambda c: _network_in_network(c, 4), Input("rgb", 32, *_CIFAR10), False),
    "rotnet_nin5": (lambda c: _network_in_network(c, 5), Input("rgb", 32, *_CIFAR10), False),
    "colorization_eccv16": (lambda c: _colorization(c, False), ZHANG, False),
    "colorization_siggraph17": (lambda c: _colorization(c, True), replace(ZHANG, channels=4), False),
}


def is_network(arch: str) -> bool:
    """Whether odcft can build this architecture: one of NETWORKS, or timm's, with or without a tag of its weights."""
    import timm

    name, dot, _ = arch.partition(".")
    if arch in NETWORKS or not dot:
        return arch in NETWORKS or timm.is_model(arch)
    return timm.is_model(name) and arch in _names_with_tags()


@cache
def _names_with_tags() -> frozenset[str]:
    import timm

    return frozenset(timm.list_pretrained())


def timm_builds(arch: str, kwargs: dict[str, Any]) -> bool:
    """Whether timm's create_model builds the same network from these arguments."""
    return arch not in NETWORKS and not {"last_stride", "small_stem"} & set(kwargs)


def build(arch: str, last_stride: int = 2, small_stem: bool = False, **kwargs: Any) -> nn.Module:
    """Build a network without a classifier, with random weights.

    Args:
        arch: a key of NETWORKS, or a name of timm's.
        last_stride: of a ResNet's last stage; colorization uses 1 without dilation (Goyal et al., 2019), which differs
            from timm's `output_stride=16`.
        small_stem: build a ResNet for small images: a first convolution of 3 x 3 with stride 1 and no pooling after it,
            as is usual for CIFAR (SimCLR, appendix B.9).
        kwargs: `in_chans`, and other arguments of timm's network (`num_heads`, `img_size` …).

    Returns:
        A network from images in its own input to features (B, F).

    Raises:
        OdcftError: it does not take these arguments.
    """
    if arch in NETWORKS:
        return _build_own(arch, last_stride, small_stem, kwargs)
    net = _build_timm(arch, kwargs)
    if last_stride == 1 and not hasattr(net, "layer4"):
        raise OdcftError(f"{arch} takes no last_stride: only ResNets do.")
    if small_stem:
        first = getattr(net, "conv1", None)
        if not (isinstance(first, nn.Conv2d) and hasattr(net, "maxpool")):
            raise OdcftError(f"{arch} takes no small_stem: only ResNets whose first layer is one convolution do.")
        net.add_module("conv1", nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False))
        net.add_module("maxpool", nn.Identity())
    if last_stride == 1:
        for module in net.get_submodule("layer4.0").modules():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                module.stride = (1, 1)
    return net


def _build_own(arch: str, last_stride: int, small_stem: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build one of NETWORKS."""
    foreign = [name for name in kwargs if name != "in_chans"]
    foreign += ["last_stride"] * (last_stride != 2) + ["small_stem"] * small_stem
    if foreign:
        raise OdcftError(f"{arch} takes no {foreign[0]}, only in_chans.")
    make, input, _ = NETWORKS[arch]
    net = NamedLayers(make(kwargs.get("in_chans", input.channels)))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


def _build_timm(arch: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build one of timm's networks."""
    import timm

    if timm.models.is_model_in_modules(arch.split(".")[0], {"resnet"}):
        # By default timm starts the last norm of each block at zero; the networks of the papers do not.
        kwargs = {"zero_init_last": False, **kwargs}
    try:
        net: nn.Module = timm.create_model(arch, pretrained=False, num_classes=0, **kwargs)
    except Exception as error:  # timm's networks refuse arguments with many kinds of errors
        if not kwargs or ran_out_of_memory(error):
            raise
        given = ", ".join(f"{name}={value}" for name, value in kwargs.items() if name != "zero_init_last")
        raise OdcftError(f"{arch} cannot be built with {given} ({short_repr(str(error), 90, quotes=False)}).") from None
    return net


# torch.nn.init's functions are listed too: __torch_function__ does not see what they call.
_RANDOM_INIT = {
    *("normal_", "uniform_", "trunc_normal_", "_trunc_normal_", "erfinv_", "bernoulli_", "orthogonal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
}


class SkipRandomInit(TorchFunctionMode):
    """Build networks without drawing random weights, for networks whose weights are all about to be replaced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return tensors as they are instead of filling them at random."""
        name = getattr(func, "__name__", "")
        if name in _RANDOM_INIT or (name == "clamp_" and args[0].is_meta):  # follows a draw; slow on the meta device
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shapes(arch: str, **kwargs: Any) -> dict[str, Tensor]:
    """A network's state dict on the meta device: names and shapes, without allocating memory."""
    import timm  # noqa: F401 - torch 2.6 cannot import what timm does while tensors have no values

    with torch.device("meta"), SkipRandomInit():
        return build(arch, **kwargs).state_dict()


def count_elements(arch: str, **kwargs: Any) -> int:
    """How many numbers a network holds, counted without allocating memory."""
    import timm  # noqa: F401 - as above

    with torch.device("meta"), SkipRandomInit():
        net = build(arch, **kwargs)
    return sum(tensor.numel() for tensors in (net.parameters(), net.buffers()) for tensor in tensors)
