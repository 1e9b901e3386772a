"""The optimizer: what it is, what it keeps, and its parameter groups.

Another one is an `OptimizerKind` in `KINDS`. From what it says follow the memory that is
planned, what a checkpoint carries into a run of another layout, and what the model card calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coca_scale.losses import LABELS, OF_FEATURES
from coca_scale.model import CoCa, LogitScale
from coca_scale.model.freeze import Kind, layer_scales, pausing
from coca_scale.recipe.optim_section import OptimSection
from coca_scale.recipe.schema import LossSection

Groups = list[dict[str, Any]]
NOT_DECAYED = (
    *("class_embedding", "position_embedding", "pooler.query"),
    *("cls_token", "reg_token", "pos_embed"),  # timm
    *("position_embeddings.weight", "token_type_embeddings.weight"),  # transformers
)


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that works element by element, as ZeRO hands it flat shards.

    Attributes:
        name: in checkpoints, which another kind cannot take over.
        label: as people call it.
        moments: what it keeps of every weight in fp32, by the names in its state.
        make: from parameter groups and the recipe. Its `step` heeds `found_inf`, as those of torch
            do that are fused.
    """

    name: str
    label: str
    moments: tuple[str, ...]
    make: Callable[[Groups, OptimSection], torch.optim.Optimizer]


def _adamw(groups: Groups, optim: OptimSection) -> torch.optim.Optimizer:
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def _nadamw(groups: Groups, optim: OptimSection) -> torch.optim.Optimizer:
    from timm.optim import NAdamW  # takes seconds

    class Heeding(NAdamW):
        """It knows no `found_inf`; here the host asks, and waits for the device in every step."""

        def step(self, closure: None = None) -> None:
            if not bool(getattr(self, "found_inf", False)):
                super().step(closure)

    betas = (optim.beta1, optim.beta2)
    return Heeding(groups, lr=optim.lr, betas=betas, eps=optim.eps, foreach=False)


# Loshchilov & Hutter 2017; and the same with a look ahead as Nesterov's, Dozat 2016
ADAMW = OptimizerKind("adamw", "AdamW", ("exp_avg", "exp_avg_sq"), _adamw)
NADAMW = OptimizerKind("nadamw", "NAdamW", ("exp_avg", "exp_avg_sq"), _nadamw)
KINDS = {kind.name: kind for kind in (ADAMW, NADAMW)}


@contextmanager
def own_settings(optimizer: Any) -> Iterator[None]:
    """Let the recipe's betas and decay stand, whatever the state that is loaded inside brings."""
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)


def kind_of(optim: OptimSection) -> OptimizerKind:
    """What a recipe's optimizer is."""
    return KINDS[optim.name]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices only, and not to embedding vectors and positions."""
    return len(whole_shape(parameter)) >= 2 and not name.endswith(NOT_DECAYED)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter that may be cut, as ZeRO-3 cuts it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@dataclass(frozen=True)
class Rate:
    """The learning rate of a parameter group, as a factor.

    Attributes:
        scale: on the learning rate of the run.
        losses: that alone train the group; where all of them pause, it stands still: neither
            weight decay nor what its moments hold of earlier steps moves it.
    """

    scale: float
    losses: Kind

    def at(self, weights: Mapping[str, float]) -> float:
        """In a step with these weights of the losses; one that is not among them has none."""
        return self.scale if any(weights.get(name) for name in self.losses) else 0.0


def make_optimizer(
    model: CoCa, optim: OptimSection, loss: LossSection
) -> tuple[torch.optim.Optimizer, list[Rate]]:
    """The optimizer over the parameters that train.

    Returns:
        The optimizer, and the rate of each of its groups. A group is what shares this rate and
        whether it is decayed.
    """
    scales, pauses = layer_scales(model, optim.layer_decay), pausing(model, loss)
    groups: dict[tuple[float, bool, Kind], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            losses = pauses.get(parameter, tuple(LABELS))
            key = (scales.get(parameter, 1.0), decays(name, parameter), losses)
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups, reverse=True)
    listed = [
        {"params": groups[key], "weight_decay": optim.weight_decay * key[1]} for key in ordered
    ]
    return kind_of(optim).make(listed, optim), [Rate(scale, names) for scale, _, names in ordered]


SCALE_RATE = Rate(1.0, tuple(OF_FEATURES))


def make_scale_optimizer(logit_scale: LogitScale, optim: OptimSection) -> torch.optim.Optimizer:
    """The same one for the replicated logit scale and its bias, without decay."""
    parameters = list(logit_scale.parameters())
    return kind_of(optim).make([{"params": parameters, "weight_decay": 0.0}], optim)


def only_where(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Let the optimizer's next step change nothing unless `applied`; the host does not ask.

    Args:
        optimizer: of an `OptimizerKind`.
        applied: boolean scalar on its device.
    """
    optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]  # GradScaler's way


def global_norm(gradients: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """Of gradients whose parts are on all ranks of a group, fp64; squared in fp32 at least.

    A collective.
    """
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch.stack(list(torch._foreach_norm(gradients, 2, dtype=wide)))
    total = norms.double().square().sum()
    dist.all_reduce(total, group=group)
    return total.sqrt()


def shrink(norm: Tensor, most: float) -> Tensor | float:
    """The factor on gradients of this norm that clips it to `most`; 0 does not clip."""
    return 1.0 / ((norm + 1e-6) / most).clamp(min=1.0) if most > 0 else 1.0
