"""Files of a save that are on a node, and copies of them on the next one.

Nodes stand in a ring. Each rank sends what it has written to the rank in the same place on the next
node, by a process group of its own and in threads: neither training nor its collectives wait.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, require_folder, write_hashed

PIECE_BYTES = 2**24  # that are in memory at a time, on either side


def keepers(hosts: Sequence[str]) -> list[int] | None:
    """The rank that keeps a copy of each rank's files; None where there is one node.

    Args:
        hosts: of every rank.
    """
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    if len(nodes) == 1:
        return None
    names = list(nodes)
    following = {name: nodes[names[(n + 1) % len(names)]] for n, name in enumerate(names)}
    places = [(following[host], nodes[host].index(rank)) for rank, host in enumerate(hosts)]
    return [others[place % len(others)] for others, place in places]


class Partners:
    """What a rank sends to its partner, and receives from those whose partner it is."""

    def __init__(self, world: World, timeout_seconds: float) -> None:
        """A collective.

        Args:
            world: the ranks.
            timeout_seconds: longest wait for a partner.
        """
        keeping = keepers(world.hosts)
        self._target = None if keeping is None else keeping[world.rank]
        self._sources = [r for r, keeper in enumerate(keeping or []) if keeper == world.rank]
        self._group: dist.ProcessGroup | None = None
        if keeping is not None:
            group = dist.new_group(timeout=timedelta(seconds=timeout_seconds), backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._pool = ThreadPoolExecutor(2, "partners")

    @property
    def there(self) -> bool:
        """Whether there is another node."""
        return self._target is not None

    def close(self) -> None:
        """Leave the group; nothing is on its way any more. A collective."""
        self._pool.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def exchange(self, folder: Path, own: Future[Entries]) -> Future[Entries]:
        """Copy files to the partner's folder of this name, and into this one those of others.

        All ranks begin the same exchanges in the same order; no rank waits for another here.

        Args:
            folder: of a save, on every node.
            own: this rank's files in it, once they are written.

        Returns:
            `own`, once its copy has been sent and copies for others are written. An OSError in it
            is that of a disk here; the others' files arrive all the same, or are seen to be absent.
        """
        sent = self._pool.submit(self._send, folder, own)
        return self._pool.submit(self._receive_all, folder, sent)

    def _send(self, folder: Path, own: Future[Entries]) -> Entries:
        try:
            entries: Entries | None = own.result()
        except OSError:
            entries = None
        if self._target is not None:
            self._send_message(json.dumps(entries).encode())
            for name, entry in (entries or {}).items():
                self._send_file(folder / name, entry["bytes"])
        return own.result()

    def _send_message(self, content: bytes) -> None:
        self._send_tensor(torch.tensor([len(content)]))
        self._send_tensor(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def _send_file(self, path: Path, size: int) -> None:
        """As many bytes as the other waits for; what cannot be read shows in their checksum."""
        buffer, sent = torch.zeros(min(size, PIECE_BYTES), dtype=torch.uint8), 0
        for length in _pieces(size):
            with suppress(OSError), path.open("rb") as file:
                file.seek(sent)
                file.readinto(memoryview(buffer[:length].numpy()))
            self._send_tensor(buffer[:length])
            sent += length

    def _send_tensor(self, values: Tensor) -> None:
        dist.send(values, self._target, group=self._group)

    def _receive_all(self, folder: Path, sent: Future[Entries]) -> Entries:
        faults: list[OSError] = []
        for source in self._sources:
            faults += self._receive(folder, source)
        own = sent.result()
        if faults:
            raise faults[0]
        return own

    def _receive(self, folder: Path, source: int) -> Iterator[OSError]:
        """Write the copies of a rank's files; what could not be written is yielded, not raised.

        That rank sends all of them whatever happens to them here.
        """
        length = int(self._receive_tensor(source, torch.zeros(1, dtype=torch.int64)))
        message = self._receive_tensor(source, torch.zeros(length, dtype=torch.uint8))
        for name, entry in (json.loads(bytes(message.numpy())) or {}).items():
            content = self._content(source, entry["bytes"])
            try:
                require_folder(folder)
                if write_hashed(folder / name, partial(_write, content)) != entry:
                    yield OSError(f"the copy of {name} from rank {source} has another checksum")
            except OSError as error:
                yield error
            deque(content, maxlen=0)

    def _content(self, source: int, size: int) -> Iterator[memoryview]:
        buffer = torch.zeros(min(size, PIECE_BYTES), dtype=torch.uint8)
        for length in _pieces(size):
            yield memoryview(self._receive_tensor(source, buffer[:length]).numpy())

    def _receive_tensor(self, source: int, values: Tensor) -> Tensor:
        dist.recv(values, source, group=self._group)
        return values


def _pieces(size: int) -> Iterator[int]:
    """Lengths of what is sent at a time."""
    for begin in range(0, size, PIECE_BYTES):
        yield min(PIECE_BYTES, size - begin)


def _write(content: Iterator[memoryview], file: IO[bytes]) -> None:
    for piece in content:
        file.write(piece)
