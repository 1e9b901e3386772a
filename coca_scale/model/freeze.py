"""Which parameters train: locked towers, and parts that a run's losses never reach."""

from __future__ import annotations

from torch import nn

from coca_scale.errors import UserError
from coca_scale.losses import OF_CAPTIONS, OF_FEATURES
from coca_scale.model.coca import CoCa
from coca_scale.model.towers import ModelPart
from coca_scale.recipe.loss_weights import factors
from coca_scale.recipe.schema import LossSection, ModelSection

Kind = tuple[str, ...]


def freeze(coca: CoCa, model: ModelSection, loss: LossSection) -> None:
    """Take parameters out of training, before the engine is built.

    Towers are locked as the recipe says (LiT, Zhai et al. 2022). With a loss weight of 0 at all
    times the parts that only this loss trains are frozen too: left in the optimizer, weight decay
    alone would wear them down to nothing. With one of 0 at times they train, as `pausing` says.

    Raises:
        UserError: more groups to unlock than there are, or nothing left to train.
    """
    if model.lock_image:
        _freeze_groups(coca.image, model.image_unlocked_groups, "model.image_unlocked_groups")
    if model.lock_text:
        _freeze_groups(coca.text, model.text_unlocked_groups, "model.text_unlocked_groups")
    for kind, parameters in _trained_by_one(coca).items():
        if not loss.learns(*kind):
            for parameter in parameters:
                parameter.requires_grad_(False)
    learns = loss.learns(*OF_FEATURES) or (loss.learns(*OF_CAPTIONS) and coca.decoder is not None)
    if not learns or not any(p.requires_grad for p in coca.parameters()):
        raise UserError(
            "nothing is left to train: see model.lock_image, model.lock_text and the loss weights"
        )


def pausing(coca: CoCa, loss: LossSection) -> dict[nn.Parameter, Kind]:
    """Parameters that train at times only, with the losses that train them.

    Those are all of the one kind, whose weights are all 0 at some point and not at all times.
    """
    return {
        parameter: kind
        for kind, parameters in _trained_by_one(coca).items()
        if loss.learns(*kind) and all(min(factors(loss.weight(name))) == 0 for name in kind)
        for parameter in parameters
    }


def _trained_by_one(coca: CoCa) -> dict[Kind, list[nn.Parameter]]:
    """The parts that losses of one kind alone reach, by the names of these losses."""
    contrastive = coca.image.contrastive_parameters() + coca.text.contrastive_parameters()
    return {tuple(OF_FEATURES): contrastive, tuple(OF_CAPTIONS): coca.caption_parameters()}


def layer_scales(coca: CoCa, layer_decay: float) -> dict[nn.Parameter, float]:
    """Factor on the learning rate of each parameter: decay^(groups above it in its own stack).

    Image tower, text tower and decoder are three stacks; projections and the vocabulary head train
    at the full rate (Bao et al. 2021, appendix).
    """
    stacks = [coca.image.layer_groups(), coca.text.layer_groups()]
    if coca.decoder is not None and coca.caption_head is not None:
        stacks.append([*coca.decoder.layer_groups(), list(coca.caption_head.parameters())])
    return {
        parameter: layer_decay ** (len(groups) - 1 - depth)
        for groups in stacks
        for depth, group in enumerate(groups)
        for parameter in group
    }


def _freeze_groups(tower: ModelPart, unlocked_groups: int, key: str) -> None:
    groups = tower.layer_groups()
    if unlocked_groups > len(groups):
        raise UserError(f"{key}={unlocked_groups}: this tower has {len(groups)} groups")
    for group in groups[: len(groups) - unlocked_groups]:
        for parameter in group:
            parameter.requires_grad_(False)
