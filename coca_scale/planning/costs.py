"""Count what one micro-batch costs, on tensors without data: the real model, seconds, no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # on tensors without data, which torch 2.8 lacks
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from coca_scale.data.loader import Draws
from coca_scale.engine.config import (
    DTYPES,
    apply_settings,
    gathered_whole,
    kept_graphs,
    takes_images,
    transfers,
)
from coca_scale.engine.objective import contrastive
from coca_scale.errors import UserError
from coca_scale.losses import FeatureGather, distill_loss
from coca_scale.model import CoCa, ModelConfig
from coca_scale.model.coca import Encoded
from coca_scale.model.freeze import freeze
from coca_scale.model.mammut import MammutText
from coca_scale.model.targets import Targets
from coca_scale.model.tower_config import VisionConfig
from coca_scale.planning.counting import (
    LiveBytes,
    caption_quantiles,
    default_dtype,
    flops,
    parts,
)
from coca_scale.planning.plan import Costs
from coca_scale.planning.teacher import teacher_costs, teacher_width
from coca_scale.planning.units import model_units
from coca_scale.recipe import BatchSplit, Recipe

# times that what is kept for the backward pass goes through the device's memory, as benchmarks show
# it: the image tower's, by what attends there; captions', whose many small operations take longer
IMAGE_PASSES = {"torch": 10.3, "triton": 8.2}
CAPTION_PASSES = 13.0


def count_costs(recipe: Recipe, batch: BatchSplit, varlen: bool = False) -> Costs:
    """Run a micro-batch of the recipe's model, and the contrastive loss of its global batch.

    Args:
        recipe: what is counted.
        batch: its batch over the ranks.
        varlen: whether it is for a GPU that attends to captions as they are packed.

    Raises:
        UserError: the model cannot be built, or does not keep to its activation budget.
    """
    case = _Case(recipe, batch)
    model = case.model
    recomputed = blocks_to_recompute(recipe, batch, varlen)
    apply_settings(model, recipe, recomputed, varlen)
    kept, graph, peak = case.bytes(_named_parts(model))
    with case.fake:
        with torch.no_grad():
            tower_flops = flops(
                lambda: model(*case.inputs, features_only=True, sample_ids=case.sample_ids)
            )
        step_flops = flops(lambda: case.forward().backward())
    twice = case.forward_flops(features_only=True) if isinstance(model.text, MammutText) else {}
    units = model_units(model, twice, case.forward_flops(), step_flops)
    bytes_per_flop = case.bytes_per_flop(_image_passes(recipe, model.config.vision_cfg))
    parameters = list(model.parameters())
    width, dtype = model.config.embed_dim, DTYPES[recipe.engine.precision]
    taught = teacher_width(recipe.loss.distill)
    whole = gathered_whole(model)
    in_layers = [p for module in whole for p in module.parameters()]
    return Costs(
        parameters=_numel(parameters),
        image_size=model.config.vision_cfg.image_size,
        trained=_numel(p for p in parameters if p.requires_grad),
        layer_parameters=_numel(in_layers),
        units=units,
        largest_layer=max(
            *(_numel(module.parameters(recurse=False)) for module in model.modules()),
            *(_numel(module.parameters()) for module in whole),
        ),
        bucket=transfers(model).bucket,
        features_bytes=batch.samples_per_rank * 2 * (width + taught) * dtype.itemsize,
        checkpointing=recipe.engine.activation_checkpointing,
        recomputed=len(recomputed),
        blocks=len(model.blocks()),
        kept_bytes=kept,
        peak_bytes=peak,
        graph_bytes=graph,
        kept_graphs=kept_graphs(recipe, batch),
        tower_flops=tower_flops,
        step_flops=step_flops,
        bytes_per_flop=bytes_per_flop,
        loss_bytes=_loss_bytes(recipe, batch, (width, taught), dtype),
        teacher=teacher_costs(recipe, batch, varlen),
    )


def model_flops(recipe: Recipe, batch: BatchSplit) -> float:
    """FLOPs of a sample, forward and backward, as model FLOPs utilization counts them.

    What is computed a second time to save memory is left out (Chowdhery et al. 2022, appendix B).
    """
    case = _Case(recipe, batch)
    case.model.set_activation_checkpointing("none")
    with case.fake:
        return flops(lambda: case.forward().backward()) / batch.micro_batch


def blocks_to_recompute(recipe: Recipe, batch: BatchSplit, varlen: bool | None = None) -> list[str]:
    """Blocks to recompute as a whole, so that activations keep to the recipe's budget.

    Those that give most bytes for the FLOPs of a second forward pass come first.

    Args:
        recipe: of the run.
        batch: its batch over the ranks.
        varlen: as `apply_settings`.

    Raises:
        UserError: recomputing all of them is not enough.
    """
    budget = recipe.engine.activation_budget_gb
    if budget is None or recipe.engine.activation_checkpointing == "full":
        return []
    case = _Case(recipe, batch)
    apply_settings(case.model, recipe, varlen=varlen)
    waiting = max(0, kept_graphs(recipe, batch) - 1)
    blocks = case.model.blocks()
    saved, taken = case.savings(waiting)
    cost = case.forward_flops()
    left = sorted(blocks, key=lambda name: saved[name] / max(1, cost[name]))
    chosen: list[str] = []
    while taken > budget * 1e9:
        over = taken - budget * 1e9
        if not left:
            raise UserError(
                f"engine.activation_budget_gb={budget:g}: with every block recomputed activations "
                f"still take {taken / 1e9:.2f} GB; use a smaller train.micro_batch"
                f"{' or engine.kept_graphs=1' if waiting else ''}"
            )
        while left and over > 0:
            chosen.append(left.pop())
            over -= saved[chosen[-1]]
        apply_settings(case.model, recipe, chosen, varlen)
        _, graph, peak = case.bytes({})
        taken = peak + waiting * graph
    return chosen


class _Case:
    """A micro-batch of a recipe's model, on tensors without data."""

    def __init__(self, recipe: Recipe, batch: BatchSplit) -> None:
        config = ModelConfig.from_recipe(recipe.model)
        dtype = DTYPES[recipe.engine.precision]
        micro, size = batch.micro_batch, config.vision_cfg.image_size
        tokens, targets = _captions(recipe, micro, config)
        with FakeTensorMode() as self.fake, default_dtype(dtype):
            self.model = CoCa(config).train()
            images = torch.randn(micro, 3, size, size, dtype=dtype)
            self.sample_ids = torch.arange(micro)  # by which patches are dropped
        freeze(self.model, recipe.model, recipe.loss)
        for parameter in self.model.parameters():  # gradients are counted with the state
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)
        captions = self.model.text.pack(tokens, targets=targets)
        self.inputs = images, captions.map(self.fake.from_tensor)

    def forward(self, encoded: Encoded | None = None) -> Tensor:
        """What the engine calls backward on, without its factors."""
        images, captions = self.inputs
        given = images if encoded is None else encoded
        features, sums = self.model(given, captions, sample_ids=self.sample_ids)
        surrogate = (features.float() * features.detach().float()).sum()
        return sum(sums.values(), start=surrogate)

    def bytes(self, named: Mapping[str, nn.Module]) -> tuple[dict[str, int], int, int]:
        """What is kept for the backward pass, and most alive beside weights and gradients.

        Returns:
            What the forward pass leaves, by part; what its towers leave, with the images that the
            step prepares for them; and most alive.
        """
        with self.fake, LiveBytes() as live:
            live.ignore([*self.model.parameters(), *self.model.buffers()])
            with parts(live, named):
                encoded = [self.model.encode(*self.inputs, self.sample_ids)]
                graph = sum(live.by_part().values()) + self.inputs[0].nbytes
                surrogate = self.forward(encoded.pop())
            kept = live.by_part()
            surrogate.backward()
        return kept, graph, live.peak

    def bytes_per_flop(self, image_passes: float) -> float:
        """Bytes through memory for each FLOP. Nothing is recomputed hereafter."""
        self.model.set_activation_checkpointing("none")
        named = {"image": self.model.get_submodule("image")}
        with self.fake, LiveBytes() as live, parts(live, named):
            live.ignore([*self.model.parameters(), *self.model.buffers()])
            surrogate = self.forward()
            kept = live.by_part()
            del surrogate
        image = kept.pop("image", 0)
        moved = image_passes * image + CAPTION_PASSES * sum(kept.values())
        with self.fake:
            return moved / flops(lambda: self.forward().backward())

    def forward_flops(self, features_only: bool = False) -> dict[str, int]:
        """Of a forward pass, by the names of modules in the order in which they run."""
        with self.fake, FlopCounterMode(display=False) as counter:
            self.model(*self.inputs, features_only=features_only, sample_ids=self.sample_ids)
        counts = counter.get_flop_counts()
        return {name.partition(".")[2]: sum(c.values()) for name, c in counts.items()}

    def savings(self, waiting: int) -> tuple[dict[str, int], int]:
        """What every block keeps beside its output, and most alive, with graphs that wait."""
        blocks = self.model.blocks()
        outputs: dict[str, int] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                outputs[name] = sum(t.nbytes for t in tree_leaves(output) if torch.is_tensor(t))

            return hook

        handles = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
        kept, graph, peak = self.bytes(blocks)
        for handle in handles:
            handle.remove()
        graphs = {name: 1 if name.startswith("decoder.") else 1 + waiting for name in blocks}
        saved = {n: graphs[n] * max(0, kept.get(n, 0) - outputs[n]) for n in blocks}
        return saved, peak + waiting * graph


def _captions(recipe: Recipe, count: int, config: ModelConfig) -> tuple[Tensor, Targets | None]:
    """Captions as a recipe draws them, those to write where they are others or in parallel."""
    about, data, draws = (config.context_length, config.pad_id), recipe.data, Draws.of(recipe)
    match, write = data.mean_tokens, data.caption_mean_tokens or data.mean_tokens
    if not data.two_captions or not draws.write:
        tokens = written = caption_quantiles(count, match, *about)
    elif not draws.match:
        tokens = written = caption_quantiles(count, write, *about)
    else:
        tokens, written = (caption_quantiles(count, mean, *about) for mean in (match, write))
        written = torch.where(written == config.pad_id, config.pad_id, config.pad_id + 2)
    parallel = (torch.arange(1, count + 1) * draws.parallel).floor().diff(prepend=torch.zeros(1))
    if written is tokens and not draws.parallel:
        return tokens, None
    return tokens, Targets(written, parallel > 0)


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _image_passes(recipe: Recipe, vision: VisionConfig) -> float:
    wanted = recipe.engine.attention_kernel == "triton"
    own = wanted and takes_images(vision, recipe.engine.precision)
    return IMAGE_PASSES["triton" if own else "torch"]


def _named_parts(model: CoCa) -> dict[str, nn.Module]:
    return {name.replace("_", " "): part for name, part in model.named_children()}


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _loss_bytes(
    recipe: Recipe, batch: BatchSplit, widths: tuple[int, int], dtype: torch.dtype
) -> int:
    """Most bytes alive in the losses of features of the global batch on one of its ranks."""
    features, teacher = (
        torch.empty(batch.samples_per_rank, 2, width, dtype=dtype, device="meta")
        for width in widths
    )
    scale = torch.zeros((), device="meta")

    def count(group: dist.ProcessGroup | None) -> int:
        with LiveBytes() as live:
            about = (group, recipe.loss.contrastive_chunk_rows)
            taught = teacher if widths[1] else None
            gather = FeatureGather(features, group, recipe.loss.contrastive_resident, taught)
            contrastive(recipe.loss, gather, scale, scale, group)
            if recipe.loss.learns("distill"):
                distill_loss(gather, scale, 0.0, *about)
        return live.peak

    # of its own, beside that of a job whose rank counts; a constructor until torch 2.8
    make_group: Any = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
    return count(None if batch.ranks == 1 else make_group(0, batch.ranks))
