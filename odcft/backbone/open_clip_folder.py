"""Read what open_clip_config.json says about the image tower beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from odcft.backbone.checkpoint_metadata import Metadata, from_preprocessor_config
from odcft.backbone.non_timm_networks import is_network
from odcft.backbone.transformers_schemas import Clip
from odcft.backbone.transformers_twins import FAMILIES
from odcft.errors import OdcftError
from odcft.text import short_repr

# Fields of "vision_cfg" that change what the tower computes, and what they are in timm's networks.
_USUAL = {
    "no_ln_pre": False,
    "attentional_pool": False,
    "input_patchnorm": False,
    "final_ln_after_pool": False,
    "ls_init_value": None,
    "pool_type": "tok",
    "pos_embed_type": "learnable",
}
_Count = Annotated[int, Field(ge=1, le=16384)]


class _Tower(BaseModel):
    """The sizes in "vision_cfg"; the defaults are open_clip's."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    layers: _Count = 12
    width: _Count = 768
    head_width: _Count = 64
    mlp_ratio: Annotated[float, Field(ge=0.25, le=16)] = 4
    patch_size: _Count = 16
    image_size: _Count = 224


def from_open_clip_config(where: Path, config: Mapping[str, Any]) -> Metadata:
    """Which network of timm's computes what an image tower of open_clip does, and the input it takes.

    Args:
        where: the file, for messages.
        config: what is in it.

    Raises:
        OdcftError: a field has a value that no tower has, or timm has no network for it.
    """
    model, shown = config.get("model_cfg"), config.get("preprocess_cfg")
    tower = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(tower, Mapping):
        raise OdcftError(f"{where} is damaged: it has no model_cfg with a vision_cfg. Copy or download it again.")
    shown = shown if isinstance(shown, Mapping) else {}
    metadata = from_preprocessor_config({f"image_{name}": shown[name] for name in ("mean", "std") if name in shown})
    metadata.from_open_clip = True
    name = tower.get("timm_model_name")
    if isinstance(name, str) and is_network(name):
        metadata.architecture = name
        return metadata
    if isinstance(tower.get("layers"), list):  # a ResNet, which its tensors tell in full
        return metadata
    for field, usual in _USUAL.items():
        if tower.get(field, usual) != usual:
            raise OdcftError(
                f"{where}: {field}={short_repr(tower[field])}, which timm's networks lack, so features would differ. "
                "Use another checkpoint."
            )
    try:
        sizes = _Tower.model_validate(dict(tower))
        checked = Clip(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=max(1, sizes.width // sizes.head_width),
            intermediate_size=int(sizes.width * sizes.mlp_ratio),
            patch_size=sizes.patch_size,
            image_size=sizes.image_size,
            hidden_act="quick_gelu" if model.get("quick_gelu") is True else "gelu",
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise OdcftError(
            f"{where}: {first['loc'][0]}: {short_repr(first['msg'], quotes=False)}. "
            "odcft reads the vision transformers and ResNets of open_clip."
        ) from None
    plan = FAMILIES["clip"][2](checked, where)
    assert plan is not None
    metadata.architecture, metadata.arguments, metadata.notes = plan.arch, plan.arguments, plan.notes
    return metadata
