"""What a step minimises: the weighted sum of the losses of the global batch, by name.

There are two kinds. A loss of *features* sees those of the whole batch, once per step, and brings
its own gradients (contrastive). A *summed* loss is a sum over samples or tokens that each
micro-batch adds to, over their number in the global batch (caption). A new loss of features is
computed in `Objective.of_features`, a new sum comes out of the model's forward pass with its count
in `Objective.counts`; its name has a label in `losses` and a weight `loss.NAME_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coca_scale.engine.world import World
from coca_scale.losses import (
    LABELS,
    OF_A_TEACHER,
    ContrastiveResult,
    FeatureGather,
    contrastive_loss,
    distill_loss,
    feature_loss,
    sigmoid_loss,
)
from coca_scale.model.packing import PackedCaptions
from coca_scale.recipe.loss_weights import factors
from coca_scale.recipe.schema import LossSection

Counts = Mapping[str, float]


@dataclass(frozen=True)
class FeatureTerms:
    """What the losses of features come to.

    Attributes:
        values: of each, by name; scalars, the same on every rank.
        grad_features: [n, 2, d], gradient of their weighted sum for this rank's samples; None if
            no weight is above 0.
        grad_log_scale: of their weighted sum, the same on every rank.
        grad_bias: likewise; None where no loss has one.
    """

    values: dict[str, Tensor]
    grad_features: Tensor | None
    grad_log_scale: Tensor
    grad_bias: Tensor | None = None


class Objective:
    """The losses of a recipe, with their weights in a step.

    Attributes:
        weights: of that step, by name; those of a teacher's losses only where there is one.
    """

    def __init__(
        self,
        section: LossSection,
        world: World,
        weights: Mapping[str, float] | None = None,
        teacher_log_scale: float | None = None,
    ) -> None:
        """Of one step.

        Args:
            section: of the recipe.
            world: of the run.
            weights: of the step, by name; None where none follows a schedule.
            teacher_log_scale: ln of the teacher's logit scale, where the recipe has a teacher.
        """
        self._section = section
        self._world = world
        self._teacher_log_scale = teacher_log_scale
        names = [n for n in LABELS if teacher_log_scale is not None or n not in OF_A_TEACHER]
        self._most = {name: max(factors(section.weight(name))) for name in names}
        found = self._most if weights is None else weights
        self.weights = {name: found[name] for name in names}

    @property
    def names(self) -> list[str]:
        """Of the losses."""
        return list(self.weights)

    def counts(self, micro_batches: Sequence[PackedCaptions]) -> Counts:
        """What summed losses are divided by: in all micro-batches of all ranks. A collective."""
        (tokens,) = self._world.sum(sum(len(captions.labels_K) for captions in micro_batches))
        return {"caption": max(tokens, 1.0)}

    def gather(self, features: Tensor, teacher: Tensor | None = None) -> FeatureGather:
        """Begin to gather this rank's features [n, 2, d] of the step, detached.

        With those of a teacher, [n, 2, t], where the recipe has one.
        """
        resident = self._section.contrastive_resident
        return FeatureGather(features, self._world.gather_group, resident, teacher)

    def of_features(
        self, gather: FeatureGather, log_scale: Tensor, bias: Tensor | None = None
    ) -> FeatureTerms:
        """The losses of features. A collective.

        Args:
            gather: begun for this step.
            log_scale: ln of the logit scale, detached.
            bias: of the logits, where the loss has one.
        """
        found = contrastive(self._section, gather, log_scale, bias, self._world.group)
        weight, learns = self.weights["contrastive"], self._section.learns("contrastive")
        terms = FeatureTerms(
            values={"contrastive": found.loss},
            grad_features=weight * found.grad_features if learns else None,
            grad_log_scale=weight * found.grad_log_scale,
            grad_bias=None if found.grad_bias is None else weight * found.grad_bias,
        )
        return terms if gather.teacher is None else self._taught(terms, gather, log_scale)

    def _taught(
        self, terms: FeatureTerms, gather: FeatureGather, log_scale: Tensor
    ) -> FeatureTerms:
        """With what a teacher adds."""
        group, rows = self._world.group, self._section.contrastive_chunk_rows
        assert self._teacher_log_scale is not None
        found = {}
        if self.weights["distill"]:
            found["distill"] = distill_loss(gather, log_scale, self._teacher_log_scale, group, rows)
        if self.weights["distill_features"]:
            found["distill_features"] = feature_loss(gather, group)
        grad_features, grad_log_scale = terms.grad_features, terms.grad_log_scale
        for name, result in found.items():
            weighted = self.weights[name] * result.grad_features
            grad_features = weighted if grad_features is None else grad_features + weighted
            grad_log_scale = grad_log_scale + self.weights[name] * result.grad_log_scale
        values = terms.values | {name: result.loss for name, result in found.items()}
        return FeatureTerms(values, grad_features, grad_log_scale, terms.grad_bias)

    def surrogate(
        self,
        features: Tensor,
        grad_features: Tensor | None,
        sums: Mapping[str, Tensor],
        counts: Counts,
    ) -> Tensor:
        """A scalar whose gradient is that of the objective.

        A loss of weight 0 has no graph at all; one of weight 0 in this step alone has, so that
        gradients of 0 reach whatever the engine waits for.

        Args:
            features: [b, 2, d] of a micro-batch, with a graph.
            grad_features: of the same samples.
            sums: summed losses of the micro-batch.
            counts: of the step.
        """
        parts = []
        if grad_features is not None:
            parts.append((features.to(grad_features.dtype) * grad_features).sum())
        for name, total in sums.items():
            if self._section.learns(name):
                parts.append(self.weights[name] / counts[name] * total)
        assert parts, "the recipe leaves nothing to train"
        return sum(parts[1:], start=parts[0])

    def values(
        self, terms: FeatureTerms, sums: Mapping[str, Tensor], counts: Counts
    ) -> dict[str, Tensor]:
        """Every loss of the global batch, fp64 scalars on the device. A collective.

        Args:
            terms: of the step.
            sums: of all micro-batches of this rank.
            counts: of the step.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self._world.device)
        totals = self._world.sum_on_device(torch.stack([sums.get(n, zero) for n in counts]))
        summed = {name: totals[i] / count for i, (name, count) in enumerate(counts.items())}
        found = {name: value.double() for name, value in terms.values.items()} | summed
        return {name: found.get(name, zero) for name in self.weights}

    def total(self, values: Mapping[str, float]) -> float:
        """The weighted sum of the losses."""
        return sum(self.weights[name] * value for name, value in values.items())

    def total_at_most(self, values: Mapping[str, float]) -> float:
        """The same with the largest weights of the run, which does not move when they do."""
        return sum(self._most[name] * value for name, value in values.items())


def contrastive(
    section: LossSection,
    gather: FeatureGather,
    log_scale: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
) -> ContrastiveResult:
    """The contrastive loss that a recipe names. A collective."""
    rows = section.contrastive_chunk_rows
    if section.contrastive == "softmax":  # which a bias does not change
        return contrastive_loss(gather, log_scale, group, rows)
    assert bias is not None, "this model has no bias to train"
    return sigmoid_loss(gather, log_scale, bias, group, rows)


class Tally:
    """What a rank's micro-batches add up to, on its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sums: dict[str, Tensor] = {}
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, features: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Take in a micro-batch."""
        self._finite &= features.detach().isfinite().all()
        for name, total in sums.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
            self.sums[name] += total.detach()

    @property
    def finite(self) -> Tensor:
        """Whether features and summed losses of this rank were; a boolean scalar there."""
        found = self._finite
        for total in self.sums.values():
            found = found & total.isfinite()
        return found
