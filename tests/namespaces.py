"""Nodes with a network between them on one machine, which loses, delays or cuts what they send.

Each node is a network namespace with a TUN device; a thread carries the packets from one to the
other, as this needs nothing of the kernel but TUN. Namespaces have no names and end with the
last process in them and this one, whatever becomes of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Self

_TUN = Path("/dev/net/tun")
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_PACKETS_ALONE = 0x0001 | 0x1000  # IFF_TUN, IFF_NO_PI
_INTERFACE = "eth0"
_ADDRESS = "10.77.0.{}"
_MTU = 1500
_DESTINATION = slice(16, 20)  # of an IPv4 header


def obstacle() -> str | None:
    """Why there can be no such nodes here; None if there can be."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "needs ip of iproute2"
    if not _TUN.exists():
        return f"needs {_TUN}"
    return None


class Network:
    """Nodes n1, n2, … that reach each other.

    Attributes:
        loss: share of packets that do not arrive.
        delay: seconds that each packet takes.
        cut: nodes that nothing comes from or to.
        disturbed: how many packets were lost or delayed so far.
    """

    def __init__(self, nodes: int, seed: int = 0) -> None:
        """
        Args:
            nodes: how many.
            seed: of which packets are lost.
        """
        self.loss, self.delay, self.cut = 0.0, 0.0, frozenset[int]()
        self.disturbed = 0
        self._chance = random.Random(seed)
        self._devices: dict[int, int] = {}  # by node, as the namespaces
        self._namespaces: dict[int, int] = {}
        self._wake, self._close = os.pipe()
        try:
            for number in range(1, nodes + 1):
                with ThreadPoolExecutor(1) as thread:  # for a thread alone can move
                    thread.submit(self._add, number).result()
        except BaseException:
            self._close_files()
            raise
        self._relay = Thread(target=self._carry, name="relay", daemon=True)
        self._relay.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what runs on the nodes, and remove them."""
        for number in self._namespaces:
            self.kill(number)
        os.close(self._close)
        self._relay.join()
        os.close(self._wake)
        self._close_files()

    @property
    def join(self) -> partial[None]:
        """For a rank, to be called in it before it starts: it moves to its node."""
        own = f"/proc/{os.getpid()}/fd"
        return partial(_join, [f"{own}/{file}" for file in self._namespaces.values()])

    def vanish(self, number: int) -> None:
        """A node loses its power: nobody hears of it any more, not even that it is gone."""
        self.cut |= {number}
        self.kill(number)

    def kill(self, number: int) -> None:
        """All processes of a node."""
        namespace = os.fstat(self._namespaces[number])
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.path.samestat((folder / "ns/net").stat(), namespace):
                    os.kill(int(folder.name), signal.SIGKILL)

    def _add(self, number: int) -> None:
        _call("unshare", _NEW_NETWORK)
        self._namespaces[number] = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        device = self._devices[number] = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(
            device, _SET_INTERFACE, struct.pack("16sH22x", _INTERFACE.encode(), _PACKETS_ALONE)
        )
        for words in (
            f"addr add {_ADDRESS.format(number)}/24 dev {_INTERFACE}",
            f"link set {_INTERFACE} mtu {_MTU} up",
            "link set lo up",
        ):
            subprocess.run(["ip", *words.split()], check=True)

    def _carry(self) -> None:
        numbers = {socket.inet_aton(_ADDRESS.format(n)): n for n in self._devices}
        poll = select.poll()
        for file in (self._wake, *self._devices.values()):
            poll.register(file, select.POLLIN)
        order = itertools.count()
        under_way: list[tuple[float, int, int, bytes]] = []
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) * 1000 if under_way else None
            ready = {file for file, _ in poll.poll(wait)}
            if self._wake in ready:
                return
            for sender, device in self._devices.items():
                if device not in ready:
                    continue
                packet = os.read(device, 2**16)
                receiver = numbers.get(packet[_DESTINATION])
                if receiver is None or self.cut & {sender, receiver}:
                    continue
                lost = self._chance.random() < self.loss
                self.disturbed += lost or self.delay > 0
                if lost:
                    continue
                due = time.monotonic() + self.delay
                heapq.heappush(under_way, (due, next(order), receiver, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, receiver, packet = heapq.heappop(under_way)
                with suppress(OSError):  # its queue is full
                    os.write(self._devices[receiver], packet)

    def _close_files(self) -> None:
        for file in (*self._devices.values(), *self._namespaces.values()):
            os.close(file)


def _join(namespaces: list[str]) -> None:
    rank = int(os.environ["RANK"])
    file = os.open(namespaces[rank], os.O_RDONLY)
    _call("setns", file, _NEW_NETWORK)
    os.close(file)
    _call("prctl", _END_WITH_PARENT, signal.SIGKILL)  # a test that is killed leaves no rank
    os.environ.update(
        LOCAL_RANK="0",
        MASTER_ADDR=_ADDRESS.format(1),
        GLOO_SOCKET_IFNAME=_INTERFACE,
        SLURMD_NODENAME=f"n{rank + 1}",
    )


def _call(name: str, *arguments: int) -> None:
    """A function of the C library that Python 3.11 does not have."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
