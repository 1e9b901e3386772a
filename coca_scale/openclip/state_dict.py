"""Our parameter names and OpenCLIP's, one rule per line, each exactly reversible.

Fused matrices differ only in how rows are concatenated, so a round trip is bit-exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

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

# (OpenCLIP, ours); applied to the text between dots, longest prefixes first
_RULES: list[tuple[str, str]] = [
    ("visual.conv1.weight", "image.patch_embedding.weight"),
    ("visual.class_embedding", "image.class_embedding"),
    ("visual.positional_embedding", "image.position_embedding"),
    ("visual.ln_pre", "image.norm_pre"),
    ("visual.ln_post", "image.norm_post"),
    ("visual.proj", "image.projection"),
    ("visual.attn_pool.query", "image.pooler.query"),
    ("visual.attn_pool.ln_q", "image.pooler.norm_q"),
    ("visual.attn_pool.ln_k", "image.pooler.norm_kv"),
    ("visual.attn_pool.attn.out_proj", "image.pooler.attn.out"),
    ("text.token_embedding.weight", "text.token_embedding.weight"),
    ("text.cls_emb", "text.class_embedding"),
    ("text.positional_embedding", "text.position_embedding"),
    ("text.ln_final", "text.norm_final"),
    ("text.text_projection", "text.projection"),
    ("text_decoder.ln_final", "decoder.norm_final"),
]
# towers of other libraries keep the names they have there
_FOREIGN = [
    ("visual.trunk", "image.trunk"),
    ("visual.head", "image.head"),
    ("text.transformer.embeddings", "text.transformer.embeddings"),
    ("text.transformer.encoder", "text.transformer.encoder"),
    ("text.proj", "text.proj"),
]
# OpenCLIP's CLIP class (no custom_text) has the parts of its text tower at the top
_FLAT_TEXT = re.compile(
    r"(token_embedding|positional_embedding|transformer|ln_final|text_projection)(\..+)?"
)
_TOWERS = [
    ("visual.transformer.resblocks", "image.blocks"),
    ("text.transformer.resblocks", "text.blocks"),
    ("text_decoder.resblocks", "decoder.blocks"),
    ("text_decoder.cross_attn", "decoder.cross_blocks"),
]
_BLOCK = [
    ("ln_1", "norm1"),
    ("ln_1_kv", "norm_kv"),
    ("ln_2", "norm2"),
    ("attn.out_proj", "attn.out"),
    ("mlp.c_fc", "mlp.fc"),
    ("mlp.c_proj", "mlp.proj"),
]


def to_openclip(ours: Mapping[str, Tensor], flat_text: bool = False) -> dict[str, Tensor]:
    """Our weights, logit scale included, under OpenCLIP's names and in its shapes.

    Args:
        ours: weights under our names.
        flat_text: name the text tower as OpenCLIP's CLIP class does, not its custom-text ones.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        for their_name, their_tensor in _export_one(name, tensor, ours):
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
    ours: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        for our_name, our_tensor in _import_one(name, tensor, named):
            ours[our_name] = our_tensor.contiguous()
    return ours


def _export_one(
    name: str, tensor: Tensor, ours: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    if foreign := _rename_prefix(name, 1, _FOREIGN):
        yield foreign, tensor
    elif name in _SCALARS:
        yield _SCALARS[name], tensor.reshape(())
    elif name == "caption_head.weight":
        yield "text_decoder.text_projection", tensor.T
    elif match := re.fullmatch(r"(.+\.attn)\.qkv\.(weight|bias)", name):
        yield f"{_rename(match[1], 1)}.in_proj_{match[2]}", tensor
    elif match := re.fullmatch(r"(.+\.attn)\.q\.(weight|bias)", name):
        yield from _export_cross(match[1], match[2], ours)
    elif re.fullmatch(r".+\.attn\.kv\.(weight|bias)", name):
        return  # goes with its q
    else:
        yield _rename(name, 1), tensor


def _export_cross(
    prefix: str, kind: str, ours: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    q, kv = ours[f"{prefix}.q.{kind}"], ours[f"{prefix}.kv.{kind}"]
    target = _rename(prefix, 1)
    if kind == "bias" or q.shape[1] == kv.shape[1]:
        yield f"{target}.in_proj_{kind}", torch.cat([q, kv])
    else:
        for part, matrix in zip("qkv", (q, *kv.chunk(2)), strict=True):
            yield f"{target}.{part}_proj_weight", matrix


def _import_one(
    name: str, tensor: Tensor, theirs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    if foreign := _rename_prefix(name, 0, _FOREIGN):
        yield foreign, tensor
    elif name in _THEIR_SCALARS:
        yield _THEIR_SCALARS[name], tensor.reshape(1)
    elif name == "text_decoder.text_projection":
        yield "caption_head.weight", tensor.T
    elif match := re.fullmatch(r"(.+\.attn)\.in_proj_(weight|bias)", name):
        prefix, kind = _rename(match[1], 0), match[2]
        if prefix.startswith(("image.pooler", "decoder.cross_blocks")):
            third = tensor.shape[0] // 3
            yield f"{prefix}.q.{kind}", tensor[:third]
            yield f"{prefix}.kv.{kind}", tensor[third:]
        else:
            yield f"{prefix}.qkv.{kind}", tensor
    elif match := re.fullmatch(r"(.+\.attn)\.q_proj_weight", name):
        yield f"{_rename(match[1], 0)}.q.weight", tensor
    elif match := re.fullmatch(r"(.+\.attn)\.k_proj_weight", name):
        value = theirs.get(f"{match[1]}.v_proj_weight")
        if value is None:
            raise UserError(f"{name} has no v_proj_weight beside it")
        key_value = torch.cat([tensor, value])
        yield f"{_rename(match[1], 0)}.kv.weight", key_value
    elif name.endswith(".attn.v_proj_weight"):
        return  # goes with its k
    else:
        yield _rename(name, 0), tensor


def _rename(name: str, source: int) -> str:
    """Translate one name; `source` is 0 from OpenCLIP, 1 to OpenCLIP."""
    if found := _rename_prefix(name, source, _RULES):
        return found
    for tower in _TOWERS:
        match = re.fullmatch(re.escape(tower[source]) + r"\.(\d+)\.(.+)", name)
        if match:
            return f"{tower[1 - source]}.{match[1]}.{_rename_in_block(match[2], source)}"
    for pooler in [("visual.attn_pool.attn", "image.pooler.attn")]:
        if name == pooler[source]:
            return pooler[1 - source]
    raise UserError(f"weight {name!r} belongs to no model of this package")


def _rename_prefix(name: str, source: int, rules: list[tuple[str, str]]) -> str | None:
    for rule in rules:
        if name == rule[source] or name.startswith(rule[source] + "."):
            return rule[1 - source] + name[len(rule[source]) :]
    return None


def _rename_in_block(name: str, source: int) -> str:
    if name == "attn":
        return name
    for rule in _BLOCK:
        if name.startswith(rule[source] + "."):
            return rule[1 - source] + name[len(rule[source]) :]
    raise UserError(f"weight ...{name!r} belongs to no block of this package")
