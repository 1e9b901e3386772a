"""Ports of the loopback interface that nobody listens on.

They are below those that the system gives to connections, which could take them at any moment.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from random import SystemRandom


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Several in a row."""
    while True:
        first = SystemRandom().randrange(20_000, 32_769 - count)
        ports = list(range(first, first + count))
        with ExitStack() as stack, suppress(OSError):
            for port in ports:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return ports
