"""What a teacher that runs beside a model costs, counted on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from coca_scale.data.stored_features import StoredFeatures, are_stored
from coca_scale.engine.config import DTYPES, apply_kernels
from coca_scale.errors import UserError
from coca_scale.inference.load import model_config
from coca_scale.model import CoCa, ModelConfig
from coca_scale.planning.counting import LiveBytes, caption_quantiles, default_dtype, flops
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.distill import DistillSection


@dataclass(frozen=True)
class TeacherCosts:
    """Of a teacher's towers, on one rank.

    Attributes:
        parameters: of the whole model, which is read before its decoder is dropped.
        weights_bytes: of the towers.
        peak_bytes: most that a micro-batch's forward pass has alive beside them.
        forward_flops: of that pass.
        blocks: of the towers.
    """

    parameters: int
    weights_bytes: int
    peak_bytes: int
    forward_flops: int
    blocks: int


def teacher_width(section: DistillSection) -> int:
    """Elements of a teacher's features, 0 without one.

    Raises:
        UserError: there is no such model.
    """
    if section.teacher is None:
        return 0
    if are_stored(section.teacher):
        return StoredFeatures(Path(section.teacher)).facts.embed_dim
    return model_config(section.teacher, section.config).embed_dim


def teacher_costs(recipe: Recipe, batch: BatchSplit, varlen: bool = False) -> TeacherCosts | None:
    """Count a micro-batch; None where no teacher runs.

    Args:
        recipe: that names it.
        batch: its batch over the ranks.
        varlen: whether it is for a GPU that attends to captions as they are packed.

    Raises:
        UserError: there is no such model.
    """
    section = recipe.loss.distill
    if section.teacher is None or are_stored(section.teacher):
        return None
    config = model_config(section.teacher, section.config)
    dtype, micro = DTYPES[recipe.engine.precision], batch.micro_batch
    size, mean = config.vision_cfg.image_size, recipe.data.mean_tokens
    tokens = caption_quantiles(micro, mean, config.context_length, config.pad_id)
    with FakeTensorMode() as fake, default_dtype(dtype):
        coca = CoCa(config).eval()
        images = torch.randn(micro, 3, size, size, dtype=dtype)
    parameters = sum(p.numel() for p in coca.parameters())
    coca.decoder = coca.caption_head = None
    apply_kernels(coca, recipe.engine, varlen)
    captions = coca.text.pack(tokens).map(fake.from_tensor)
    with fake, torch.no_grad():
        forward_flops = flops(lambda: coca.encode(images, captions))
        with LiveBytes() as live:
            live.ignore([*coca.parameters(), *coca.buffers()])
            coca.encode(images, captions)
    weights, peak = sum(p.nbytes for p in coca.parameters()), live.peak + images.nbytes
    return TeacherCosts(parameters, weights, peak, forward_flops, len(coca.blocks()))


def require_same_size(section: DistillSection, width: int, config: ModelConfig) -> None:
    """See that features can be compared where the recipe compares them.

    Raises:
        UserError: they are of another size than the student's.
    """
    if section.feature_weight and width != config.embed_dim:
        raise UserError(
            f"loss.distill.feature_weight: the teacher's features have {width} elements, this "
            f"model's {config.embed_dim}; set it to 0 and learn from similarities, or take a "
            "teacher of the same embed_dim"
        )
