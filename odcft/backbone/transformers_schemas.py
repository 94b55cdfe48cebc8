"""What odcft reads of the config.json of a folder of Hugging Face's transformers, family by family.

The defaults are those of transformers: an older config.json leaves out what is as usual. Fields without a default must
be there.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Size = Annotated[int, Field(ge=8, le=4096)]
_Side = _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Patch = Annotated[int, Field(ge=1, le=64)]
_PatchSide = _Patch | Annotated[list[_Patch], Field(min_length=2, max_length=2)]
_Width = Annotated[int, Field(ge=1, le=16384)]
_Count = Annotated[int, Field(ge=1, le=128)]
_Epsilon = Annotated[float, Field(gt=0, le=1)]
_Stages = Annotated[list[_Count], Field(min_length=1, max_length=8)]
_Widths = Annotated[list[_Width], Field(min_length=1, max_length=8)]


class Config(BaseModel):
    """What odcft reads of a config.json: of the right type, and bounded. Other fields do not matter."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    num_channels: Annotated[int, Field(ge=1, le=16)] = 3
    hidden_act: str = "gelu"


class Vit(Config):
    hidden_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Count
    intermediate_size: _Width = 0
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4
    image_size: _Side = 224
    patch_size: _PatchSide = 16
    layer_norm_eps: _Epsilon = 1e-12
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: Annotated[int, Field(ge=0, le=64)] = 0


class Dinov2(Vit):
    layer_norm_eps: _Epsilon = 1e-6
    patch_size: _PatchSide = 14


class Dinov3(Vit):
    layer_norm_eps: _Epsilon = 1e-5
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    rope_theta: float = 100.0
    rope_parameters: dict[str, Any] = {}
    use_gated_mlp: bool = False


class Beit(Vit):
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    use_mean_pooling: bool = True
    layer_scale_init_value: Annotated[float, Field(ge=0, le=1)] = 0.1


class Clip(Vit):  # the sizes that an older config.json of CLIP leaves out
    hidden_size: _Width = 768
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 12
    intermediate_size: _Width = 3072
    patch_size: _PatchSide = 32
    layer_norm_eps: _Epsilon = 1e-5
    hidden_act: str = "quick_gelu"


class Siglip(Clip):
    patch_size: _PatchSide = 16
    layer_norm_eps: _Epsilon = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    vision_use_head: bool = True


class Swin(Config):
    embed_dim: _Width
    depths: _Stages
    num_heads: _Stages
    window_size: Annotated[int, Field(ge=1, le=64)] = 7
    image_size: _Side = 224
    patch_size: _PatchSide = 4
    mlp_ratio: Annotated[float, Field(ge=0.25, le=16)] = 4
    qkv_bias: bool = True
    layer_norm_eps: _Epsilon = 1e-5
    use_absolute_embeddings: bool = False
    pretrained_window_sizes: Annotated[list[Annotated[int, Field(ge=0, le=64)]], Field(max_length=8)] = []


class Convnext(Config):
    hidden_sizes: _Widths
    depths: _Stages
    patch_size: _PatchSide = 4
    layer_norm_eps: _Epsilon = 1e-12
    layer_scale_init_value: Annotated[float, Field(ge=0, le=1)] = 1e-6


class Dinov3Convnext(Convnext):
    layer_norm_eps: _Epsilon = 1e-6


class Regnet(Config):
    hidden_act: str = "relu"
    hidden_sizes: _Widths
    depths: _Stages
    embedding_size: _Width = 32
    groups_width: _Width = 64
    layer_type: Literal["x", "y"] = "y"
    downsample_in_first_stage: bool = True


class Mobilevit(Config):
    hidden_act: str = "silu"
    hidden_sizes: _Widths
    neck_hidden_sizes: _Widths
    num_attention_heads: _Count = 4
    conv_kernel_size: int = 3
    output_stride: int = 32
    patch_size: _PatchSide = 2
    qkv_bias: bool = True
    layer_norm_eps: _Epsilon = 1e-5


class Resnet(Config):
    hidden_act: str = "relu"
    downsample_in_bottleneck: bool = False
