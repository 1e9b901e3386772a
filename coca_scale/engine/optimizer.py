"""The optimizer: what it is, what it keeps, and its parameter groups.

Another one is made in `_make`, and says its state in `MOMENTS`: from that follow the memory that is
planned, and what a checkpoint carries into a run of another layout.
"""

from __future__ import annotations

import torch
from torch import nn

from coca_scale.model import CoCa
from coca_scale.model.freeze import layer_scales
from coca_scale.recipe.schema import OptimSection

LABEL = "AdamW"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of every weight, in fp32, as the optimizer's state names them
NOT_DECAYED = (
    *("class_embedding", "position_embedding", "pooler.query"),
    *("cls_token", "reg_token", "pos_embed"),  # timm
    *("position_embeddings.weight", "token_type_embeddings.weight"),  # transformers
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices only, and not to embedding vectors and positions."""
    return parameter.ndim >= 2 and not name.endswith(NOT_DECAYED)


def make_optimizer(model: CoCa, optim: OptimSection) -> tuple[torch.optim.Optimizer, list[float]]:
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
    return _make(listed, optim), [scale for scale, _ in ordered]


def make_scale_optimizer(parameter: nn.Parameter, optim: OptimSection) -> torch.optim.Optimizer:
    """The same one for the replicated logit scale, without decay."""
    return _make([{"params": [parameter], "weight_decay": 0.0}], optim)


def _make(groups: list[dict], optim: OptimSection) -> torch.optim.Optimizer:
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
