"""AdamW parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from coca_scale.recipe.schema import OptimSection

NOT_DECAYED = ("class_embedding", "position_embedding", "pooler.query")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices only, and not to embedding vectors and positions."""
    return parameter.ndim >= 2 and not name.endswith(NOT_DECAYED)


def make_optimizer(model: nn.Module, optim: OptimSection, fused: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decayed and undecayed parameters in two groups."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return _adamw([g for g in groups if g["params"]], optim, fused)


def make_scale_optimizer(parameter: nn.Parameter, optim: OptimSection) -> torch.optim.AdamW:
    """The same AdamW for the replicated logit scale, without decay."""
    return _adamw([{"params": [parameter], "weight_decay": 0.0}], optim, fused=False)


def _adamw(groups: list[dict], optim: OptimSection, fused: bool) -> torch.optim.AdamW:
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused)
