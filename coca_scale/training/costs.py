"""Count what one micro-batch costs, on tensors without data: the real model, seconds, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from coca_scale.engine.core import DTYPES, apply_settings
from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model import CoCa
from coca_scale.model.captions import Captions
from coca_scale.model.lock import freeze
from coca_scale.planning.counting import LiveBytes, flops, parts
from coca_scale.planning.plan import Costs
from coca_scale.recipe import BatchPlan, Recipe
from coca_scale.training.initial import model_config


def count_costs(recipe: Recipe, batch: BatchPlan, mean_tokens: float) -> Costs:
    """Run a micro-batch of the recipe's model, and the contrastive loss of its global batch.

    Args:
        recipe: of the run.
        batch: its batch over the ranks.
        mean_tokens: real tokens of a caption, start and end included; lengths are Poisson's.

    Raises:
        ValueError: the model cannot be built.
    """
    config = model_config(recipe.model)
    dtype = DTYPES[recipe.engine.precision]
    micro, size = batch.micro_batch, config.vision_cfg.image_size
    tokens = caption_quantiles(micro, mean_tokens, config.context_length, config.pad_id)
    with FakeTensorMode() as fake, _default_dtype(dtype):
        model = CoCa(config).train()
        images = torch.randn(micro, 3, size, size, dtype=dtype)
    freeze(model, recipe.model, recipe.loss)
    apply_settings(model, recipe)
    captions = model.text.arrange(tokens).map(fake.from_tensor)
    with fake:
        kept, peak = _bytes(model, images, captions)
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            tower_flops = flops(lambda: model(images, captions, features_only=True))
        step_flops = flops(lambda: _forward(model, images, captions).backward())
    parameters = list(model.parameters())
    towers = [*model.image.parameters(), *model.text.parameters()]
    return Costs(
        parameters=sum(p.numel() for p in parameters),
        tower_parameters=sum(p.numel() for p in towers),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest_layer=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        kept_bytes=kept,
        peak_bytes=peak,
        tower_flops=tower_flops,
        step_flops=step_flops,
        loss_bytes=_contrastive_bytes(recipe, batch, config.embed_dim, dtype),
    )


def caption_quantiles(captions: int, mean_tokens: float, context: int, pad_id: int) -> Tensor:
    """Token ids [captions, context] whose lengths are evenly spaced quantiles of a distribution.

    A start and an end token, and between them a Poisson number of words.
    """
    generator = torch.Generator().manual_seed(0)
    words = torch.poisson(torch.full((8192,), max(mean_tokens - 2, 0.0)), generator).sort().values
    places = ((torch.arange(captions) + 0.5) / captions * len(words)).long()
    lengths = (words[places].long() + 2).clamp(max=context)
    inside = torch.arange(context) < lengths[:, None]
    return torch.where(inside, pad_id + 1, pad_id)


def _forward(model: CoCa, images: Tensor, captions: Captions) -> Tensor:
    """What the engine calls backward on, without its factors."""
    features, caption_sum = model(images, captions)
    surrogate = (features.float() * features.detach().float()).sum()
    return surrogate if caption_sum is None else surrogate + caption_sum


def _bytes(model: CoCa, images: Tensor, captions: Captions) -> tuple[dict[str, int], int]:
    """What the forward pass leaves, by part, and most alive beside weights and their gradients."""
    named: dict[str, nn.Module | None] = {
        "image": model.image,
        "text": model.text,
        "decoder": model.decoder,
        "caption head": model.caption_head,
    }
    with LiveBytes() as live:
        live.ignore([*model.parameters(), *model.buffers()])
        with parts(live, named):
            surrogate = _forward(model, images, captions)
        kept = live.by_part()
        for parameter in model.parameters():  # gradients are counted with the state
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)
        surrogate.backward()
    return kept, live.peak


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have it; those without data cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _contrastive_bytes(recipe: Recipe, batch: BatchPlan, width: int, dtype: torch.dtype) -> int:
    """Most bytes alive in the loss of the global batch on one of its ranks."""
    features = torch.empty(batch.samples_per_rank, 2, width, dtype=dtype, device="meta")
    scale = torch.zeros((), device="meta")
    rows = recipe.loss.contrastive_chunk_rows
    if batch.ranks == 1:
        with LiveBytes() as live:
            contrastive_loss(FeatureGather(features, None), scale, None, rows)
        return live.peak
    dist.init_process_group("fake", rank=0, world_size=batch.ranks, store=FakeStore())
    try:
        with LiveBytes() as live:
            contrastive_loss(
                FeatureGather(features, dist.group.WORLD), scale, dist.group.WORLD, rows
            )
    finally:
        dist.destroy_process_group()
    return live.peak
