"""What a simulated step waits for, where that can be said without it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coca_scale.engine.config import LIVE
from coca_scale.planning.simulate import (
    Network,
    Passes,
    Phase,
    needed_soon,
    overlapped,
    program_of,
    simulate,
)
from coca_scale.planning.units import Unit

BLOCK = 1_000_000
# two towers of three blocks, a decoder of two, each behind what is no block
MODEL = tuple(
    Unit(part, block, BLOCK if block else BLOCK // 2, BLOCK, 1e9 * block, 2e9 * block)
    for part, blocks in (("text", 3), ("image", 3), ("decoder", 2))
    for block in (False, *[True] * blocks)
)
TOWERS = [n for n, unit in enumerate(MODEL) if unit.part != "decoder"]
ELEMENTS = sum(unit.elements for unit in MODEL)
DEVICE = 1.0
CARD = Network(
    stage=3,
    ranks=4,
    ranks_per_node=4,
    element_bytes=2,
    bytes_per_second=1e12,
    node_bytes_per_second=1e12,
    bucket=2 * BLOCK,
    reduced=1,
    host_ahead=0,
    buckets_ahead=2,
    own_layers=True,
    secondary=False,
    features_bytes=0,
    features_twice=False,
)
HOST = replace(CARD, reduced=2, buckets_ahead=0)
ALL = {"stage 3": CARD, "CPUs": HOST, "stage 2": replace(CARD, stage=2, reduced=2)}


def step(network, passes=1, units=MODEL, device=DEVICE, host=0.0, kept=0):
    return simulate(units, Passes(passes, kept), device, host, network)


def program(passes, kept=0):
    """Of a step in which a FLOP takes a nanosecond."""
    return program_of(MODEL, Passes(passes, kept), 1e-9, 0.0)


def test_one_rank_takes_what_it_takes_to_compute():
    alone = step(replace(CARD, ranks=1), host=DEVICE)
    assert alone.seconds == overlapped(DEVICE, DEVICE) == pytest.approx(2 ** (1 / 3))
    assert alone.sent_bytes == alone.sending_seconds == 0


@pytest.mark.parametrize("network", ALL.values(), ids=ALL)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_is_between_the_longer_of_both_and_their_sum(network, passes):
    for rate in (1e5, 1e7, 1e9, 1e13):
        line = step(replace(network, bytes_per_second=rate), passes)
        assert max(DEVICE, line.sending_seconds) <= line.seconds * (1 + 1e-9)
        assert line.seconds <= (DEVICE + line.sending_seconds) * (1 + 1e-9)
    assert line.seconds == pytest.approx(DEVICE, rel=1e-3)  # on the fastest


@pytest.mark.parametrize("network", ALL.values(), ids=ALL)
@pytest.mark.parametrize("kept", [0, 2, 7, 10])
def test_passes_that_are_not_simulated_are_as_the_last(network, kept):
    # ten at once, without a shortcut
    from coca_scale.planning import simulate as module

    slow = replace(network, bytes_per_second=2e7)
    short = step(slow, 10, kept=kept)
    flops = sum(use.seconds for use in program(10, kept).uses) * 1e9
    made = program_of(MODEL, Passes(10, kept), DEVICE / flops, 0.0)
    whole = module._Step(MODEL, made, slow).run()
    assert short.seconds == pytest.approx(whole.seconds, rel=1e-6)
    assert short.sent_bytes == pytest.approx(whole.sent_bytes)


def test_what_computes_is_dealt_out_whole_and_in_order():
    made = program_of(MODEL, Passes(2), 1e-9, 1e-2)
    flops, issued = 1e9 * (2 * 6 + 2 * 3 * 8), 2 * 6 + 2 * 3 * 8
    whole = overlapped(1e-9 * flops, 1e-2 * issued)
    assert sum(use.seconds for use in made.uses) == pytest.approx(whole)
    assert [use.number for use in made.uses[: 2 * len(TOWERS)]] == 2 * TOWERS
    assert {use.phase for use in made.uses[: 2 * len(TOWERS)]} == {Phase.FIRST}
    assert made.collected == 2 * len(TOWERS) - 1
    forward = list(range(len(MODEL)))
    rest = [use.number for use in made.uses[2 * len(TOWERS) :]]
    assert rest == 2 * (forward + forward[::-1])
    blocks = [use.seconds for use in made.uses[-len(MODEL) :] if MODEL[use.number].block]
    assert blocks == pytest.approx([blocks[0]] * 8)


def test_towers_of_kept_graphs_run_once():
    made, plain = program(4, kept=3), program(4)
    phases = [(use.number, use.phase) for use in made.uses]
    assert phases[: len(TOWERS)] == [(n, Phase.FIRST) for n in TOWERS]
    assert phases[len(TOWERS) : 4 * len(TOWERS)] == 3 * [(n, Phase.FORWARD) for n in TOWERS]
    assert made.collected == 4 * len(TOWERS) - 1
    behind = [n for n in range(len(MODEL)) if n not in TOWERS]
    turn = [(n, Phase.FORWARD) for n in behind]
    turn += [(n, Phase.BACKWARD) for n in reversed(range(len(MODEL)))]
    assert phases[4 * len(TOWERS) :][: 3 * len(turn)] == 3 * turn
    saved = sum(use.seconds for use in plain.uses) - sum(use.seconds for use in made.uses)
    assert saved == pytest.approx(3 * 6)  # the blocks of both towers, once each
    assert Passes(1).first == 0 and Passes(4, 4).first == 0 and Passes(4, 1).first == 3


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_kept_graphs_gather_no_more_than_what_is_run_twice(kept):
    slow = replace(CARD, bytes_per_second=2e8)
    assert step(slow, 4, kept=kept).sent_bytes <= step(slow, 4).sent_bytes
    line = step(slow, 4, kept=kept)
    assert max(DEVICE, line.sending_seconds) <= line.seconds


def test_reductions_of_cpus_are_waited_for_and_those_of_gpus_are_not():
    # a bucket of two blocks takes as long as the backward pass of one of them
    rate = 2 * BLOCK * 2 * (3 / 4) / (2 / 24)
    stage2 = replace(CARD, stage=2, bytes_per_second=rate)
    gathered = ELEMENTS * 2 * (3 / 4) / rate  # the new weights, by all means
    behind = step(stage2).seconds - DEVICE - gathered
    waited = step(replace(stage2, buckets_ahead=0)).seconds - DEVICE - gathered
    gradients = sum(unit.trained for unit in MODEL) * 2 * (3 / 4) / rate
    assert waited == pytest.approx(gradients)
    assert 0 < behind < gradients / 2  # the last bucket, for which nothing is left to compute


def test_zero_1_reduces_once_and_zero_2_every_time():
    sent = {stage: step(replace(CARD, stage=stage, reduced=2), 3).sent_bytes for stage in (0, 1, 2)}
    gradients = 2 * sum(unit.trained for unit in MODEL) * 2 * 3 / 4
    weights = ELEMENTS * 2 * 3 / 4
    assert sent == pytest.approx({0: gradients, 1: gradients + weights, 2: 3 * gradients + weights})


def test_what_is_fetched_ahead_is_there_and_the_first_of_a_tower_is_not():
    block = BLOCK * 2 * (3 / 4)
    forward = DEVICE / 24  # of a block; one travels in half of that
    fast = replace(CARD, bytes_per_second=2 * block / forward, reduced=0)
    # the first block of each part is behind what is no block, which computes nothing
    waits = step(fast).seconds - DEVICE
    assert 3 * forward / 2 <= waits <= 5 * forward / 2
    ahead = step(replace(fast, host_ahead=4)).seconds - DEVICE
    assert ahead < waits


def test_weights_that_are_used_again_soon_stay():
    own = [unit.block for unit in MODEL]
    assert all(needed_soon(MODEL, program(1), own)[: len(MODEL)])
    large = tuple(replace(unit, elements=LIVE // 4) for unit in MODEL)
    soon = needed_soon(large, program(1), [True] * len(MODEL))
    # between a use and its next are those behind it, twice: two of a quarter each on each side
    assert soon[: len(MODEL)] == [False] * (len(MODEL) - 3) + [True] * 3
    once = step(CARD).sent_bytes
    again = step(CARD, units=large).sent_bytes - step(replace(CARD, reduced=0)).sent_bytes
    assert once < again
    of_deepspeed = [False] * len(MODEL)
    assert not any(needed_soon(MODEL, program(2), of_deepspeed))
    kept = program(2, kept=1)
    soon = needed_soon(MODEL, kept, of_deepspeed)
    let_go = [k for k, use in enumerate(kept.uses) if not soon[k]]
    last = [k for k, use in enumerate(kept.uses) if k >= len(kept.uses) - len(MODEL)]
    towers = [k for k, use in enumerate(kept.uses) if use.number in TOWERS]
    turned = [k for k in towers if kept.uses[k].phase == Phase.BACKWARD]
    assert let_go == sorted({*last, *turned})


def test_a_second_copy_in_the_node_is_gathered_there():
    large = tuple(replace(unit, elements=LIVE) for unit in MODEL)
    nodes = replace(CARD, ranks=8, own_layers=False, bytes_per_second=1e9)
    plain, second = (step(replace(nodes, secondary=s), units=large) for s in (False, True))
    assert plain.node_bytes == 0 < second.node_bytes
    assert second.sent_bytes - second.node_bytes < plain.sent_bytes
    assert second.seconds < plain.seconds
