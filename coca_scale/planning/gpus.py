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
        utilization: share of `flops` that training of this kind reaches, an assumption.
    """

    memory_bytes: float
    flops: float
    node_bytes: float
    network_bytes: float
    utilization: float = 0.4


def peak_flops(device_name: str) -> float | None:
    """16-bit FLOPs per second of a device as CUDA names it, None if it is not in the list."""
    for name, gpu in GPUS.items():
        if name.partition("-")[0] in device_name.lower().replace("-", " ").split():
            return gpu.flops
    return None


GPUS = {
    "a100-40gb": Gpu(39.5e9, 312e12, 300e9, 25e9),
    "a100-80gb": Gpu(79.1e9, 312e12, 300e9, 25e9),
    "h100-80gb": Gpu(79.1e9, 989e12, 450e9, 50e9),
    "h200-141gb": Gpu(139.8e9, 989e12, 450e9, 50e9),
    "b200-180gb": Gpu(178.4e9, 2250e12, 900e9, 50e9),
    # two cores of a virtual machine, as the benchmarks here measured them in fp32
    "cpu": Gpu(12e9, 0.16e12, 1e9, 1e9, utilization=0.75),
}
