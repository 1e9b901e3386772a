"""Which rank is this process, and how does it reach the others."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from coca_scale.engine.planned import planned_host
from coca_scale.engine.world import World
from coca_scale.errors import UserError

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
}
_SHARED_MEMORY_OP = "deepspeed_shm_comm"
_MPI_MARKERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class LaunchError(UserError):
    """The ranks do not come together; rank 0's says who is missing or does not fit.

    Attributes:
        at_fault: nodes of those ranks, as far as they are known.
    """

    def __init__(self, message: str, at_fault: Mapping[int, str | None] | None = None) -> None:
        """With the ranks that are named."""
        super().__init__(message)
        self.at_fault = dict(at_fault or {})


def start_world(timeout_seconds: float = 900.0) -> World:
    """Join the process group: DeepSpeed launcher, torchrun, srun, mpirun, or a single process.

    Before the first collective every rank says through a key-value store that it is there and what
    it runs on, so that one that is missing or does not fit is named and not waited for for ever.

    Args:
        timeout_seconds: longest wait for the other ranks, and for a first collective.

    Raises:
        LaunchError: ranks are missing, or differ in version or device.
    """
    _find_rank()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    device = torch.device(accelerator.current_device_name())
    store = _open_store(rank, timeout_seconds)
    hosts = roll_call(store, rank, size, device, timeout_seconds)
    backend = accelerator.communication_backend_name()
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" and size > 1 else None,
    )
    with _without_compiled_op():
        timeout = timedelta(seconds=timeout_seconds)
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    group, gather_group = dist.group.WORLD, dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    assert isinstance(gather_group, dist.ProcessGroup)
    host_group = group if device.type == "cpu" else _hosts_own_group(hosts[rank], hosts)
    return World(rank, size, group, gather_group, host_group, device, tuple(hosts))


def _hosts_own_group(own_host: str, hosts: Sequence[str]) -> dist.ProcessGroup:
    """All ranks over TCP, beside the network of the devices."""
    others = [host for host in hosts if host != own_host]
    if others and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = _interface_towards(others[0])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _interface_towards(host: str) -> str | None:
    """Name of the network interface that leads to a host; None if that is not to be found.

    Gloo by itself takes that of this host's own name, which is often the loopback's. The one that
    NCCL was given is taken if it is a name, and not a pattern or a list.
    """
    interfaces = psutil.net_if_addrs()
    if (given := os.environ.get("NCCL_SOCKET_IFNAME")) in interfaces:
        return given
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # nothing is sent
            own = probe.getsockname()[0]
            for name, addresses in interfaces.items():
                if any(entry.address == own for entry in addresses):
                    return name
    return None


def end_world() -> None:
    """Leave the process group after a run that went well."""
    dist.destroy_process_group()


def _find_rank() -> None:
    """Set the variables that torch's launcher sets, whoever started this process."""
    if "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        for name, slurm_name in _SLURM_VARIABLES.items():
            os.environ[name] = os.environ[slurm_name]
    if "RANK" in os.environ:
        return
    if any(name in os.environ for name in _MPI_MARKERS):
        port = int(os.environ.get("MASTER_PORT", "29500"))
        deepspeed.comm.mpi_discovery(distributed_port=port, verbose=False)
        # its daemon would end this process when mpirun is gone, before it has saved
        import_module("mpi4py.MPI").Finalize()
        return
    with socket.create_server(("127.0.0.1", 0)) as free:  # several runs may share a machine
        defaults = ("0", "0", "1", "127.0.0.1", str(free.getsockname()[1]))
    for name, value in zip(_LAUNCHER_VARIABLES, defaults, strict=True):
        os.environ.setdefault(name, value)


@contextmanager
def _without_compiled_op() -> Iterator[None]:
    """Inside, DeepSpeed takes its op for an all-reduce on CPUs for one that does not work here.

    Only inference calls it. It is compiled at the first start, and who is killed in that leaves a
    lock for which every later start waits without end; and it makes 69 MB in /dev/shm for every
    rank, which nobody removes.
    """
    names = vars(deepspeed.ops)
    before = names.get("__compatible_ops__")
    names["__compatible_ops__"] = {**(before or {}), _SHARED_MEMORY_OP: False}
    try:
        yield
    finally:
        del names["__compatible_ops__"]  # DeepSpeed finds out when it is asked
        if before is not None:
            names["__compatible_ops__"] = before


def connect_store(timeout_seconds: float) -> dist.Store:
    """One more connection to the job's key-value store; a thread needs its own.

    Raises:
        DistNetworkError: nobody serves it any more.
    """
    return _open_store(-1, timeout_seconds)


def is_the_launchers_store() -> bool:
    """Whether a launcher serves the job's store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_is_gone() -> bool:
    """Whether nobody serves the job's store any more. One that does not answer may be busy."""
    try:
        socket.create_connection(_store_address(), timeout=1.0).close()
    except ConnectionError:
        return True
    except OSError:
        return False
    return False


def _store_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _open_store(rank: int, timeout_seconds: float) -> dist.Store:
    """The key-value store of the job: rank 0's, or the one that torchrun serves.

    Raises:
        LaunchError: its address cannot be reached or is taken.
    """
    address, port = _store_address()
    serves = rank == 0 and not is_the_launchers_store()
    if serves:
        _see_that_port_is_free(address, port)
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        first = str(error).splitlines()[0]
        raise LaunchError(
            f"rank {rank} on {socket.gethostname()} cannot reach {address}:{port}: {first}. "
            "Is rank 0 alive, MASTER_ADDR its host, and MASTER_PORT free and not blocked?"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"coca-scale/{attempt}", store)


def _see_that_port_is_free(address: str, port: int) -> None:
    """
    Raises:
        LaunchError: something else listens there, as another run does with the same port.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        with socket.create_server(("", 0)) as free:
            other = free.getsockname()[1]
        why = os.strerror(error.errno or 0)
        raise LaunchError(
            f"rank 0 on {socket.gethostname()} cannot serve {address}:{port}: {why}. "
            f"If another run has that port, choose a free one: {_port_option(other)}"
        ) from error


def _port_option(port: int) -> str:
    """How the launcher of this process is given a port."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --master_port={port} …"
    if "CROSS_RANK" in os.environ:
        return f"deepspeed --master_port={port} …"
    if any(name in os.environ for name in _MPI_MARKERS):
        return f"MASTER_PORT={port} mpirun -x MASTER_PORT …"
    if "SLURM_PROCID" in os.environ:
        return f"export MASTER_PORT={port} before srun"
    return f"MASTER_PORT={port}"


def roll_call(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout_seconds: float
) -> list[str]:
    """Wait until every rank has reported, and see that they fit together.

    Returns:
        Host name of every rank.

    Raises:
        LaunchError: on every rank that is there, with what rank 0 found.
    """
    store.set(f"here/{rank}", json.dumps(_about_this_rank(device)))
    if rank == 0:
        facts = _collect(store, size, timeout_seconds)
        problem, at_fault = _problem(facts, size) or (None, {})
        hosts = [facts[r]["host"] if r in facts else "?" for r in range(size)]
        verdict = {"problem": problem, "at_fault": [*at_fault.items()], "hosts": hosts}
        store.set("verdict", json.dumps(verdict))
    try:
        store.wait(["verdict"], timedelta(seconds=timeout_seconds + 30))
        verdict = json.loads(store.get("verdict"))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise LaunchError(f"rank {rank}: rank 0 does not answer") from error
    if verdict["problem"] is not None:
        raise LaunchError(verdict["problem"], dict(verdict["at_fault"]))
    hosts = verdict["hosts"]
    assert isinstance(hosts, list)
    return hosts


def _about_this_rank(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {
        "host": planned_host(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "fault": None,
    }
    try:
        ones = torch.ones(256, 256, device=device)
        if float((ones @ ones).sum()) != 256.0**3:
            about["fault"] = "computes a wrong product"
    except RuntimeError as error:
        about["fault"] = str(error).splitlines()[0]
    return about


def _collect(store: dist.Store, size: int, timeout_seconds: float) -> dict[int, dict[str, Any]]:
    deadline = time.monotonic() + timeout_seconds
    facts: dict[int, dict[str, Any]] = {}
    while len(facts) < size and time.monotonic() < deadline:
        missing = [r for r in range(size) if r not in facts]
        for r in missing:
            if store.check([f"here/{r}"]):
                facts[r] = json.loads(store.get(f"here/{r}"))
        if len(facts) < size:
            time.sleep(0.1)
    return facts


def _problem(
    facts: dict[int, dict[str, Any]], size: int
) -> tuple[str, dict[int, str | None]] | None:
    """What is wrong, and the nodes of the ranks at fault; None if all is well."""
    missing = [r for r in range(size) if r not in facts]
    if missing:
        nodes = expected_hosts(size)
        where = ""
        if nodes is not None:
            where = f" ({', '.join(dict.fromkeys(nodes[r] for r in missing))})"
        text = (
            f"{len(missing)} of {size} ranks did not start in time: {_listed(missing)}{where}; "
            "look at their logs, and leave out the node if it is at fault"
        )
        return text, {r: nodes[r] if nodes is not None else None for r in missing}
    broken = [r for r in facts if facts[r]["fault"]]
    if broken:
        named = [f"rank {r} on {facts[r]['host']}: {facts[r]['fault']}" for r in broken[:8]]
        text = "a device does not work: " + "; ".join(named)
        return text, {r: facts[r]["host"] for r in broken}
    for key in ("torch", "deepspeed", "device"):
        values = [facts[r][key] for r in range(size)]
        usual = max(set(values), key=values.count)
        odd = [r for r in range(size) if values[r] != usual]
        if odd:
            r = odd[0]
            text = (
                f"ranks differ in {key}: {values[r]} for {_listed(odd)} ({facts[r]['host']}), "
                f"{usual} elsewhere"
            )
            return text, {r: facts[r]["host"] for r in odd}
    return None


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(str(r) for r in ranks[:16])
    return f"rank {shown}" + (", …" if len(ranks) > 16 else "")


def expected_hosts(size: int) -> list[str] | None:
    """Where SLURM starts each rank; None elsewhere.

    The step says so: its job may have more nodes, as spares.
    """
    nodes, tasks = (os.environ.get(f"SLURM_STEP_{n}") for n in ("NODELIST", "TASKS_PER_NODE"))
    if nodes is None or tasks is None:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    counts: list[int] = []
    for entry in tasks.split(","):  # 8(x3),4
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    hosts = [h for h, n in zip(done.stdout.split(), counts, strict=False) for _ in range(n)]
    return hosts if len(hosts) == size else None
