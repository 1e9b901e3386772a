"""Weights by name: checked against a configuration, resized where that has a meaning, loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model.coca import CoCa
from coca_scale.model.config import ModelConfig
from coca_scale.model.logit_scale import LogitScale

LOGIT_SCALE, LOGIT_BIAS = "logit_scale.log_scale", "logit_scale.bias"
_IMAGE_POSITIONS = "image.position_embedding"
_TIMM_POSITIONS = "image.trunk.pos_embed"
_TEXT_POSITIONS = "text.position_embedding"
_POSITIONS = (_IMAGE_POSITIONS, _TIMM_POSITIONS, _TEXT_POSITIONS)
_TOKEN_EMBEDDINGS = (
    "text.token_embedding.weight",
    "text.transformer.embeddings.word_embeddings.weight",
)
_VOCABULARY = (*_TOKEN_EMBEDDINGS, "caption_head.weight")


@dataclass(frozen=True)
class Model:
    """A model ready for use, with its temperature."""

    coca: CoCa
    logit_scale: LogitScale

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.coca.config


def build_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Model:
    """A model in evaluation mode that uses the tensors of `weights` as they are, without a copy.

    Raises:
        UserError: the weights are not those of this configuration.
    """
    logit_scale = LogitScale.of(config)
    coca = load_coca(config, logit_scale, weights)
    return Model(coca.eval().requires_grad_(False), logit_scale.requires_grad_(False))


def load_coca(config: ModelConfig, logit_scale: LogitScale, weights: Mapping[str, Tensor]) -> CoCa:
    """A model that has `weights` in the place of its own tensors; memory-mapped ones stay mapped.

    It is compared with them before it takes any memory. Towers of other libraries take theirs
    nevertheless: their buffers are in no file.

    Args:
        config: of the model.
        logit_scale: gets its values.
        weights: under our names.

    Raises:
        UserError: missing or unexpected names, a tensor of another shape, or one with numbers that
            are not finite.
    """
    with torch.device("meta"):
        coca = CoCa(config)
    _compare(coca, logit_scale, weights)
    require_finite(weights)
    if config.has_foreign_towers:
        coca = CoCa(config)
    scale = _of_logits(logit_scale)
    towers = {name: tensor for name, tensor in weights.items() if name not in scale}
    coca.load_state_dict(towers, assign=True)
    for name, parameter in scale.items():
        parameter.data.copy_(weights[name])
    return coca


def _of_logits(logit_scale: LogitScale) -> dict[str, torch.nn.Parameter]:
    """Under the names that weights have."""
    return dict(logit_scale.named_parameters(prefix="logit_scale"))


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """See that no weight is NaN or infinite, nor the scale of logits; no copy is made of any.

    Raises:
        UserError: which are not.
    """
    broken = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    log_scale = weights.get(LOGIT_SCALE)
    if log_scale is not None and not broken and not _is_finite(log_scale.float().exp()):
        broken = [LOGIT_SCALE]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(weights)} weights hold NaN or infinity (first: {broken[0]}): "
            "the training that made them had gone wrong, or they are damaged; take earlier ones"
        )


def require_finite_features(features: Tensor, of_what: str) -> None:
    """See that features [n, d] can be compared.

    Raises:
        UserError: some are NaN or infinite.
    """
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        raise UserError(
            f"the model gives NaN or infinity for {broken} of {len(features)} {of_what}, so there "
            "is nothing to compare: its numbers overflow, more easily in fp16 and bf16 than in fp32"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    lowest, highest = tensor.aminmax()  # NaN if one is
    return bool(lowest.isfinite() & highest.isfinite())


def _compare(coca: CoCa, logit_scale: LogitScale, weights: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and kinds of numbers.

    Raises:
        UserError: what is missing, unexpected, or of another shape or kind.
    """
    own = {**coca.state_dict(), **_of_logits(logit_scale)}
    missing, unexpected = sorted(own.keys() - weights), sorted(weights.keys() - own)
    if missing or unexpected:
        raise UserError(
            "these are weights of another architecture than the model config says: "
            f"{_some(missing, 'missing')}; {_some(unexpected, 'unexpected')}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)} in the weights, "
                f"the model config says {tuple(own[name].shape)}"
            )
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{name} is {tensor.dtype} in the weights, not {own[name].dtype}")


def fit_weights(
    weights: Mapping[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights made for another image size, caption length or smaller vocabulary, for `config`.

    Image positions are interpolated as OpenCLIP does (bicubic, antialiased). Caption positions that
    both have stay as they are, so captions that fitted before keep their features; new ones start
    as the last old one. New tokens start as the mean of the old ones, and a bias of logits that the
    weights lack as the config says.

    Returns:
        The weights, and a line for everything that was changed.
    """
    fitted, notes = dict(weights), []
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CoCa(config).state_dict().items()}
    for name, new_shape in shapes.items():
        old = weights.get(name)
        if old is None or old.shape == new_shape:
            continue
        made = fit_weight(name, old, new_shape, config)
        if made is not None:
            fitted[name] = made
            notes.append(f"{name}: {tuple(old.shape)} made {tuple(new_shape)}")
    if config.init_logit_bias is not None and LOGIT_SCALE in weights and LOGIT_BIAS not in weights:
        fitted[LOGIT_BIAS] = torch.tensor([config.init_logit_bias])
        notes.append(f"{LOGIT_BIAS}: begins at {config.init_logit_bias:g}, these weights have none")
    return fitted, notes


def fit_weight(name: str, old: Tensor, shape: torch.Size, config: ModelConfig) -> Tensor | None:
    """One of the weights as of `fit_weights`; None where nothing can make it have this shape."""
    if old.shape[-1:] != shape[-1:]:
        return None
    if name == _IMAGE_POSITIONS:
        return resize_grid(old, shape[0])
    if name == _TIMM_POSITIONS:
        return resize_grid(old[0], shape[1])[None]
    if name == _TEXT_POSITIONS:
        return resize_caption(old, shape[0], config.text.embed_cls)
    if name in _VOCABULARY and old.shape[0] < shape[0]:
        grown = old.mean(0, keepdim=True).expand(shape[0] - old.shape[0], -1)
        return torch.cat([old, grown])
    return None


def require_resizable(before: ModelConfig, after: ModelConfig) -> None:
    """See that weights of one config can be made to fit another of other sizes.

    Raises:
        UserError: naming a weight whose size changes and that nothing can resize.
    """
    with torch.device("meta"):
        old, new = (dict(CoCa(config).named_parameters()) for config in (before, after))
    for name, parameter in new.items():
        found = old[name].shape
        if found != parameter.shape and name not in _POSITIONS:
            raise UserError(
                f"{name} has shape {tuple(found)} before and {tuple(parameter.shape)} here, and "
                "only position embeddings of images and captions can be resized; keep the sizes of "
                "this model"
            )


def resize_grid(positions: Tensor, length: int) -> Tensor:
    """Position embeddings [prefix + h², D] for a square grid of another size, [prefix + n², D].

    The prefix (class tokens) is what is left over from a square, the same before and after.
    """
    old_side, new_side = int(positions.shape[0] ** 0.5), int(length**0.5)
    prefix = positions.shape[0] - old_side**2
    if length - new_side**2 != prefix:
        raise UserError(
            f"image positions of {positions.shape[0]} tokens cannot be resized to {length}"
        )
    grid = positions[prefix:].reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid.float(), (new_side, new_side), mode="bicubic", antialias=True, align_corners=False
    )
    grid = grid.permute(0, 2, 3, 1).reshape(new_side**2, -1).to(positions.dtype)
    return torch.cat([positions[:prefix], grid])


def resize_caption(positions: Tensor, length: int, has_cls: bool) -> Tensor:
    """Position embeddings [T, D] of captions, cut or continued; the last belongs to the CLS."""
    words, cls = (positions[:-1], positions[-1:]) if has_cls else (positions, positions[:0])
    wanted = length - len(cls)
    words = torch.cat([words[:wanted], words[-1:].expand(max(0, wanted - len(words)), -1)])
    return torch.cat([words, cls])


def _some(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}" + (f" ({', '.join(names[:3])}, ...)" if names else "")
