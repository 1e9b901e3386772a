"""How many lanes a global batch comes from."""

from __future__ import annotations

MAX_USUAL_LANES = 1024


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def usual_lanes(global_batch: int) -> int:
    """The divisor of `global_batch` up to 1024 that itself has most divisors.

    It does not depend on the number of ranks, so that the sample order does not either.
    """
    candidates = [d for d in divisors(global_batch) if d <= MAX_USUAL_LANES]
    return max(candidates, key=lambda d: (len(divisors(d)), d))
