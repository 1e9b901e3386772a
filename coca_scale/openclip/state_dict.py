"""Our parameter names and OpenCLIP's, one line per part of a model, each exactly reversible.

Fused matrices differ only in how rows are concatenated, so a round trip is bit-exact. What kind of
model it is shows in the names themselves, ours and theirs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model.weights import LOGIT_BIAS, LOGIT_SCALE

THEIR_LOGIT_SCALE = "logit_scale"
_SCALARS = {LOGIT_SCALE: THEIR_LOGIT_SCALE, LOGIT_BIAS: "logit_bias"}
_THEIR_SCALARS = {theirs: ours for ours, theirs in _SCALARS.items()}
# buffers of old transformers versions, and of TorchScript archives
_NOT_WEIGHTS = re.compile(
    r"(.+\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size)"
)
# OpenCLIP's CLIP class (no custom_text) has the parts of its text tower at the top
_FLAT_TEXT = re.compile(
    r"(token_embedding|positional_embedding|transformer|ln_final|text_projection)(\..+)?"
)
Side = Literal[0, 1]  # of a pair of names: OpenCLIP's, ours
Names = tuple[tuple[str, str], ...]


class Part(NamedTuple):
    """A module or parameter, under both names.

    Attributes:
        names: OpenCLIP's prefix and ours.
        inner: of what is inside, where it has other names; None where all have the same.
        attention: whether OpenCLIP has it as torch's module, of which the matrices are fused.
        repeated: whether a number follows.
        transposed: whether it is one matrix that is stored the other way round.
    """

    names: tuple[str, str]
    inner: Names | None = None
    attention: Literal["self", "cross"] | None = None
    repeated: bool = False
    transposed: bool = False


_BLOCK: Names = (
    ("ln_1", "norm1"),
    ("ln_1_kv", "norm_kv"),
    ("ln_2", "norm2"),
    ("attn.out_proj", "attn.out"),
    ("attn", "attn"),
    ("mlp.c_fc", "mlp.fc"),
    ("mlp.c_proj", "mlp.proj"),
)
_POOLER: Names = (
    ("query", "query"),
    ("ln_q", "norm_q"),
    ("ln_k", "norm_kv"),
    ("attn.out_proj", "attn.out"),
    ("attn", "attn"),
)
_IMAGE = [
    Part(("visual.conv1.weight", "image.patch_embedding.weight")),
    Part(("visual.class_embedding", "image.class_embedding")),
    Part(("visual.positional_embedding", "image.position_embedding")),
    Part(("visual.ln_pre", "image.norm_pre")),
    Part(("visual.proj", "image.projection")),
    Part(("visual.transformer.resblocks", "image.blocks"), _BLOCK, "self", repeated=True),
    # towers of other libraries keep the names they have there
    Part(("visual.trunk", "image.trunk")),
    Part(("visual.head", "image.head")),
]
_POOLING = [
    Part(("visual.ln_post", "image.norm_post")),
    Part(("visual.attn_pool", "image.pooler"), _POOLER, "cross"),
    Part(("visual.attn_pool_contrastive", "image.contrastive_pooler"), _POOLER, "cross"),
]
# a CoCa2 has what pools the tokens of a timm model outside of its tower
_TIMM_POOLING = [
    Part(("pool_norm", "image.norm_post")),
    Part(("attn_pool", "image.pooler"), _POOLER, "cross"),
    Part(("attn_pool_contrastive", "image.contrastive_pooler"), _POOLER, "cross"),
]
_TEXT = [
    Part(("text.token_embedding.weight", "text.token_embedding.weight")),
    Part(("text.positional_embedding", "text.position_embedding")),
    Part(("text.ln_final", "text.norm_final")),
    Part(("text.text_projection", "text.projection")),
]
_CLIP_TEXT = [
    Part(("text.cls_emb", "text.class_embedding")),
    Part(("text.transformer.resblocks", "text.blocks"), _BLOCK, "self", repeated=True),
    Part(("text.transformer.embeddings", "text.transformer.embeddings")),
    Part(("text.transformer.encoder", "text.transformer.encoder")),
    Part(("text.proj", "text.proj")),
]
_MODERN_TEXT = [Part(("text.blocks", "text.blocks"), repeated=True)]
_DECODER_NORM = Part(("text_decoder.ln_final", "decoder.norm_final"))
_DECODER = [
    _DECODER_NORM,
    Part(("text_decoder.resblocks", "decoder.blocks"), _BLOCK, "self", repeated=True),
    Part(("text_decoder.cross_attn", "decoder.cross_blocks"), _BLOCK, "cross", repeated=True),
    Part(("text_decoder.text_projection", "caption_head.weight"), transposed=True),
]
_MODERN_DECODER = [
    _DECODER_NORM,
    Part(("text_decoder.blocks", "decoder.blocks"), repeated=True),
    Part(("text_decoder.lm_head.weight", "caption_head.weight")),
]
_MAMMUT = [
    Part(("map_viz2txt_kv", "decoder.image_projection.weight"), transposed=True),
    Part(("text.resblocks", "text.blocks"), _BLOCK, "self", repeated=True),
    Part(("text.cross_attn", "decoder.cross_blocks"), _BLOCK, "cross", repeated=True),
    Part(("text.text_projection", "text.projection.weight"), transposed=True),
    Part(("text.lm_head", "caption_head.weight"), transposed=True),
    *_TEXT,
]
_MODERN_MAMMUT = [
    _MAMMUT[0],
    *_MODERN_TEXT,
    Part(("text.lm_head.weight", "caption_head.weight")),
    *_TEXT,
]


def to_openclip(ours: Mapping[str, Tensor], flat_text: bool = False) -> dict[str, Tensor]:
    """Our weights, logit scale included, under OpenCLIP's names and in its shapes.

    Args:
        ours: weights under our names.
        flat_text: name the text tower as OpenCLIP's CLIP class does, not its custom-text ones.
    """
    parts = _parts_of_ours(ours)
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        for their_name, their_tensor in _export_one(name, tensor, ours, parts):
            if flat_text:
                their_name = their_name.removeprefix("text.")
            theirs[their_name] = their_tensor.contiguous()
    return theirs


def from_openclip(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's weights under our names; views of the given tensors wherever they fit.

    Raises:
        UserError: a key that no model of ours has.
    """
    named = {
        f"text.{name}" if _FLAT_TEXT.fullmatch(name) else name: t for name, t in theirs.items()
    }
    if "map_viz2txt_kv" in named and "text.lm_head" not in named:
        _rename_laions_head(named)
    parts = _parts_of_theirs(named)
    ours: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        for our_name, our_tensor in _import_one(name, tensor, named, parts):
            ours[our_name] = our_tensor.contiguous()
    return ours


def _rename_laions_head(theirs: dict[str, Tensor]) -> None:
    """LAION's MaMMUT calls its head the projection, which it has none of."""
    head = theirs.pop("text.text_projection", None)
    if head is not None:
        theirs["text.lm_head"] = head


def _parts_of_ours(names: Collection[str]) -> list[Part]:
    return _parts(
        mammut="decoder.image_projection.weight" in names,
        modern_text=_any(names, r"text\.blocks\.\d+\.attn\.proj\..+"),
        modern_decoder=_any(names, r"decoder\.blocks\.\d+\.attn\.proj\..+"),
        timm_poolers=_any(names, r"image\.trunk\..+")
        and _any(names, r"image\.contrastive_pooler\..+"),
    )


def _parts_of_theirs(names: Collection[str]) -> list[Part]:
    return _parts(
        mammut="map_viz2txt_kv" in names,
        modern_text=_any(names, r"text\.blocks\..+"),
        modern_decoder=_any(names, r"text_decoder\.blocks\..+"),
        timm_poolers=_any(names, r"attn_pool\..+"),
    )


def _parts(mammut: bool, modern_text: bool, modern_decoder: bool, timm_poolers: bool) -> list[Part]:
    image = [*_IMAGE, *(_TIMM_POOLING if timm_poolers else _POOLING)]
    if mammut:
        return [*image, *(_MODERN_MAMMUT if modern_text else _MAMMUT)]
    text = [*_TEXT, *(_MODERN_TEXT if modern_text else _CLIP_TEXT)]
    return [*image, *text, *(_MODERN_DECODER if modern_decoder else _DECODER)]


def _any(names: Collection[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def _export_one(
    name: str, tensor: Tensor, ours: Mapping[str, Tensor], parts: list[Part]
) -> Iterator[tuple[str, Tensor]]:
    if name in _SCALARS:
        yield _SCALARS[name], tensor.reshape(())
        return
    part, prefix, inner = _located(name, 1, parts)
    attention = re.fullmatch(r"attn\.(qkv|q|kv)\.(weight|bias)", inner) if part.attention else None
    if attention is None:
        yield _translated(part, prefix, inner, 1), tensor.T if part.transposed else tensor
        return
    which, kind = attention.groups()
    target = f"{prefix}.attn"
    if which == "qkv":
        yield f"{target}.in_proj_{kind}", tensor
    elif which == "q":  # its kv goes with it
        own = name.removesuffix(f"q.{kind}")
        yield from _fused(target, kind, tensor, ours[f"{own}kv.{kind}"])


def _fused(target: str, kind: str, q: Tensor, kv: Tensor) -> Iterator[tuple[str, Tensor]]:
    """As torch's attention has them: one matrix, unless queries have another width than keys."""
    if kind == "bias" or q.shape[1] == kv.shape[1]:
        yield f"{target}.in_proj_{kind}", torch.cat([q, kv])
    else:
        for letter, matrix in zip("qkv", (q, *kv.chunk(2)), strict=True):
            yield f"{target}.{letter}_proj_weight", matrix


def _import_one(
    name: str, tensor: Tensor, theirs: Mapping[str, Tensor], parts: list[Part]
) -> Iterator[tuple[str, Tensor]]:
    if name in _THEIR_SCALARS:
        yield _THEIR_SCALARS[name], tensor.reshape(1)
        return
    part, prefix, inner = _located(name, 0, parts)
    if part.attention and (match := re.fullmatch(r"attn\.in_proj_(weight|bias)", inner)):
        if part.attention == "self":
            yield f"{prefix}.attn.qkv.{match[1]}", tensor
        else:
            third = tensor.shape[0] // 3
            yield f"{prefix}.attn.q.{match[1]}", tensor[:third]
            yield f"{prefix}.attn.kv.{match[1]}", tensor[third:]
    elif part.attention and inner == "attn.q_proj_weight":
        yield f"{prefix}.attn.q.weight", tensor
    elif part.attention and inner == "attn.k_proj_weight":
        value = theirs.get(name.replace("k_proj_weight", "v_proj_weight"))
        if value is None:
            raise UserError(f"{name} has no v_proj_weight beside it")
        yield f"{prefix}.attn.kv.weight", torch.cat([tensor, value])
    elif part.attention and inner == "attn.v_proj_weight":
        return  # goes with its k
    else:
        yield _translated(part, prefix, inner, 0), tensor.T if part.transposed else tensor


def _located(name: str, source: Side, parts: list[Part]) -> tuple[Part, str, str]:
    """The part that a weight belongs to, the part's name on the other side, and the rest.

    Raises:
        UserError: it belongs to none.
    """
    for part in parts:
        prefix, target = part.names[source], part.names[1 - source]
        if name == prefix and not part.repeated:
            return part, target, ""
        if not name.startswith(f"{prefix}."):
            continue
        rest = name[len(prefix) + 1 :]
        if not part.repeated:
            return part, target, rest
        if match := re.fullmatch(r"(\d+)\.(.+)", rest):
            return part, f"{target}.{match[1]}", match[2]
    raise UserError(f"weight {name!r} belongs to no model of this package")


def _translated(part: Part, prefix: str, inner: str, source: Side) -> str:
    """The whole name on the other side.

    Raises:
        UserError: the part has nothing of this name.
    """
    if part.inner is None or not inner:
        return f"{prefix}.{inner}" if inner else prefix
    for pair in part.inner:
        if inner == pair[source] or inner.startswith(pair[source] + "."):
            return f"{prefix}.{pair[1 - source]}{inner[len(pair[source]) :]}"
    raise UserError(f"weight ...{inner!r} belongs to no block of this package")
