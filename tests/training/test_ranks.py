"""What a run finds out about its ranks and nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import on_ranks


def look_around(rank, ranks, folder):
    import time

    from coca_scale.data.sample import DataError
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.errors import AgreedError
    from coca_scale.training.meter import Meter
    from coca_scale.training.preflight import preflight

    class Unreachable:
        def check(self):
            raise DataError("4 of 4 shards are missing")

    world = replace(start_world(60), hosts=("n1", "n2"))
    meter = Meter(world, global_batch=8, straggler_factor=0.2)
    for _ in range(4):
        with meter.waiting_for_data():
            time.sleep(0.2 * rank)
        with meter.waiting_for_others():
            world.barrier()
        meter.steps += 1
    times, notes = meter.read()
    faults = []
    for own_folder, sources in ((folder, []), (f"{folder}/{rank}", []), (folder, [Unreachable()])):
        try:
            preflight(world, Path(own_folder), sources if rank == 1 else [])
            faults.append(None)
        except AgreedError as error:
            faults.append(str(error))
    end_world()
    return times, notes, faults


def read_devices(rank, ranks, readings):
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.training.meter import Meter

    world = replace(start_world(60), hosts=("n1", "n2", "n2"))
    meter = Meter(world, global_batch=8, straggler_factor=0.2)
    found = [meter.read(seconds[rank]) for seconds in readings]
    end_world()
    return found


@pytest.mark.slow
def test_a_device_is_named_that_is_slow_again_and_again():
    alike, slow, other = (1.0, 1.1, 0.9), (1.0, 1.1, 1.4), (1.5, 1.0, 1.0)
    readings = [alike, slow, slow, alike, slow, slow, other, slow, slow, slow, slow, alike]
    for found in on_ranks(read_devices, 3, readings):
        named = [number for number, (_, notes) in enumerate(found) if notes]
        assert named == [9, 10]  # in the third reading in a row, and while that lasts
        times, notes = found[9]
        assert notes == ["slow device: rank 2 on n2 computes 1.3 times as long as the median"]
        assert (times["compute_seconds"], times["compute_slowest_rank"]) == (1.1, 2)
        assert times["compute_slowest_host"] == "n2"
        assert times["compute_slowdown"] == pytest.approx(1.4 / 1.1)


@pytest.mark.slow
def test_slow_ranks_and_faulty_nodes_are_named(tmp_path):
    for times, notes, faults in on_ranks(look_around, 2, str(tmp_path)):
        assert times["slowest_rank"] == 1
        assert 0.1 < times["straggler_seconds"] < 1.0
        assert times["data_wait_fraction_max"] > times["data_wait_fraction"] > 0.2
        assert "compute_slowdown" not in times
        assert len(notes) == 1 and "rank 1 on n2" in notes[0]
        assert faults[0] is None
        assert faults[1].startswith("n2: does not see what rank 0 wrote")
        assert faults[2] == "n2: 4 of 4 shards are missing"
