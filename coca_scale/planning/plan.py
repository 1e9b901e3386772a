"""Memory, traffic and time of a run that need not exist, from the counts of one micro-batch.

Memory is counted, not estimated: a forward and a backward pass of the real model on tensors without
data say what is alive (`planning/costs.py`). Time is an estimate: what the device needs to compute
and the host to issue it, each mostly behind the other, and what of the traffic a simulated step
(`planning/simulate.py`) has to wait for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from coca_scale.engine.config import (
    BUCKETS_IN_FLIGHT,
    LET_GO_IN_FLIGHT,
    LIVE,
    Transfers,
    deepspeed_config,
    many_at_once,
)
from coca_scale.model import ModelConfig
from coca_scale.planning.gpus import Gpu
from coca_scale.planning.memory import HostBytes, StateBytes, host_bytes, made_whole, state_bytes
from coca_scale.planning.simulate import TOWERS, Network, Passes, overlapped, simulate
from coca_scale.planning.teacher import TeacherCosts
from coca_scale.planning.units import Unit
from coca_scale.recipe import BatchSplit, Recipe

# what a process takes beside tensors: CUDA context, NCCL's buffers, fragmentation
RESERVED_BYTES = 2.5e9
MARGIN = 0.03  # of a device's memory, by which plans were off on GPUs
# of gradients: one fills while the other travels; under ZeRO-3 two travel, and one is put together
REDUCE_BUCKETS = {1: 2, 2: 2, 3: 4}
# measured on one GPU, as `Gpu.utilization` is
COMPILED_BLOCK = 0.6  # of the host's time for a block
BLOCK_BELOW_3 = 1.9  # of DeepSpeed's ZeRO 1 and 2, against 3, whose loops are ours
FIRST_PASS = 1 / 3  # of forward and backward


@dataclass(frozen=True)
class Costs:
    """What one rank computes and holds, counted on one micro-batch.

    Attributes:
        parameters: of the model.
        trained: of all, those that are not locked.
        layer_parameters: of those in layers that ZeRO-3 gathers whole.
        units: of the model, in the order of the forward pass.
        image_size: pixels per side.
        largest_layer: parameters of the largest module that ZeRO-3 gathers at once.
        bucket: elements that ZeRO moves at a time.
        features_bytes: of this rank's samples in the global batch.
        checkpointing: what of a block is recomputed, as the recipe says or `auto` has come to.
        blocks: of the model.
        recomputed: of them, those that are recomputed as a whole to keep to a budget.
        kept_bytes: what a forward pass leaves for its backward pass, by part of the model.
        peak_bytes: most bytes of a micro-batch's activations and their gradients alive.
        graph_bytes: what its towers leave, images included.
        kept_graphs: micro-batches of a step whose towers run once.
        tower_flops: of the forward pass of both towers, per micro-batch.
        step_flops: of forward and backward of everything, per micro-batch.
        bytes_per_flop: that go through the device's memory for each FLOP.
        loss_bytes: most bytes alive in the losses of features of the global batch.
        teacher: what one that runs beside it takes.
    """

    parameters: int
    trained: int
    layer_parameters: int
    units: tuple[Unit, ...]
    image_size: int
    largest_layer: int
    bucket: int
    features_bytes: int
    checkpointing: str
    blocks: int
    recomputed: int
    kept_bytes: dict[str, int]
    peak_bytes: int
    graph_bytes: int
    kept_graphs: int
    tower_flops: int
    step_flops: int
    bytes_per_flop: float
    loss_bytes: int
    teacher: TeacherCosts | None = None

    @property
    def activations_bytes(self) -> int:
        """Most alive in a step: beside the graphs that wait, a micro-batch with one of its own."""
        return self.peak_bytes + self.waiting_graphs * self.graph_bytes

    @property
    def waiting_graphs(self) -> int:
        """Most that are kept while another one is used."""
        return max(0, self.kept_graphs - 1)


@dataclass(frozen=True)
class Plan:
    """A run on N devices; bytes are of one of them, `flops_per_sample` of the whole step.

    `host` is beside the device, except on CPUs, where it is all there is and the total.
    `utilization` is the share of the device's FLOPs that is used while it need not wait for others,
    `exposed_seconds` what of the communication it waits for.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    loss_bytes: int
    buffers_bytes: int
    teacher_bytes: int
    total_bytes: int
    host: HostBytes
    device_bytes: int
    flops_per_sample: float
    communication_bytes_per_step: float
    link_bytes: float
    compute_seconds: float
    utilization: float
    communication_seconds: float
    exposed_seconds: float
    step_seconds: float
    samples_per_second: float
    steps: int | None
    days: float | None
    gpu_hours: float | None
    limited_by: str

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.total_bytes <= self.device_bytes

    def cost(self, price: float | None) -> float | None:
        """Of the run, where a GPU-hour costs `price`; None if one of both is unknown."""
        return None if price is None or self.gpu_hours is None else price * self.gpu_hours

    def json(self) -> dict[str, object]:
        """All numbers."""
        return {**asdict(self), "host_bytes": self.host.total, "fits": self.fits}


@dataclass(frozen=True)
class Memory:
    """Of a rank.

    Attributes:
        state: of weights, gradients and optimizer.
        buffers: bytes of gathered layers and buckets, and what a process takes beside tensors.
        teacher: bytes of its weights.
        teacher_is_cut: whether they are cut over the ranks.
        host: beside the device.
        total: bytes on the device, or in its host where it is that.
    """

    state: StateBytes
    buffers: int
    teacher: int
    teacher_is_cut: bool
    host: HostBytes
    total: int


def memory_of(
    recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu, gpus_per_node: int
) -> Memory:
    """What a rank of a run takes; arguments as of `make_plan`."""
    whole = _memory_with(recipe, batch, costs, gpu, gpus_per_node, False)
    placement = recipe.loss.distill.placement
    no_room = whole.total > gpu.memory_bytes * (1 - MARGIN)
    cut = placement == "sharded" or (placement == "auto" and no_room)
    if costs.teacher is None or batch.ranks == 1 or not cut:
        return whole
    return _memory_with(recipe, batch, costs, gpu, gpus_per_node, True)


def _memory_with(
    recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu, gpus_per_node: int, cut: bool
) -> Memory:
    """As `memory_of`, with a teacher that is cut or whole."""
    taught = costs.teacher
    teacher = 0 if taught is None else taught.weights_bytes // (batch.ranks if cut else 1)
    state = state_bytes(recipe, batch, costs.parameters, costs.trained, gpus_per_node)
    buffers = _buffer_bytes(costs, recipe, batch, gpus_per_node)
    reserved = RESERVED_BYTES if gpu.memory_bytes > 30e9 else 0
    working = costs.activations_bytes + costs.loss_bytes + buffers
    if taught is not None:  # which is through before the model begins
        gathered = 2 * taught.weights_bytes // max(1, taught.blocks) if cut else 0
        working = max(working, taught.peak_bytes + gathered + buffers)
    here = round(state.total + teacher + working + state.updating) if gpu.is_host else 0
    built = made_whole(ModelConfig.from_recipe(recipe.model), costs.parameters)
    built += 0 if taught is None else taught.parameters
    in_host = host_bytes(
        recipe, batch, costs.image_size, built, state.offloaded + here, state.saved
    )
    total = round(state.total + teacher + max(working, state.updating) + reserved)
    total = in_host.total if gpu.is_host else total
    return Memory(state, round(buffers + reserved), teacher, cut, in_host, total)


def make_plan(
    recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu, gpus_per_node: int, steps: int | None
) -> Plan:
    """Put the counts of one micro-batch together.

    Args:
        recipe: of the run.
        batch: its batch over the ranks.
        costs: counted for its micro-batch and global batch.
        gpu: the device of every rank.
        gpus_per_node: ranks that share a node.
        steps: of the run, None if unknown.
    """
    memory = memory_of(recipe, batch, costs, gpu, gpus_per_node)
    state = memory.state
    flops = step_flops(batch, costs)
    device, host = compute_seconds(recipe, batch, costs, gpu)
    compute = overlapped(device, host)
    network = network_of(recipe, batch, costs, gpu, gpus_per_node)
    passes = Passes(batch.accumulation, costs.kept_graphs)
    line = simulate(costs.units, passes, device, host, network)
    limit = "memory" if memory.total > gpu.memory_bytes else "compute"
    if limit == "compute" and _waits_for_links(costs, batch, device, host, network):
        limit = "communication"
    elif limit == "compute" and host > device:
        limit = "host"
    sent = _sent_for_teacher(batch, costs, network) if memory.teacher_is_cut else 0.0
    taught = sent / network.bytes_per_second
    step = line.seconds + max(0.0, taught - _teacher_flops(batch, costs) / flops * device)
    seconds = None if steps is None else steps * step
    return Plan(
        parameters_bytes=state.parameters,
        gradients_bytes=state.gradients,
        optimizer_bytes=state.optimizer,
        activations_bytes=costs.activations_bytes,
        loss_bytes=costs.loss_bytes,
        buffers_bytes=memory.buffers,
        teacher_bytes=memory.teacher,
        total_bytes=memory.total,
        host=memory.host,
        device_bytes=round(gpu.memory_bytes),
        flops_per_sample=flops / batch.samples_per_rank,
        communication_bytes_per_step=line.sent_bytes + sent,
        link_bytes=network.bytes_per_second,
        compute_seconds=compute,
        utilization=flops / (gpu.flops * compute),
        communication_seconds=line.sending_seconds + taught,
        exposed_seconds=step - compute,
        step_seconds=step,
        samples_per_second=batch.global_batch / step,
        steps=steps,
        days=None if seconds is None else seconds / 86400,
        gpu_hours=None if seconds is None else seconds / 3600 * batch.ranks,
        limited_by=limit,
    )


def step_flops(batch: BatchSplit, costs: Costs) -> int:
    """Of a rank in a step."""
    own = costs.step_flops * batch.accumulation + costs.tower_flops * first_passes(batch, costs)
    return own + _teacher_flops(batch, costs)


def _teacher_flops(batch: BatchSplit, costs: Costs) -> int:
    return 0 if costs.teacher is None else costs.teacher.forward_flops * batch.accumulation


def _sent_for_teacher(batch: BatchSplit, costs: Costs, network: Network) -> float:
    """Bytes of a step in which a teacher's blocks are gathered for every micro-batch."""
    assert costs.teacher is not None
    share = (network.ranks - 1) / network.ranks
    return costs.teacher.weights_bytes * share * batch.accumulation


def first_passes(batch: BatchSplit, costs: Costs) -> int:
    """Micro-batches of a step whose towers run twice."""
    return Passes(batch.accumulation, costs.kept_graphs).first


def compute_seconds(
    recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu
) -> tuple[float, float]:
    """Of a step on one device: what its kernels take, and what the host takes to issue them."""
    per_flop = 1 / (gpu.flops * gpu.utilization) + costs.bytes_per_flop / gpu.memory_rate
    device = step_flops(batch, costs) * per_flop
    passes = batch.accumulation + FIRST_PASS * first_passes(batch, costs)
    blocks = passes * costs.blocks
    if costs.teacher is not None:
        blocks += FIRST_PASS * batch.accumulation * costs.teacher.blocks
    host = blocks * gpu.block_seconds
    if recipe.engine.compile == "blocks":
        host *= COMPILED_BLOCK
    if recipe.engine.zero_stage in (1, 2):
        host *= BLOCK_BELOW_3
    return device, host


def network_of(
    recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu, ranks_per_node: int
) -> Network:
    """How the run's weights and gradients travel.

    Ring collectives send (W−1)/W of what they make whole. DeepSpeed's ZeRO 0 to 2 reduce with an
    all-reduce, which sends it twice; so does gloo, whatever it is asked for.
    """
    stage, several = recipe.engine.zero_stage, batch.ranks > ranks_per_node
    return Network(
        stage=stage,
        ranks=batch.ranks,
        ranks_per_node=min(batch.ranks, ranks_per_node),
        element_bytes=_element(recipe),
        bytes_per_second=gpu.network_bytes if several else gpu.node_bytes,
        node_bytes_per_second=gpu.node_bytes,
        bucket=costs.bucket,
        reduced=1 if stage == 3 and not gpu.is_host else 2,
        # on CPUs the host computes, and waits for what it reduces
        host_ahead=0 if gpu.is_host else LET_GO_IN_FLIGHT,
        buckets_ahead=0 if gpu.is_host else BUCKETS_IN_FLIGHT if stage == 3 else 1,
        own_layers=_own_layers(costs, recipe, batch, ranks_per_node) > 0,
        secondary=recipe.engine.secondary_shard and several,
        features_bytes=costs.features_bytes,
        features_twice=batch.global_batch > recipe.loss.contrastive_resident,
    )


def _waits_for_links(
    costs: Costs, batch: BatchSplit, device: float, host: float, network: Network
) -> bool:
    """Whether links of twice the speed would make a step shorter than twice the computation."""
    passes = Passes(batch.accumulation, costs.kept_graphs)
    links = simulate(costs.units, passes, device, host, network.faster(2))
    computing = simulate(costs.units, passes, device / 2, host / 2, network)
    return links.seconds < computing.seconds


def _element(recipe: Recipe) -> int:
    return 4 if recipe.engine.precision == "fp32" else 2


def _own_layers(costs: Costs, recipe: Recipe, batch: BatchSplit, ranks_per_node: int) -> int:
    """Weights in layers that zero3_layers.py gathers, and not DeepSpeed, at stage 3."""
    config = deepspeed_config(recipe, batch, Transfers(costs.bucket, 0), ranks_per_node)
    return costs.layer_parameters if many_at_once(config) else 0


def _buffer_bytes(costs: Costs, recipe: Recipe, batch: BatchSplit, ranks_per_node: int) -> float:
    """Parameters gathered for the layers that run and come next, gradients on their way."""
    stage, element = recipe.engine.zero_stage, _element(recipe)
    if batch.ranks == 1 or stage == 0:
        return 0.0
    reduce = REDUCE_BUCKETS[stage] * min(costs.bucket, costs.trained) * element
    if stage < 3:
        return reduce
    layers = _own_layers(costs, recipe, batch, ranks_per_node)
    others, running = costs.parameters - layers, costs.largest_layer + costs.bucket
    # of what DeepSpeed lets go of, autograd keeps what linear layers saw until the backward pass,
    # for which it is gathered once more
    others += running if others > LIVE // 2 else 0
    if layers == 0:  # and each graph its own
        towers = sum(unit.elements for unit in costs.units if unit.part in TOWERS)
        others += costs.waiting_graphs * towers
    return reduce + (others + min(layers, LIVE // 2 + running)) * element
