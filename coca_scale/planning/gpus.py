"""What accelerators can do, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        memory_bytes: that a process finds free.
        flops: per second, dense, with 16-bit inputs.
        node_bytes: per second and direction to the other devices of a node.
        network_bytes: per second and direction to other nodes, its share of the node's adapters.
        memory_rate: bytes per second between the device and its memory.
        utilization: share of `flops` that matrix products reach.
        block_seconds: that the host takes to issue a block forward and backward under ZeRO-3.
        is_host: whether its memory is that of the host.
    """

    memory_bytes: float
    flops: float
    node_bytes: float
    network_bytes: float
    memory_rate: float
    # of an H100 under torch 2.11, and of the host that it came with (benchmarks/README.md); other
    # GPUs are assumed to be alike
    utilization: float = 0.80
    block_seconds: float = 3.8e-3
    is_host: bool = False


def peak_flops(device_name: str) -> float | None:
    """16-bit FLOPs per second of a device as CUDA names it, None if it is not in the list."""
    for name, gpu in GPUS.items():
        if name.partition("-")[0] in device_name.lower().replace("-", " ").split():
            return gpu.flops
    return None


GPUS = {
    "a100-40gb": Gpu(39.5e9, 312e12, 300e9, 25e9, 1.56e12),
    "a100-80gb": Gpu(79.1e9, 312e12, 300e9, 25e9, 2.04e12),
    "h100-80gb": Gpu(79.1e9, 989e12, 450e9, 50e9, 3.35e12),
    "h200-141gb": Gpu(139.8e9, 989e12, 450e9, 50e9, 4.8e12),
    "b200-180gb": Gpu(178.4e9, 2250e12, 900e9, 50e9, 8e12),
    # two cores of a virtual machine, as the benchmarks here measured them in fp32: all in one
    "cpu": Gpu(12e9, 0.16e12, 1e9, 1e9, float("inf"), 0.75, 0.0, is_host=True),
}
