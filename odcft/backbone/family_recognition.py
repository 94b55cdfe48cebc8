"""Who wrote a checkpoint."""

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_matching import Match

# ---------------------------------------------------------------- who wrote it


def family(contents: Contents, arch: str, found: Match) -> str:
    """Whose code wrote a file, by what stands around the backbone; "state_dict" where nothing tells."""
    where, names = found.where, set(contents.names)
    keys = [key for tensors in contents.state_dicts.values() for key in tensors]

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in keys)

    vit = arch.startswith("vit_")
    bare = vit and not has("head.", "fc.")
    marks = {
        "odcft": contents.told.ours,
        "timm": contents.told.architecture is not None or "state_dict_ema" in names,
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
        # Their released backbones are a plain vision transformer without head, as anybody's may be.
        "dino or timm": bare and where == "the file itself",
        "mae or timm": bare and where == "model",
        "training script": "arch" in names and "state_dict" in names and bool({"optimizer", "args", "epoch"} & names),
        "torchvision": where == "the file itself" and bool(arch.startswith(("resnet", "alexnet"))),
    }
    return next((name for name, true in marks.items() if true), "state_dict")
