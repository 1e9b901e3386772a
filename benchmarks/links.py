"""A step over links of a known speed, held against what `coca-scale plan` simulates.

    sudo python benchmarks/links.py [--out FILE] [--rounds 15]

Each rank is in a Linux network namespace of its own, as if it were a node: a veth pair to a bridge,
and a token bucket (tc's tbf) on what it sends. On links without a limit the step's median says what
computing takes with as many ranks on these cores. With that and the link's rate, and nothing else
fitted, the plan of the same recipe is compared with the median of real steps on every limited link.
There is no delay beside that of the bucket. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coca_scale.planning.costs import caption_quantiles, count_costs
from coca_scale.planning.gpus import Gpu
from coca_scale.planning.plan import Plan, make_plan, step_flops
from coca_scale.recipe import BatchSplit, Recipe, load_recipe

NODE, BRIDGE, NETWORK, PORT = "coca{}", "cocabr", "10.77.0.{}", 29477
RATES = (None, 400, 200, 100)  # Mbit/s
CASES = (  # ranks, stage, micro-batch, accumulation
    *((2, 3, 64, 1), (2, 3, 32, 2), (2, 2, 64, 1), (2, 1, 64, 1)),
    *((4, 3, 32, 1), (4, 3, 16, 2), (4, 2, 32, 1)),
)
KEYS = ("ranks", "zero_stage", "micro_batch", "accumulation")
PAYLOAD = 1448 / 1514  # of an Ethernet frame


def recipe_of(ranks: int, stage: int, micro: int, accumulation: int) -> Recipe:
    """A small CoCa."""
    return load_recipe(
        "recipes/tiny.yaml",
        [
            *(f"train.global_batch={ranks * micro * accumulation}", "run.dir=/nowhere"),
            *(f"train.micro_batch={micro}", f"engine.zero_stage={stage}"),
        ],
    )


@contextmanager
def nodes(count: int) -> Iterator[None]:
    """Namespaces with a network between them."""
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    try:
        _ip("link", "set", BRIDGE, "up")
        for number in range(1, count + 1):
            name, outside = NODE.format(number), f"{BRIDGE}{number}"
            _ip("netns", "add", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outside, "master", BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{NETWORK.format(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for number in range(1, count + 1):  # a namespace is gone some time after it is deleted
            subprocess.run(["ip", "link", "del", f"{BRIDGE}{number}"], check=False)
            subprocess.run(["ip", "netns", "del", NODE.format(number)], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def run_ranks(ranks: int, rounds: int) -> list[dict[str, Any]]:
    """All cases of a number of ranks; rows of rank 0."""
    with tempfile.TemporaryDirectory() as folder, nodes(ranks):
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--rounds", str(rounds), "--out", str(out), "--rank"]
        started = []
        try:
            for rank in range(ranks):
                inside = ["ip", "netns", "exec", NODE.format(rank + 1), *command]
                started.append(subprocess.Popen(inside, env=_environment(rank, ranks)))
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def _environment(rank: int, ranks: int) -> dict[str, str]:
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": NETWORK.format(1),
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "eth0",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own}


def work(rounds: int, out: Path) -> None:
    """What a rank does: every case, on every link."""
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale
    from coca_scale.model.config import ModelConfig

    torch.set_num_threads(1)
    world = start_world(60)
    rows = []
    for case in CASES:
        if case[0] != world.size:
            continue
        recipe = recipe_of(*case)
        split = BatchSplit.from_recipe(recipe, world.size)
        torch.manual_seed(0)
        config = ModelConfig.from_recipe(recipe.model)
        engine = TrainEngine(CoCa(config), LogitScale(), recipe, split, world)
        samples, size = split.samples_per_rank, config.vision_cfg.image_size
        images = torch.randint(0, 256, (samples, 3, size, size), dtype=torch.uint8)
        mean, context = recipe.data.mean_tokens, config.context_length
        captions = engine.lay_out(caption_quantiles(samples, mean, context, config.pad_id))
        for _ in range(3):  # DeepSpeed records an order
            engine.step(images, captions, 1e-4).result()
        seconds: dict[int | None, list[float]] = {rate: [] for rate in RATES}
        sent = dict.fromkeys(RATES, 0)
        for _ in range(rounds):  # in turns, so that a busy machine hits all of them
            for rate in RATES:
                limit(rate)
                before, began = _sent(), time.perf_counter()
                engine.step(images, captions, 1e-4).result()
                seconds[rate].append(time.perf_counter() - began)
                sent[rate] += _sent() - before
        rows += [
            {
                **dict(zip(KEYS, case, strict=True)),
                "mbit_per_second": rate,
                "sent_bytes": sent[rate] / len(seconds[rate]),
                "step_seconds": statistics.median(seconds[rate]),
                "quartiles": statistics.quantiles(seconds[rate])[::2],
                "least_seconds": min(seconds[rate]),
                "load": os.getloadavg()[0],
            }
            for rate in RATES
        ]
        limit(None)
        engine.close()
    if world.rank == 0:
        out.write_text(json.dumps(rows))
    end_world()


def limit(mbit: int | None) -> None:
    """What this namespace sends, from now on."""
    if mbit is None:
        subprocess.run(
            ["tc", "qdisc", "del", "dev", "eth0", "root"], check=False, capture_output=True
        )
        return
    bucket = ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "400ms")
    subprocess.run(["tc", "qdisc", "replace", "dev", "eth0", "root", *bucket], check=True)


def _sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def predict(row: Mapping[str, Any], unlimited: Mapping[str, Any]) -> dict[str, float]:
    """The plan of a case whose steps on links without a limit are known; by medians and leasts."""
    found = {}
    for kind, prefix in (("step_seconds", ""), ("least_seconds", "least_")):
        plan = _plan(row, unlimited[kind])
        found |= {
            f"{prefix}planned_seconds": plan.step_seconds,
            f"{prefix}error": plan.step_seconds / row[kind] - 1,
        }
    return found | {
        "planned_traffic_seconds": plan.communication_seconds,
        "planned_sent_bytes": plan.communication_bytes_per_step,
    }


def _plan(row: Mapping[str, Any], compute: float) -> Plan:
    recipe = recipe_of(*(row[key] for key in KEYS))
    split = BatchSplit.from_recipe(recipe, row["ranks"])
    costs = count_costs(recipe, split)
    rate = step_flops(split, costs) / compute
    link = row["mbit_per_second"] * 1e6 / 8 * PAYLOAD
    device = Gpu(12e9, rate, link, link, float("inf"), 1.0, 0.0, is_host=True)
    return make_plan(recipe, split, costs, device, 1, None)


def main() -> None:
    """All cases, or one of their ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/links_cpu.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        work(options.rounds, options.out)
        return
    about = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows: list[dict[str, Any]] = []
    for ranks in sorted({case[0] for case in CASES}):
        found = run_ranks(ranks, options.rounds)
        compare(found)
        rows += [row | about for row in found]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def compare(rows: list[dict[str, Any]]) -> None:
    """Add the plans of the limited links, and print them."""
    unlimited: dict[str, Any] = {}
    for row in rows:
        if row["mbit_per_second"] is None:
            unlimited = row
            continue
        row.update(predict(row, unlimited))
        print(
            f"{row['ranks']} ranks, ZeRO {row['zero_stage']}, {row['accumulation']} × "
            f"{row['micro_batch']}, {row['mbit_per_second']} Mbit/s: traffic "
            f"{row['planned_traffic_seconds']:.2f} s; medians: computing "
            f"{unlimited['step_seconds']:.2f} s, planned {row['planned_seconds']:.2f} s, took "
            f"{row['step_seconds']:.2f} s ({row['error']:+.1%}); leasts: "
            f"{unlimited['least_seconds']:.2f} s, {row['least_planned_seconds']:.2f} s, "
            f"{row['least_seconds']:.2f} s ({row['least_error']:+.1%}); sent "
            f"{row['sent_bytes'] / row['planned_sent_bytes']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
