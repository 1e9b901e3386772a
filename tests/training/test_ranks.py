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
    times, note = meter.read()
    faults = []
    for own_folder, sources in ((folder, []), (f"{folder}/{rank}", []), (folder, [Unreachable()])):
        try:
            preflight(world, Path(own_folder), sources if rank == 1 else [])
            faults.append(None)
        except AgreedError as error:
            faults.append(str(error))
    end_world()
    return times, note, faults


@pytest.mark.slow
def test_slow_ranks_and_faulty_nodes_are_named(tmp_path):
    for times, note, faults in on_ranks(look_around, 2, str(tmp_path)):
        assert times["slowest_rank"] == 1
        assert 0.1 < times["straggler_seconds"] < 1.0
        assert times["data_wait_fraction_max"] > times["data_wait_fraction"] > 0.2
        assert note is not None
        assert "rank 1 on n2" in note
        assert faults[0] is None
        assert faults[1].startswith("n2: does not see what rank 0 wrote")
        assert faults[2] == "n2: 4 of 4 shards are missing"
