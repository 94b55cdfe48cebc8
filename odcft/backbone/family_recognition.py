"""Recognise whose code wrote a checkpoint."""

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_matching import Match


def recognise_family(contents: Contents, arch: str, found: Match) -> str:
    """Tell whose code wrote a file by what it holds around the backbone.

    Args:
        contents: what the file holds.
        arch: the backbone's architecture.
        found: where in the file it was found.

    Returns:
        The first family whose marks are there; "state_dict" if there are none.
    """
    where, names = found.where, set(contents.outer_keys)
    keys = [key for tensors in contents.state_dicts.values() for key in tensors]

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in keys)

    vit = arch.startswith("vit_")
    headless = vit and not has("head.", "fc.")
    marks = {
        "odcft": contents.metadata.from_odcft,
        "transformers": contents.metadata.from_transformers,
        "open_clip": contents.metadata.from_open_clip,
        "timm": contents.metadata.architecture is not None or "state_dict_ema" in names,
        "fair_caffe2": contents.container == "pickle" and "blobs" in names,
        "colorization_zhang": arch in ("colorization_eccv16", "colorization_siggraph17"),
        "vissl": bool({"classy_state_dict", "model_state_dict"} & names) and has("_feature_blocks."),
        "rotnet_gidaris": has("_feature_blocks."),
        "deepcluster": has("top_layer.", "features.module."),
        "lightly_ssl": "pytorch-lightning_version" in names and "backbone." in where,
        "lightning": "pytorch-lightning_version" in names,
        "openselfsup": "meta" in names or "message_hub" in names,
        "msn": "target_encoder" in names,
        "mocov3": "base_encoder." in where,
        "moco": "encoder_q." in where,
        "simsiam": has("module.predictor.") and "encoder." in where,
        "dinov2": vit and has("mask_token") and any(".ls1.gamma" in key for key in keys),
        "dino": "teacher" in names,
        "mae": has("decoder_"),
        # The backbones they released are plain vision transformers without a head, and so are other people's.
        "dino or timm": headless and where == "the file itself",
        "mae or timm": headless and where == "model",
        "training script": "arch" in names and "state_dict" in names and bool({"optimizer", "args", "epoch"} & names),
        "torchvision": where == "the file itself" and bool(arch.startswith(("resnet", "alexnet"))),
    }
    return next((name for name, present in marks.items() if present), "state_dict")
