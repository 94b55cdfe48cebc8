"""Give the tensors of Hugging Face's transformers the names of their twins in timm.

Each family has a table of regular expressions, applied in order to every name. Query, key and value become `attn.q.`,
`attn.k.` and `attn.v.` there, and are put together afterwards the way timm holds them.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Table = tuple[tuple[str, str], ...]

_VIT: Table = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^(?:model\.)?(?:encoder\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.query\.", ".attn.q."),
    (r"\.attention\.attention\.key\.", ".attn.k."),
    (r"\.attention\.attention\.value\.", ".attn.v."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_BEIT: Table = (
    *_VIT,
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
)
_DINOV3: Table = (
    *_VIT,
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
_DINOV3_PLAIN: Table = (*_DINOV3, (r"\.mlp\.up_proj\.", ".mlp.fc1."))
_DINOV3_GATED: Table = (*_DINOV3, (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.", ".mlp.fc1_x."))
_CLIP: Table = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_SWIN: Table = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.key\.", ".attn.k."),
    (r"\.attention\.self\.value\.", ".attn.v."),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
_CONVNEXT: Table = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.", "stages."),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"^(?:model\.)?stages\.0\.downsample_layers\.", "stem."),  # DINOv3's
    (r"^(?:model\.)?stages\.(\d+)\.downsample_layers\.", r"stages.\1.downsample."),
    (r"^model\.stages\.", "stages."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.(?:dwconv|depthwise_conv)\.", ".conv_dw."),
    (r"\.(?:pwconv|pointwise_conv)(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"(\.blocks\.\d+)\.(?:layernorm|layer_norm)\.", r"\1.norm."),
    (r"^(?:layernorm|layer_norm)\.", "head.norm."),
)
_REGNET: Table = (
    (r"^embedder\.embedder\.convolution\.", "stem.conv."),
    (r"^embedder\.embedder\.normalization\.", "stem.bn."),
    (r"\.attention\.0\.", ".se.fc1."),
    (r"\.attention\.2\.", ".se.fc2."),
    (r"\.shortcut\.convolution\.", ".downsample.conv."),
    (r"\.shortcut\.normalization\.", ".downsample.bn."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
)
_MOBILEVIT: Table = (
    (r"^conv_stem\.", "stem."),
    (r"^conv_1x1_exp\.", "final_conv."),
    (r"^encoder\.layer\.(\d+)\.layer\.(\d+)\.", r"stages.\1.\2."),
    (r"^encoder\.layer\.(\d+)\.downsampling_layer\.", r"stages.\1.0."),
    (r"^encoder\.layer\.(\d+)\.", r"stages.\1.1."),
    (r"\.expand_1x1\.", ".conv1_1x1."),
    (r"\.conv_3x3\.", ".conv2_kxk."),
    (r"\.reduce_1x1\.", ".conv3_1x1."),
    (r"\.conv_1x1\.convolution\.", ".conv_1x1."),
    (r"\.conv_projection\.", ".conv_proj."),
    (r"\.fusion\.", ".conv_fusion."),
    (r"\.transformer\.layer\.(\d+)\.", r".transformer.\1."),
    (r"\.attention\.attention\.query\.", ".attn.q."),
    (r"\.attention\.attention\.key\.", ".attn.k."),
    (r"\.attention\.attention\.value\.", ".attn.v."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layernorm\.", ".norm."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
)
TABLES: dict[str, Table] = {
    "vit": _VIT,
    "beit": _BEIT,
    "dinov3": _DINOV3_PLAIN,
    "dinov3 gated": _DINOV3_GATED,
    "clip": _CLIP,
    "swin": _SWIN,
    "convnext": _CONVNEXT,
    "regnet": _REGNET,
    "mobilevit": _MOBILEVIT,
}


def rename(tensors: Mapping[str, Tensor], table: str, separate_biases: bool = False) -> dict[str, Tensor]:
    """A backbone's tensors under timm's names.

    Args:
        tensors: by transformers' names, without a prefix.
        table: a key of TABLES.
        separate_biases: timm holds the biases of query and value as `q_bias` and `v_bias` (BEiT, DINOv3, SwinV2).

    Returns:
        By timm's names; those that no line of the table fits keep their own.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        named[_renamed(name, TABLES[table])] = tensor
    if table == "regnet":
        named = {_renamed_regnet_block(name): tensor for name, tensor in named.items()}
    if table == "swin":  # timm downsamples at the start of a layer, not at the end of the one before
        named = {
            re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name): tensor
            for name, tensor in named.items()
        }
    if table == "convnext":
        named = {name: tensor.flatten() if ".grn." in name else tensor for name, tensor in named.items()}
    if table == "clip":
        named = _split_attention_pool(_with_batch_axis(named))
    return _merged(named, separate_biases)


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _renamed_regnet_block(name: str) -> str:
    """RegNet's layers: the one of squeeze and excitation, if there is one, is number 2 of 4."""
    name = re.sub(r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: f"s{int(m[1]) + 1}.b{int(m[2]) + 1}.", name)
    name = re.sub(r"\.layer\.2\.se\.", ".se.", name)
    return re.sub(r"\.layer\.(\d)\.(conv|bn)\.", lambda m: f".conv{min(int(m[1]), 2) + 1}.{m[2]}.", name)


def _with_batch_axis(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's class token and position embedding, which have no axis for the batch."""
    for name, axes in (("cls_token", 3), ("pos_embed", 3)):
        if name in named:
            while 0 < named[name].ndim < axes:
                named[name] = named[name].unsqueeze(0)
    return named


def _split_attention_pool(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's pooling: timm keeps the query apart from key and value."""
    for leaf in ("weight", "bias"):
        joint = named.pop(f"attn_pool.in_proj.{leaf}", None)
        if joint is not None and joint.ndim:
            third = len(joint) // 3
            named[f"attn_pool.q.{leaf}"], named[f"attn_pool.kv.{leaf}"] = joint[:third], joint[third:]
    return named


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
