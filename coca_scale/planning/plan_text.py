"""A plan as a page for people."""

from __future__ import annotations

from collections.abc import Sequence

from coca_scale.planning.gpus import Gpu
from coca_scale.planning.plan import Costs, Plan
from coca_scale.planning.staged import PlannedStage, total_of
from coca_scale.planning.suggest import Suggestion
from coca_scale.recipe import BatchSplit, Recipe


def plan_page(
    recipe: Recipe,
    batch: BatchSplit,
    costs: Costs,
    plan: Plan,
    gpu: Gpu,
    name: str,
    price: float | None = None,
) -> str:
    """Memory, compute, traffic and time, and what to change where something is short.

    With `price`, of a GPU-hour in euros, what the run costs.
    """
    parts = ", ".join(
        f"{part} {size / 1e9:.2f}" for part, size in costs.kept_bytes.items() if size > 5e6
    )
    more = costs.activations_bytes - costs.peak_bytes
    waiting = f", kept graphs {more / 1e9:.2f}" if more else ""
    where = "in a node" if plan.link_bytes == gpu.node_bytes else "between nodes"
    chosen = f"; auto is {costs.checkpointing}" if _is_auto(recipe) else ""
    again = f"; {costs.recomputed} of {costs.blocks} blocks recomputed" if costs.recomputed else ""
    graphs = ""
    if costs.kept_graphs:
        graphs = f"; towers of {costs.kept_graphs} of {batch.accumulation} micro-batches run once"
    lines = [
        f"{recipe.model.name}, {costs.parameters:,} parameters, on {batch.ranks:,} × {name}",
        f"batch     {batch.global_batch:,} = {batch.ranks:,} ranks × {batch.accumulation} "
        f"accumulation × {batch.micro_batch} micro-batch",
        f"memory    {_gb(plan.total_bytes)} of {_gb(plan.device_bytes)} per GPU",
        f"{_gb(plan.parameters_bytes):>18} weights",
        f"{_gb(plan.gradients_bytes):>18} gradients",
        f"{_gb(plan.optimizer_bytes):>18} optimizer",
        f"{_gb(plan.activations_bytes):>18} activations ({parts}{waiting}){chosen}{again}",
        f"{_gb(plan.loss_bytes):>18} contrastive loss, gathered features included",
        *([f"{_gb(plan.teacher_bytes):>18} the teacher's weights"] if costs.teacher else []),
        f"{_gb(plan.buffers_bytes):>18} gathered layers, buckets, CUDA and NCCL",
        *_host(plan, gpu),
        f"compute   {_number(plan.flops_per_sample / 1e9)} GFLOP per sample{graphs}; "
        f"{plan.compute_seconds:,.2f} s per step, {plan.utilization:.0%} of "
        f"{_number(gpu.flops / 1e12)} TFLOP/s",
        f"traffic   {_gb(plan.communication_bytes_per_step)} per GPU and step; "
        f"{plan.communication_seconds:,.2f} s at {_number(plan.link_bytes / 1e9)} GB/s {where}, "
        f"{plan.exposed_seconds:,.2f} s of them not behind the computation",
        f"step      {plan.step_seconds:,.2f} s; {plan.samples_per_second:,.0f} samples/s; "
        f"limited by {plan.limited_by}",
    ]
    lines.append(_run(plan, price))
    return "\n".join([*lines, *_advice(recipe, batch, plan)])


def run_page(
    stages: Sequence[PlannedStage],
    suggestions: Sequence[Suggestion | None],
    gpu: Gpu,
    name: str,
    price: float | None = None,
) -> str:
    """A page for each stage, and a table of all where there are several."""
    pages = []
    for stage, found in zip(stages, suggestions, strict=True):
        about = (stage.recipe, stage.batch, stage.costs, stage.plan, gpu, name, price)
        lines = [stage.name] if stage.name else []
        lines.append(plan_page(*about))
        if found is not None:
            lines.append(suggestion_page(stage.plan, found))
        pages.append("\n".join(lines))
    if len(stages) > 1:
        pages.append(stages_table(stages, price))
    return "\n\n".join(pages)


def stages_table(stages: Sequence[PlannedStage], price: float | None = None) -> str:
    """A row for each stage of a run, and their sum."""
    head = ("", "px", "batch", "GFLOP", "memory", "samples/s", "steps", "hours", "GPU-hours", "EUR")
    rows = [head, *(_stage_row(stage, price) for stage in stages)]
    total = total_of(stages, price)
    if total.hours is not None and total.gpu_hours is not None:
        memory = max(stage.plan.total_bytes for stage in stages)
        steps = sum(stage.plan.steps or 0 for stage in stages)
        sums = (f"{steps:,}", f"{total.hours:,.1f}", f"{total.gpu_hours:,.0f}")
        gflop = _number((total.flops or 0) / (total.samples or 1) / 1e9)
        euros = "" if total.cost_eur is None else f"{total.cost_eur:,.0f}"
        rows.append(("run", "", "", gflop, _gb(memory), "", *sums, euros))
    rows = [row if price is not None else row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _stage_row(stage: PlannedStage, price: float | None) -> tuple[str, ...]:
    batch, plan = stage.batch, stage.plan
    euros = plan.cost(price)
    return (
        stage.name,
        str(stage.costs.image_size),
        f"{batch.global_batch:,} = {batch.ranks} × {batch.accumulation} × {batch.micro_batch}",
        _number(plan.flops_per_sample / 1e9),
        _gb(plan.total_bytes),
        f"{plan.samples_per_second:,.0f}",
        f"{plan.steps or 0:,}",
        f"{24 * (plan.days or 0):,.1f}",
        f"{plan.gpu_hours or 0:,.0f}",
        "" if euros is None else f"{euros:,.0f}",
    )


def suggestion_page(before: Plan, found: Suggestion) -> str:
    """What to set, and what that comes to."""
    if not found.is_better(before):
        return "suggest   nothing: no micro-batch, recomputation or ZeRO stage makes a step shorter"
    costs, plan = found.costs, found.plan
    again = f"; {costs.recomputed} of {costs.blocks} blocks recomputed" if costs.recomputed else ""
    return (
        f"suggest   {' '.join(found.overrides)}\n"
        f"          step {before.step_seconds:,.2f} → {plan.step_seconds:,.2f} s; memory "
        f"{_gb(before.total_bytes)} → {_gb(plan.total_bytes)} of {_gb(plan.device_bytes)}{again}"
    )


def _run(plan: Plan, price: float | None) -> str:
    """How long all steps take, and what they cost."""
    if plan.days is None:
        return "run       of unknown length: set data.train_samples"
    euros = plan.cost(price)
    cost = "" if euros is None else f"; {euros:,.0f} EUR at {price:,.2f} per GPU-hour"
    return (
        f"run       {plan.steps:,} steps; {plan.days:,.1f} days; "
        f"{plan.gpu_hours:,.0f} GPU-hours{cost}"
    )


def _is_auto(recipe: Recipe) -> bool:
    return recipe.engine.activation_checkpointing == "auto"


def _host(plan: Plan, gpu: Gpu) -> list[str]:
    """What a rank takes of its host, by part."""
    host = plan.host
    beside = f"a save copies {_gb(host.saving)} more where there is room, or waits for the disk"
    if gpu.is_host:
        return [
            f"{_gb(host.process):>18} the process itself",
            f"{_gb(host.loaders):>18} loader processes, pictures to be shuffled, batches ahead",
            f"          {_gb(host.building)} while the model is built; {beside}",
        ]
    offloaded = f", {_gb(host.training)} offloaded" if host.training else ""
    return [
        f"host      {_gb(host.total)} per GPU: {_gb(host.process)} the process itself, "
        f"{_gb(host.loaders)} loaders, {_gb(host.building)} while the model is built{offloaded}; "
        f"{beside}"
    ]


def _advice(recipe: Recipe, batch: BatchSplit, plan: Plan) -> list[str]:
    """What to change where memory or traffic is short."""
    if plan.limited_by == "communication":
        changes = []
        if recipe.engine.zero_stage == 3:
            changes.append("engine.zero_stage=2 gathers no weights in a step, if they fit")
        if batch.accumulation > 1:
            changes.append("a larger train.micro_batch gathers them less often")
        return [f"traffic is the limit: {'; '.join(changes) or 'use fewer GPUs'}"]
    if plan.limited_by == "host":
        return ["the host is the limit: a larger train.micro_batch gives the GPU more at a time"]
    if plan.fits:
        return []
    changes = []
    states = plan.parameters_bytes + plan.gradients_bytes + plan.optimizer_bytes
    if plan.activations_bytes > states:
        if batch.micro_batch > 1:
            changes.append(f"train.micro_batch={batch.micro_batch // 2}")
        if recipe.engine.activation_checkpointing != "full" and not _is_auto(recipe):
            changes.append("engine.activation_checkpointing=full")
    elif recipe.engine.zero_stage < 3:
        changes.append("engine.zero_stage=3")
    return [f"does not fit: {' or '.join(changes or ['more GPUs'])} needs less"]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 or size == 0 else f"{size / 1e6:,.2f} MB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
