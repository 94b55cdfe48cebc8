"""Give the tensors of Hugging Face's transformers the names of their twins in timm, and back.

Each family has one table of pairs: a part of a name in transformers, and the same part in timm. `to_timm` and
`to_transformers` both apply it from top to bottom. In a part, `^` is the start of the name, `$` its end, `#` a number
and `@` a number that is one more in timm than in transformers. Query, key and value are `attn.q.`, `attn.k.` and
`attn.v.` in the tables, and are put together afterwards the way timm holds them.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

Table = tuple[tuple[str, str], ...]

_QKV: Table = (
    (".attention.attention.query.", ".attn.q."),
    (".attention.attention.key.", ".attn.k."),
    (".attention.attention.value.", ".attn.v."),
    (".attention.output.dense.", ".attn.proj."),
)
_LAYER: Table = (
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
_EMBEDDINGS: Table = (
    ("^embeddings.cls_token$", "^cls_token$"),
    ("^embeddings.distillation_token$", "^dist_token$"),
    ("^embeddings.position_embeddings$", "^pos_embed$"),
    ("^embeddings.register_tokens$", "^reg_token$"),
)
_ENCODER: Table = (
    *_EMBEDDINGS,
    ("^embeddings.patch_embeddings.projection.", "^patch_embed.proj."),
    ("^encoder.layer.#.", "^blocks.#."),
    *_QKV,
    ("^layernorm.", "^norm."),
)
_VIT: Table = (*_ENCODER, *_LAYER)
_BEIT: Table = (
    *_VIT,
    (
        ".attention.attention.relative_position_bias.relative_position_bias_table$",
        ".attn.relative_position_bias_table$",
    ),
    (".lambda_#$", ".gamma_#$"),
    ("^pooler.layernorm.", "^fc_norm."),
    ("^encoder.relative_position_bias.", "^rel_pos_bias."),
)
_DINOV2: Table = (*_ENCODER, (".layer_scale#.lambda1$", ".ls#.gamma$"))
_DINOV2_SWIGLU: Table = (*_DINOV2, (".mlp.weights_in.", ".mlp.fc1."), (".mlp.weights_out.", ".mlp.fc2."))
_DINOV3: Table = (
    *_EMBEDDINGS,
    ("^embeddings.patch_embeddings.", "^patch_embed.proj."),
    ("^layer.#.", "^blocks.#."),
    (".layer_scale#.lambda1$", ".gamma_#$"),
    (".attention.q_proj.", ".attn.q."),
    (".attention.k_proj.", ".attn.k."),
    (".attention.v_proj.", ".attn.v."),
    (".attention.o_proj.", ".attn.proj."),
    (".mlp.down_proj.", ".mlp.fc2."),
)
_CLIP: Table = (
    ("^embeddings.class_embedding$", "^cls_token$"),
    ("^embeddings.position_embedding.weight$", "^pos_embed$"),
    ("^embeddings.patch_embedding.", "^patch_embed.proj."),
    ("^encoder.layers.#.", "^blocks.#."),
    (".self_attn.q_proj.", ".attn.q."),
    (".self_attn.k_proj.", ".attn.k."),
    (".self_attn.v_proj.", ".attn.v."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".layer_norm#.", ".norm#."),
    ("^pre_layrnorm.", "^norm_pre."),
    ("^post_layernorm.", "^norm."),
    ("^head.probe$", "^attn_pool.latent$"),
    ("^head.attention.in_proj_weight$", "^attn_pool.in_proj.weight$"),
    ("^head.attention.in_proj_bias$", "^attn_pool.in_proj.bias$"),
    ("^head.attention.out_proj.", "^attn_pool.proj."),
    ("^head.layernorm.", "^attn_pool.norm."),
    ("^head.mlp.", "^attn_pool.mlp."),
)
_SWIN: Table = (
    ("^embeddings.patch_embeddings.projection.", "^patch_embed.proj."),
    ("^embeddings.norm.", "^patch_embed.norm."),
    # timm downsamples at the start of a layer, not at the end of the one before.
    ("^encoder.layers.#.downsample.", "^layers.@.downsample."),
    ("^encoder.layers.#.", "^layers.#."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.self.query.", ".attn.q."),
    (".attention.self.key.", ".attn.k."),
    (".attention.self.value.", ".attn.v."),
    (".attention.self.continuous_position_bias_mlp.", ".attn.cpb_mlp."),
    (".attention.self.", ".attn."),
    ("^layernorm.", "^norm."),
    *_LAYER,
)
_CONVNEXT: Table = (
    ("^embeddings.patch_embeddings.", "^stem.0."),
    ("^embeddings.layernorm.", "^stem.1."),
    ("^encoder.stages.#.downsampling_layer.", "^stages.#.downsample."),
    ("^encoder.stages.#.layers.#.", "^stages.#.blocks.#."),
    ("^layernorm.", "^head.norm."),
    (".dwconv.", ".conv_dw."),
    (".pwconv#.", ".mlp.fc#."),
    (".grn.", ".mlp.grn."),
    (".layer_scale_parameter$", ".gamma$"),
    (".layernorm.", ".norm."),
)
_DINOV3_CONVNEXT: Table = (
    ("^stages.0.downsample_layers.", "^stem."),
    ("^stages.#.downsample_layers.", "^stages.#.downsample."),
    ("^stages.#.layers.#.", "^stages.#.blocks.#."),
    ("^layer_norm.", "^head.norm."),
    (".depthwise_conv.", ".conv_dw."),
    (".pointwise_conv#.", ".mlp.fc#."),
    (".layer_norm.", ".norm."),
)
_REGNET: Table = (
    ("^embedder.embedder.", "^stem."),
    ("^encoder.stages.#.layers.#.shortcut.", "^s@.b@.downsample."),
    ("^encoder.stages.#.layers.#.layer.#.", "^s@.b@.conv@."),
    (".convolution.", ".conv."),
    (".normalization.", ".bn."),
)
_REGNET_Y: Table = (  # squeeze and excitation is number 2 of 4
    ("^encoder.stages.#.layers.#.layer.2.attention.0.", "^s@.b@.se.fc1."),
    ("^encoder.stages.#.layers.#.layer.2.attention.2.", "^s@.b@.se.fc2."),
    ("^encoder.stages.#.layers.#.layer.3.", "^s@.b@.conv3."),
    *_REGNET,
)
_MOBILEVIT: Table = (
    ("^conv_stem.", "^stem."),
    ("^conv_1x1_exp.", "^final_conv."),
    ("^encoder.layer.0.layer.#.", "^stages.0.#."),
    ("^encoder.layer.1.layer.#.", "^stages.1.#."),
    ("^encoder.layer.#.downsampling_layer.", "^stages.#.0."),
    ("^encoder.layer.#.", "^stages.#.1."),
    (".expand_1x1.", ".conv1_1x1."),
    (".conv_3x3.", ".conv2_kxk."),
    (".reduce_1x1.", ".conv3_1x1."),
    (".conv_1x1.convolution.", ".conv_1x1."),
    (".conv_projection.", ".conv_proj."),
    (".fusion.", ".conv_fusion."),
    (".transformer.layer.#.", ".transformer.#."),
    *_QKV,
    *_LAYER,
    (".layernorm.", ".norm."),
    (".convolution.", ".conv."),
    (".normalization.", ".bn."),
)
_RESNET: Table = (
    ("^embedder.embedder.convolution.", "^conv1."),
    ("^embedder.embedder.normalization.", "^bn1."),
    ("^encoder.stages.#.layers.#.layer.#.convolution.", "^layer@.#.conv@."),
    ("^encoder.stages.#.layers.#.layer.#.normalization.", "^layer@.#.bn@."),
    ("^encoder.stages.#.layers.#.shortcut.convolution.", "^layer@.#.downsample.0."),
    ("^encoder.stages.#.layers.#.shortcut.normalization.", "^layer@.#.downsample.1."),
)
TABLES: dict[str, Table] = {
    "vit": _VIT,
    "beit": _BEIT,
    "dinov2": _DINOV2,
    "dinov2 swiglu": _DINOV2_SWIGLU,
    "dinov3": (*_DINOV3, (".mlp.up_proj.", ".mlp.fc1.")),
    "dinov3 gated": (*_DINOV3, (".mlp.gate_proj.", ".mlp.fc1_g."), (".mlp.up_proj.", ".mlp.fc1_x.")),
    "clip": _CLIP,
    "swin": _SWIN,
    "convnext": _CONVNEXT,
    "dinov3 convnext": _DINOV3_CONVNEXT,
    "regnet x": _REGNET,
    "regnet y": _REGNET_Y,
    "mobilevit": _MOBILEVIT,
    "resnet": _RESNET,
}
# The wrapper around DINOv3's layers, which is in the names of a model in memory, but not in its files.
_WRAPPER = re.compile(r"^model\.(?=(?:layer|stages)\.)")


def renamed(name: str, table: str) -> str:
    """A tensor's name in timm, from its name in transformers; a name that no line of the table fits stays."""
    return _apply(_WRAPPER.sub("", name), _compiled(table, back=False))


def _apply(name: str, replacements: tuple[tuple[re.Pattern, Callable[[re.Match], str]], ...]) -> str:
    for pattern, replacement in replacements:
        name = pattern.sub(replacement, name)
    return name


@cache
def _compiled(table: str, back: bool) -> tuple[tuple[re.Pattern, Callable[[re.Match], str]], ...]:
    """What to replace in a name, and by what; `back` is from timm's names to those of transformers."""
    pairs = [(ours, theirs) if back else (theirs, ours) for theirs, ours in TABLES[table]]
    return tuple((_pattern(old), _replacement(old, new)) for old, new in pairs)


def _pattern(part: str) -> re.Pattern:
    exact = re.sub(r"[#@]", r"(\\d+)", re.escape(part).replace(r"\#", "#"))
    return re.compile(exact.replace(r"\^", "^").replace(r"\$", "$"))


def _replacement(old: str, new: str) -> Callable[[re.Match], str]:
    """What writes the numbers of a match into `new`, one more or one less where only one of both has `@`."""
    changes = [(sign == "@") - (was == "@") for was, sign in zip(_numbers(old), _numbers(new), strict=True)]
    pieces = re.split(r"[#@]", new.strip("^$"))

    def write(match: re.Match) -> str:
        numbers = [str(int(number) + change) for number, change in zip(match.groups(), changes, strict=True)]
        return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))

    return write


def _numbers(part: str) -> list[str]:
    return re.findall(r"[#@]", part)


def to_timm(tensors: Mapping[str, Tensor], table: str, separate_biases: bool = False) -> dict[str, Tensor]:
    """A backbone's tensors under timm's names.

    Args:
        tensors: by transformers' names, without a prefix.
        table: a key of TABLES.
        separate_biases: timm holds the biases of query and value as `q_bias` and `v_bias` (BEiT, DINOv3, SwinV2).

    Returns:
        By timm's names; those that no line of the table fits keep their own.
    """
    named = {renamed(name, table): tensor for name, tensor in tensors.items()}
    if table == "convnext":
        named = {name: tensor.flatten() if ".grn." in name else tensor for name, tensor in named.items()}
    if table == "clip":
        named = _split_attention_pool(_with_batch_axis(named))
    return _merged(named, separate_biases)


def to_transformers(tensors: Mapping[str, Tensor], table: str, class_position: bool = False) -> dict[str, Tensor]:
    """The inverse of `to_timm`: a backbone's tensors under transformers' names, each with memory of its own.

    Args:
        tensors: by timm's names.
        table: a key of TABLES.
        class_position: the inverse of `add_class_position`: give the class token a position embedding of zeros.
    """
    named = dict(tensors)
    if class_position and "pos_embed" in named:
        embedding = named["pos_embed"]
        named["pos_embed"] = torch.cat([torch.zeros_like(embedding[:, :1]), embedding], dim=1)
    named = _split(named)
    if table in ("convnext", "dinov3 convnext"):
        named = {name: _as_linear(name, tensor) for name, tensor in named.items()}
    if table == "clip":
        named = _join_attention_pool(_without_batch_axis(named))
    table_back = _compiled(table, back=True)
    return {_apply(name, table_back): tensor.clone().contiguous() for name, tensor in named.items()}


def _with_batch_axis(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's class token and position embedding, which have no axis for the batch."""
    for name, axes in (("cls_token", 3), ("pos_embed", 3)):
        if name in named:
            while 0 < named[name].ndim < axes:
                named[name] = named[name].unsqueeze(0)
    return named


def _without_batch_axis(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_with_batch_axis`."""
    for name, axes in (("cls_token", 1), ("pos_embed", 2)):
        if name in named:
            while named[name].ndim > axes and len(named[name]) == 1:
                named[name] = named[name][0]
    return named


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """ConvNeXt's MLP: convolutions of 1 x 1 in some of timm's; and its norm over responses, which has four axes."""
    if ".grn." in name:
        return tensor.view(1, 1, 1, -1)
    return tensor.flatten(1) if re.search(r"\.mlp\.fc\d\.weight$", name) else tensor


def _split_attention_pool(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's pooling: timm keeps the query apart from key and value."""
    for leaf in ("weight", "bias"):
        joint = named.pop(f"attn_pool.in_proj.{leaf}", None)
        if joint is not None and joint.ndim:
            third = len(joint) // 3
            named[f"attn_pool.q.{leaf}"], named[f"attn_pool.kv.{leaf}"] = joint[:third], joint[third:]
    return named


def _join_attention_pool(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split_attention_pool`."""
    for leaf in ("weight", "bias"):
        parts = [named.pop(f"attn_pool.{part}.{leaf}", None) for part in ("q", "kv")]
        if parts[0] is not None and parts[1] is not None:
            named[f"attn_pool.in_proj.{leaf}"] = torch.cat([part for part in parts if part is not None])
    return named


def _split(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_merged`: query, key and value apart."""
    split: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if found := re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", name):
            split |= {f"{found[1]}{part}.{found[2]}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[re.sub(r"\.attn\.([qv])_bias$", r".attn.\1.bias", name)] = tensor
    return split


def _merged(named: dict[str, Tensor], separate_biases: bool) -> dict[str, Tensor]:
    """Put query, key and value together; parts that do not fit together keep their names."""
    merged = dict(named)
    for name in named:
        if not (found := re.fullmatch(r"(.*\.attn\.)q\.(weight|bias)", name)):
            continue
        start, leaf = found.groups()
        names = [f"{start}{part}.{leaf}" for part in "qkv"]
        if leaf == "bias" and separate_biases:
            for part in "qv":
                if f"{start}{part}.bias" in merged:
                    merged[f"{start}{part}_bias"] = merged.pop(f"{start}{part}.bias")
            # These networks have no bias of the key; where a file has one, it must say nothing.
            if names[1] in merged and not merged[names[1]].any():
                del merged[names[1]]
        elif all(one in named and named[one].ndim and named[one].shape[1:] == named[name].shape[1:] for one in names):
            merged[f"{start}qkv.{leaf}"] = torch.cat([merged.pop(one) for one in names])
    return merged


def add_class_position(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """With registers, timm adds the class token's position embedding to the token itself."""
    token, embedding = named.get("cls_token"), named.get("pos_embed")
    if token is None or embedding is None or embedding.ndim != 3 or token.shape != embedding[:, :1].shape:
        return named
    return {**named, "cls_token": token + embedding[:, :1], "pos_embed": embedding[:, 1:]}
