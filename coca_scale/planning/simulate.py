"""A step as events: what computes, what travels meanwhile, and what has to wait for what travels.

The device goes through a model's units, the host some layers ahead of it. Weights and gradients
travel one after the other on each of two lanes: between all ranks, and inside a node for what
`engine.secondary_shard` keeps there. When they set out and what waits for them is as in
zero3_layers.py, zero3.py and DeepSpeed's ZeRO 1 and 2. What a link takes to begin, and what it
takes from the device's own memory and kernels, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

from coca_scale.engine.config import LIVE
from coca_scale.planning.units import Unit

TOWERS = ("text", "image")
OVERLAP = 3  # device and host hide behind each other: (a³ + b³)^⅓
STEADY = 4  # passes, after which one more takes what the last took


@dataclass(frozen=True)
class Network:
    """How weights and gradients travel.

    Attributes:
        stage: of ZeRO.
        ranks: of all nodes.
        ranks_per_node: of one.
        element_bytes: of a weight or gradient.
        bytes_per_second: between all ranks.
        node_bytes_per_second: between those of a node.
        bucket: elements that are fetched ahead, or reduced together.
        reduced: times that a gradient is sent in a reduction.
        host_ahead: layers by which the host may be ahead of the device.
        buckets_ahead: reductions that may be under way while the device goes on.
        own_layers: whether blocks are gathered by zero3_layers.py, and all else by DeepSpeed.
        secondary: whether the backward pass gathers inside the node.
        features_bytes: of a rank's samples.
        features_twice: whether they are gathered again for the contrastive loss.
    """

    stage: int
    ranks: int
    ranks_per_node: int
    element_bytes: int
    bytes_per_second: float
    node_bytes_per_second: float
    bucket: int
    reduced: int
    host_ahead: int
    buckets_ahead: int
    own_layers: bool
    secondary: bool
    features_bytes: int
    features_twice: bool

    def faster(self, factor: float) -> Network:
        """The same on other links."""
        return replace(
            self,
            bytes_per_second=factor * self.bytes_per_second,
            node_bytes_per_second=factor * self.node_bytes_per_second,
        )


@dataclass(frozen=True)
class Timeline:
    """What a step comes to, on one rank.

    Attributes:
        seconds: of the step.
        sent_bytes: all of them.
        node_bytes: of them, those that stay within the node.
        sending_seconds: that both lanes are busy, one after the other.
    """

    seconds: float
    sent_bytes: float
    node_bytes: float
    sending_seconds: float

    def longer(self, passes: int, last: Timeline, before: Timeline) -> Timeline:
        """With more passes, each of which adds what `last` has more than `before`."""
        return Timeline(
            self.seconds + passes * (last.seconds - before.seconds),
            self.sent_bytes + passes * (last.sent_bytes - before.sent_bytes),
            self.node_bytes + passes * (last.node_bytes - before.node_bytes),
            self.sending_seconds + passes * (last.sending_seconds - before.sending_seconds),
        )


@dataclass(frozen=True)
class Passes:
    """Micro-batches of a step.

    Attributes:
        count: of a rank.
        kept: of them, those whose towers run once, as their graphs are kept.
    """

    count: int
    kept: int = 0

    @property
    def first(self) -> int:
        """Those whose towers run before as well, without gradients."""
        return self.count - self.kept if self.count > 1 else 0

    def without(self, count: int, kept: int) -> Passes:
        """With so many less, `kept` of them with kept graphs."""
        return Passes(self.count - count, self.kept - kept)


class Phase(Enum):
    """What a unit is used for; the first pass has no gradients."""

    FIRST = auto()
    FORWARD = auto()
    BACKWARD = auto()


class Use(NamedTuple):
    """A unit at work: its number and for how long the device has it."""

    number: int
    phase: Phase
    seconds: float


class Program(NamedTuple):
    """What a device goes through in a step.

    Attributes:
        uses: in order.
        collected: number of the last of them before the features of all micro-batches are
            gathered; None where there is one, which goes on meanwhile.
        in_one_order: whether DeepSpeed knows all of them in this order: a single micro-batch, or a
            step with kept graphs (zero3_trace.py). Else its order begins anew with every pass.
    """

    uses: list[Use]
    collected: int | None
    in_one_order: bool


def simulate(
    units: Sequence[Unit], passes: Passes, device: float, host: float, network: Network
) -> Timeline:
    """One step.

    Args:
        units: of the model, as the forward pass comes to them.
        passes: micro-batches of a rank.
        device: seconds of a step that the device needs to compute.
        host: seconds that the host needs to issue it.
        network: between the ranks; without others there is nothing to wait for.
    """
    if network.ranks == 1:
        return Timeline(overlapped(device, host), 0.0, 0.0, 0.0)
    per_flop, per_block = (
        seconds / max(1, whole)
        for seconds, whole in zip((device, host), _work(units, passes), strict=True)
    )

    def line(passes: Passes) -> Timeline:
        return _Step(units, program_of(units, passes, per_flop, per_block), network).run()

    kept, plain = passes.kept, passes.count - passes.kept
    some = Passes(min(kept, STEADY) + min(plain, STEADY), min(kept, STEADY))
    found = last = line(some)
    for more, fewer in ((plain - STEADY, (1, 0)), (kept - STEADY, (1, 1))):
        if more > 0:
            found = found.longer(more, last, line(some.without(*fewer)))
    return found


def overlapped(device: float, host: float) -> float:
    """Seconds of what the device computes while the host issues it."""
    return float((device**OVERLAP + host**OVERLAP) ** (1 / OVERLAP))


def program_of(units: Sequence[Unit], passes: Passes, per_flop: float, per_block: float) -> Program:
    """The order of a step, of which the device takes `per_flop` and the host `per_block` seconds.

    With more than one micro-batch the towers run before: without gradients, or with graphs that are
    kept.
    """
    everything = range(len(units))
    towers = [n for n in everything if units[n].part in TOWERS]
    rest = [(n, Phase.FORWARD) for n in everything if units[n].part not in TOWERS]
    backward = [(n, Phase.BACKWARD) for n in reversed(everything)]
    order = passes.first * [(n, Phase.FIRST) for n in towers]
    order += passes.kept * [(n, Phase.FORWARD) for n in towers]
    collected = len(order) - 1 if order else None
    order += passes.kept * (rest + backward)
    whole = [(n, Phase.FORWARD) for n in everything]
    order += (passes.count - passes.kept) * (whole + backward)
    parts = [
        overlapped(per_flop * _flops(units[n], phase), per_block * _issued(units[n], phase))
        for n, phase in order
    ]
    flops, issued = _work(units, passes)
    scale = overlapped(per_flop * flops, per_block * issued) / sum(parts)
    dealt = [Use(n, phase, scale * part) for (n, phase), part in zip(order, parts, strict=True)]
    return Program(dealt, collected, passes.count == 1 or passes.kept > 0)


def _work(units: Sequence[Unit], passes: Passes) -> tuple[float, float]:
    """FLOPs of a step, and blocks that the host issues, of which a backward pass counts twice."""
    phases = (Phase.FORWARD, Phase.BACKWARD)
    towers = [unit for unit in units if unit.part in TOWERS]
    flops, issued = (
        passes.first * sum(of(unit, Phase.FIRST) for unit in towers)
        + passes.count * sum(of(unit, phase) for unit in units for phase in phases)
        for of in (_flops, _issued)
    )
    return flops, issued


def _issued(unit: Unit, phase: Phase) -> int:
    return unit.block * (2 if phase == Phase.BACKWARD else 1)


def _flops(unit: Unit, phase: Phase) -> float:
    return unit.backward_flops if phase == Phase.BACKWARD else unit.forward_flops


class _Lane:
    """What travels one after the other."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free = self.busy = self.sent = 0.0

    def send(self, size: float, ready: float) -> float:
        """When `size` bytes are there that may set out when `ready`."""
        seconds = size / self._rate
        self._free = max(self._free, ready) + seconds
        self.busy += seconds
        self.sent += size
        return self._free


class _Step:
    """The state of a simulated step."""

    def __init__(self, units: Sequence[Unit], program: Program, network: Network) -> None:
        self._units, self._network = units, network
        self._program, self._collected = program.uses, program.collected
        self._all, self._node = (
            _Lane(rate) for rate in (network.bytes_per_second, network.node_bytes_per_second)
        )
        self._clock = 0.0  # of the device
        self._ends: list[float] = []  # of the uses so far
        self._there: dict[int, float] = {}  # when weights are, or will be
        self._live = self._waiting = 0  # elements of weights, of gradients for the next bucket
        self._reduced: list[float] = []  # when buckets were
        self._own = [network.own_layers and unit.block for unit in units]
        self._stays = needed_soon(units, program, self._own) if network.stage == 3 else []

    def run(self) -> Timeline:
        """To the end."""
        features, phase = 0.0, self._program[0].phase
        for k, use in enumerate(self._program):
            turns = phase == Phase.FORWARD and use.phase == Phase.BACKWARD
            if turns and self._collected is None:
                self._wait_for_features(features)
            self._use(k)
            if self._collected is None and use.phase == Phase.FORWARD and self._leaves_towers(k):
                features = self._send_features(self._clock)
            if k == self._collected:
                self._wait_for_features(self._send_features(self._clock))
            if use.phase == Phase.BACKWARD and use.number == 0:
                self._end_pass(k + 1 == len(self._program))
            phase = use.phase
        sent, busy = self._all.sent + self._node.sent, self._all.busy + self._node.busy
        return Timeline(self._clock, sent, self._node.sent, busy)

    def _use(self, k: int) -> None:
        use, sharded = self._program[k], self._network.stage == 3
        if sharded:
            self._fetch(k)
            self._clock = max(self._clock, self._there[use.number])
        self._clock += use.seconds
        self._ends.append(self._clock)
        if sharded and not (self._stays[k] and self._live <= LIVE):
            self._live -= self._units[use.number].elements
            del self._there[use.number]
        if use.phase == Phase.BACKWARD:
            self._add_gradients(self._units[use.number].trained)

    def _fetch(self, k: int) -> None:
        """Gather the weights of a use, and of those behind it, of the same phase and chain."""
        use, before = self._program[k], k - 1 - self._network.host_ahead
        issued = self._ends[before] if before >= 0 else 0.0
        unit, own = self._units[use.number], self._own[use.number]
        self._gather(use, issued)
        ahead = 0
        for following in self._program[k + 1 :]:
            other = self._units[following.number]
            if following.phase != use.phase or ahead >= self._network.bucket:
                break
            if self._own[following.number] != own:
                continue
            if (own and other.part != unit.part) or self._live + other.elements > LIVE:
                break
            ahead += other.elements
            self._gather(following, issued)

    def _gather(self, use: Use, issued: float) -> None:
        if use.number in self._there:
            return
        network, elements = self._network, self._units[use.number].elements
        inside = network.secondary and use.phase == Phase.BACKWARD
        ranks = network.ranks_per_node if inside else network.ranks
        size = elements * network.element_bytes * (ranks - 1) / ranks
        self._there[use.number] = (self._node if inside else self._all).send(size, issued)
        self._live += elements

    def _add_gradients(self, elements: int) -> None:
        """Of a unit. ZeRO-1 keeps those of all passes but the last."""
        if self._network.stage < 2 and not self._is_last_pass():
            return
        if self._network.stage > 0 and self._waiting + elements > self._network.bucket:
            self._reduce()
        self._waiting += elements

    def _is_last_pass(self) -> bool:
        return len(self._program) - len(self._ends) < len(self._units)

    def _reduce(self) -> None:
        network = self._network
        share = network.reduced * (network.ranks - 1) / network.ranks
        size = self._waiting * network.element_bytes * share
        self._waiting = 0
        self._reduced.append(self._all.send(size, self._clock))
        if len(self._reduced) > network.buckets_ahead:
            self._clock = max(self._clock, self._reduced[-1 - network.buckets_ahead])

    def _end_pass(self, last: bool) -> None:
        """Gradients have arrived; after the last pass ZeRO-1 and 2 gather the new weights."""
        network = self._network
        if self._waiting:
            self._reduce()
        self._clock = max([self._clock, *self._reduced[-1:]])
        if last and network.stage in (1, 2):
            weights = sum(unit.elements for unit in self._units) * network.element_bytes
            size = weights * (network.ranks - 1) / network.ranks
            self._clock = self._all.send(size, self._clock)

    def _leaves_towers(self, k: int) -> bool:
        here, behind = (self._units[use.number].part for use in self._program[k : k + 2])
        return here in TOWERS and (
            behind not in TOWERS or self._program[k + 1].phase == Phase.BACKWARD
        )

    def _send_features(self, ready: float) -> float:
        return self._all.send((self._network.ranks - 1) * self._network.features_bytes, ready)

    def _wait_for_features(self, there: float) -> None:
        """The contrastive loss needs them."""
        self._clock = max(self._clock, there)
        if self._network.features_twice:
            self._clock = self._send_features(self._clock)


def needed_soon(units: Sequence[Unit], program: Program, own: Sequence[bool]) -> list[bool]:
    """Of each use, whether at most `LIVE` elements are used until the same weights are again.

    What is not in `own` DeepSpeed has, whose order may begin anew with every pass; and embeddings
    and projections of the towers, whose inputs have no gradients, it lets go after every pass.
    """
    soon = [False] * len(program.uses)
    used = {True: 0, False: 0}
    last: dict[int, tuple[int, int]] = {}
    for k, (number, _, _) in enumerate(program.uses):
        kind = own[number]
        if number in last and (kind or program.in_one_order):
            before, after_it = last[number]
            begins_tower = not kind and units[number].part in TOWERS
            turned = program.uses[before].phase == Phase.BACKWARD
            soon[before] = used[kind] - after_it <= LIVE and not (begins_tower and turned)
        used[kind] += units[number].elements
        last[number] = k, used[kind]
    return soon
