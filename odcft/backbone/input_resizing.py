"""Build a vision transformer for images of another size.

timm resamples the position embedding, or the tables of relative positions, while it loads weights. So the network is
built again by timm with `img_size`, and is given its own weights as if they were a checkpoint: the features are those
of `timm.create_model(..., img_size=S)` with the same checkpoint, by construction.
"""

import warnings
from typing import Any

from torch import nn

from odcft.backbone.non_timm_networks import SkipRandomInit, timm_builds
from odcft.errors import OdcftError, ran_out_of_memory
from odcft.text import short_repr

USUAL_SIZE = 224  # pixels that `data.size: auto` gives transformers made for more


def patch_side(net: nn.Module, own: int) -> int:
    """Pixels that the side of an image must be a multiple of: a transformer's patch, or how much it shrinks images.

    Args:
        net: the network.
        own: side of the images it is built for. Only a patch counts if that is not a multiple of it.
    """
    embedding: Any = getattr(net, "patch_embed", None)
    if hasattr(embedding, "feat_ratio"):
        return int(embedding.feat_ratio())
    return 1 if own % _shrinks_by(net) else _shrinks_by(net)


def size_step(net: nn.Module, own: int) -> int:
    """Pixels between two sizes that suit a network: a transformer's patch, or how much all its stages shrink it."""
    patch, all_stages = patch_side(net, own), _shrinks_by(net)
    return patch if own % all_stages else max(patch, all_stages)


def _shrinks_by(net: nn.Module) -> int:
    """How many times smaller than the image the last feature map is, as timm says; 1 if it does not."""
    stages: Any = getattr(net, "feature_info", None)
    return max([int(stage["reduction"]) for stage in stages or [] if "reduction" in stage], default=1)


def resized(net: Any, arch: str, arch_args: dict[str, Any], size: int) -> nn.Module:
    """Build timm's network again for images of `size` pixels, with the same weights.

    Args:
        net: the `nn.Module`, not changed; its weights are on the CPU or will be copied there.
        arch: its name.
        arch_args: what it was built with; `img_size` is replaced.
        size: side of the new images, in pixels.

    Returns:
        The new network, on the CPU.

    Raises:
        OdcftError: not a network of timm's, the size is not a multiple of the patch, or timm cannot resample it.
    """
    if not timm_builds(arch, arch_args):
        raise OdcftError(f"{arch} cannot be built for images of {size} pixels.")
    own = arch_args.get("img_size", net.pretrained_cfg["input_size"][-1])
    if size % (patch := patch_side(net, own)):
        below, above = size // patch * patch, -(-size // patch) * patch
        nearest = f"{below} or {above}" if below else str(above)
        raise OdcftError(f"{arch} takes images whose side is a multiple of {patch} pixels, not {size}: try {nearest}.")
    import timm

    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    source = {"state_dict": weights, "num_classes": 0, "first_conv": None, "source": "", "custom_load": False}
    try:
        with SkipRandomInit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new: Any = timm.create_model(
                arch,
                pretrained=True,
                num_classes=0,
                pretrained_cfg_overlay=source,
                **{**arch_args, "img_size": size},
            )
    except Exception as error:  # timm's networks refuse sizes and weights with many kinds of errors
        if ran_out_of_memory(error):
            raise
        why = short_repr(str(error).strip().partition("\n")[0], 90, quotes=False)
        raise OdcftError(
            f"{arch} takes images of {own} pixels only, not {size}: timm cannot build it for other sizes ({why})."
        ) from None
    new.pretrained_cfg = new.default_cfg = net.pretrained_cfg  # timm keeps the weights in it
    new.train(net.training)
    return new
