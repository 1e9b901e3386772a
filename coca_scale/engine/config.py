"""What a recipe says of the engine: DeepSpeed's configuration, and settings inside the model.

Of DeepSpeed every key is written that a run relies on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from coca_scale.errors import UserError
from coca_scale.model import CoCa, fp8
from coca_scale.model.layers import (
    Attention,
    AttentionalPooler,
    AttentionKernel,
    SelfAttention,
    TransformerBlock,
    is_short,
)
from coca_scale.model.recompute import Linear
from coca_scale.model.tower_config import VisionConfig
from coca_scale.model.varlen import MOST_HEAD_WIDTH
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.schema import EngineSection

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LARGEST_BUCKET = 100_000_000  # elements
# elements of weights; what is used again before so many others is not gathered again. DeepSpeed's
# own value: of a pass forward and back, the last half of it stays
LIVE = 1_000_000_000
LET_GO_IN_FLIGHT = 4  # layers whose memory the device still uses when the host gathers another
BUCKETS_IN_FLIGHT = 2  # whose gradients stay in memory when the host is ahead
FP8_CAPABILITY = (8, 9)
EVERY = 10**12  # elements; more than a weight has


OTHER_ZERO_KEYS = (
    *("offload_optimizer", "offload_param", "zero_hpz_partition_size"),
    *("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"),
)
OTHER_KEYS = ("communication_data_type", "gradient_predivide_factor", "prescale_gradients")


@dataclass(frozen=True)
class Transfers:
    """Sizes of what ZeRO moves at a time, in elements.

    Attributes:
        bucket: of gradients that travel together, and of weights that are fetched ahead: two
            blocks, so that the next one travels while one is computed, or the largest parameter.
        whole_below: parameters up to this size are not sharded: all vectors, such as biases.
    """

    bucket: int
    whole_below: int


def transfers(model: nn.Module) -> Transfers:
    """What suits a model before it is sharded."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = [sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks]
    sizes = [p.numel() for p in model.parameters()]
    vectors = [p.numel() for p in model.parameters() if p.ndim == 1]
    bucket = max(2 * max(blocks, default=0), *sizes)
    return Transfers(min(bucket, LARGEST_BUCKET), max(vectors, default=0))


def layers(model: nn.Module) -> list[nn.Module]:
    """Blocks and poolers of this package, in the order of their names."""
    return [m for m in model.modules() if isinstance(m, TransformerBlock | AttentionalPooler)]


def gathered_whole(model: nn.Module) -> list[nn.Module]:
    """Modules whose weights ZeRO-3 gathers and reduces together, with one hook instead of one each.

    None where something is frozen: DeepSpeed reduces the gradients of such a module when that of
    its input is there, and an input that has none would let it reduce before they are computed.
    """
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return [] if frozen else layers(model)


def require_compilable(model: nn.Module, engine: EngineSection) -> None:
    """See that no hook of ZeRO-3 is inside what is compiled.

    Args:
        model: before it is sharded, with what is frozen marked as such.
        engine: of the recipe.

    Raises:
        UserError: blocks are to be compiled, and stage 3 does not gather them whole.
    """
    if engine.compile == "blocks" and engine.zero_stage == 3 and not gathered_whole(model):
        raise UserError(
            "engine.compile blocks at zero_stage 3 needs every weight to train, and this "
            "recipe locks some; use zero_stage 2 or engine.compile none"
        )


def require_fp8(model: nn.Module, engine: EngineSection, device: torch.device) -> None:
    """See that what is to be computed in FP8 can be, here.

    Args:
        model: of the recipe.
        engine: of the recipe.
        device: of this rank. A CPU computes the same, slowly.

    Raises:
        UserError: the device has no FP8, or no layer of the model can be computed so.
    """
    if not engine.fp8:
        return
    if not _fp8_layers(model):
        raise UserError(
            "engine.fp8: no transformer block of this model has linear layers with multiples of "
            f"{fp8.MULTIPLE} inputs and outputs; towers from timm and Hugging Face have none that "
            "are computed in FP8; set engine.fp8=false"
        )
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"engine.fp8 needs an NVIDIA GPU of compute capability {_dotted(FP8_CAPABILITY)} "
            f"(L40S, RTX 40, H100) or later, and {name} has {_dotted(capability)}; set "
            "engine.fp8=false"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def deepspeed_config(
    recipe: Recipe, batch: BatchSplit, sizes: Transfers, ranks_per_node: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given; `engine.deepspeed` of the recipe is merged over it.

    Args:
        recipe: of the run.
        batch: as it is cut over the ranks.
        sizes: of its model.
        ranks_per_node: the same on all nodes, or 1.
    """
    engine, precision = recipe.engine, recipe.engine.precision
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage > 0:
        zero |= {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": sizes.bucket,
            "allgather_bucket_size": sizes.bucket,
        }
    # a single rank has all of every weight, and need not fetch them
    whole = batch.ranks == 1 and engine.offload == "none"
    if engine.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": sizes.bucket,
            "stage3_param_persistence_threshold": EVERY if whole else sizes.whole_below,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_gather_16bit_weights_on_model_save": False,
            "memory_efficient_linear": False,  # replaces F.linear everywhere, and rounds bf16 twice
        }
        if engine.secondary_shard and 1 < ranks_per_node < batch.ranks:
            zero["zero_hpz_partition_size"] = ranks_per_node
    host = {"device": "cpu", "pin_memory": True}
    if engine.offload != "none":
        zero["offload_optimizer"] = host
    if engine.offload == "all":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": recipe.optim.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU as well
        "zero_allow_untested_optimizer": True,  # it lists classes; ours are element-wise
        "timers": {"throughput": {"enabled": False}},  # it waits for the device
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if adds_in_fp32(recipe, batch):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config, recipe.engine.deepspeed)


def adds_in_fp32(recipe: Recipe, batch: BatchSplit) -> bool:
    """Whether gradients of micro-batches are added up in fp32, and not in the run's bf16.

    Where each rank keeps all gradients (stages 0 and 1) DeepSpeed has no such thing for us.
    """
    engine = recipe.engine
    return batch.accumulation > 1 and engine.precision == "bf16" and engine.zero_stage >= 2


def kept_graphs(recipe: Recipe, batch: BatchSplit) -> int:
    """Micro-batches of a step whose towers run once.

    Args:
        recipe: of the run, with what `auto` has come to.
        batch: its batch over the ranks.
    """
    wanted = recipe.engine.kept_graphs
    assert wanted != "auto", "planning.fit finds out what it is"
    return min(wanted, batch.accumulation) if batch.accumulation > 1 else 0


def many_at_once(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's configuration asks for nothing that `ManyAtOnce` does not do."""
    zero = config["zero_optimization"]
    return (
        zero["stage"] == 3
        and not any(name in zero for name in OTHER_ZERO_KEYS)
        and not any(name in config for name in OTHER_KEYS)
    )


def apply_settings(
    model: CoCa,
    recipe: Recipe,
    recomputed: Collection[str] = (),
    varlen: bool | None = None,
) -> None:
    """Put what a recipe says about recomputing, kernels and the caption loss into its model.

    Args:
        model: of the recipe.
        recipe: of the run, with what `auto` has come to.
        recomputed: names of blocks that are recomputed as a whole.
        varlen: whether captions stay packed in attention where the recipe lets them; None if this
            process has a GPU for it.
    """
    checkpointing = recipe.engine.activation_checkpointing
    assert checkpointing != "auto", "planning.fit finds out what it is"
    model.set_activation_checkpointing(checkpointing, recomputed)
    if model.caption_head is not None:
        model.caption_head.chunk_rows = recipe.loss.caption_chunk_rows
        model.caption_head.label_smoothing = recipe.loss.label_smoothing
        model.caption_head.z_loss = recipe.loss.z_loss
        model.caption_head.kernel = recipe.loss.caption_kernel
    apply_kernels(model, recipe.engine, varlen)
    for layer in _fp8_layers(model):
        layer.fp8 = recipe.engine.fp8


def apply_kernels(model: CoCa, engine: EngineSection, varlen: bool | None = None) -> None:
    """What attends in a model that computes in `engine.precision`; `varlen` as `apply_settings`."""
    wanted = engine.attention_kernel == "triton"
    kernel = _attention_kernel() if wanted else None
    varlen = kernel is not None if varlen is None else varlen and wanted
    varlen = varlen and engine.precision != "fp32"
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.kernel = kernel
        if isinstance(module, Attention):
            width = module.head_width
            module.varlen = varlen and width % 8 == 0 and width <= MOST_HEAD_WIDTH


def own_attention(model: CoCa, precision: str) -> str | None:
    """What our own kernels attend to after `apply_settings`, for the log; None if to nothing."""
    kernels = any(isinstance(m, SelfAttention) and m.kernel is not None for m in model.modules())
    short = takes_images(model.config.vision_cfg, precision)
    packed = any(m.varlen for m in model.modules() if isinstance(m, Attention))
    parts = ["images"] * (kernels and short) + ["packed captions"] * packed
    return f"attention by our Triton kernels to {' and '.join(parts)}" if parts else None


def takes_images(vision: VisionConfig, precision: str) -> bool:
    """Whether an image tower's sequences are what `attention_kernel: triton` takes, on a GPU."""
    own_tower = vision.timm_model_name is None
    return own_tower and is_short(vision.grid**2 + 1, vision.head_width, DTYPES[precision])


def _fp8_layers(model: nn.Module) -> list[Linear]:
    """Linear layers of transformer blocks whose sizes FP8 takes; poolers have little to gain."""
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    linears = [m for block in blocks for m in block.modules() if isinstance(m, Linear)]
    return [layer for layer in linears if fp8.takes(layer)]


def _attention_kernel() -> AttentionKernel | None:
    """Triton's, where a GPU's shared memory holds a head: NVIDIA's, from an A100 on."""
    if not torch.cuda.is_available() or torch.version.hip or find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    from coca_scale.model.attention_kernel import short_attention

    return short_attention


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _merge(inner, value)
        merged[key] = value
    return merged
