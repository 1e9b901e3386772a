"""AdamW parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from coca_scale.model import CoCa
from coca_scale.model.freeze import layer_scales
from coca_scale.recipe.schema import OptimSection

NOT_DECAYED = (
    *("class_embedding", "position_embedding", "pooler.query"),
    *("cls_token", "reg_token", "pos_embed"),  # timm
    *("position_embeddings.weight", "token_type_embeddings.weight"),  # transformers
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices only, and not to embedding vectors and positions."""
    return parameter.ndim >= 2 and not name.endswith(NOT_DECAYED)


def make_optimizer(model: CoCa, optim: OptimSection) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW (Loshchilov & Hutter 2019) over the parameters that train.

    Returns:
        The optimizer, and for each of its groups the factor on the learning rate. A group is what
        shares this factor and whether it is decayed.
    """
    scales = layer_scales(model, optim.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (scales.get(parameter, 1.0), decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups, reverse=True)
    listed = [
        {"params": groups[key], "weight_decay": optim.weight_decay * key[1]} for key in ordered
    ]
    return _adamw(listed, optim), [scale for scale, _ in ordered]


def make_scale_optimizer(parameter: nn.Parameter, optim: OptimSection) -> torch.optim.AdamW:
    """The same AdamW for the replicated logit scale, without decay."""
    return _adamw([{"params": [parameter], "weight_decay": 0.0}], optim)


def _adamw(groups: list[dict], optim: OptimSection) -> torch.optim.AdamW:
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
