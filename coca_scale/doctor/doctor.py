"""What of this machine works for training, what does not, and the fix."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coca_scale.doctor import cluster
from coca_scale.doctor.processes import run
from coca_scale.doctor.table import Row

VERSIONS_SECONDS = 120
REDUCE_SECONDS = 90
SHM_BYTES = 2**30
DISK_BYTES = 2 * 2**30
OPEN_FILES = 1024


def examine(quick: bool = False) -> list[Row]:
    """All checks, in the order in which faults lead to others.

    Args:
        quick: leave out what takes long or disturbs a run: all-reduce, free GPU memory.
    """
    versions = ("versions", *([] if quick else ["--memory"]))
    facts, fault = _probe([versions], VERSIONS_SECONDS)
    rows = [_python(), _packages(), *_libraries(facts, fault), *_gpus(facts), _nvcc(facts)]
    rows.append(_compiler())
    if "torch" in facts and not quick:
        rows.append(_all_reduce("gloo", 2))
        if facts["gpus"]:
            rows.append(_all_reduce("nccl", len(facts["gpus"])))
    rows += [_shared_memory(), _open_files(), _disk(), _nccl(facts)]
    return [*rows, cluster.mpi(), cluster.slurm(), cluster.fabric()]


def _probe(
    probes: Sequence[Sequence[str]], limit_seconds: float
) -> tuple[dict[str, Any], str | None]:
    """Findings of all the probes together, and the first fault."""
    command = (sys.executable, "-m", "coca_scale.doctor.probe")
    ended = run([(*command, *arguments) for arguments in probes], limit_seconds)
    facts: dict[str, Any] = {}
    for child in ended:
        for line in child.out.splitlines():
            if line.startswith("{"):
                facts |= json.loads(line)
    faults = [child.fault for child in ended if child.fault is not None]
    # a process that was killed because another one failed is not the cause
    causes = [fault for fault in faults if fault != "another process failed"]
    return facts, next(iter(causes or faults), None)


def _python() -> Row:
    version = platform.python_version()
    return Row("python", "ok", f"{version} in {sys.prefix}")


def _packages() -> Row:
    """Whether what setup.py asks for is there; reads metadata, imports nothing."""
    try:
        requirements = importlib.metadata.requires("coca-scale") or []
    except importlib.metadata.PackageNotFoundError:
        return Row("packages", "broken", "coca-scale is not installed", "pip install -e .")
    wanted = [Requirement(text) for text in requirements]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((requirement, "missing"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, version))
    if wrong:
        found = ", ".join(f"{r.name} {what} (needs {r.specifier or 'any'})" for r, what in wrong)
        names = " ".join(f"'{r.name}{r.specifier}'" for r, _ in wrong)
        return Row("packages", "broken", found, f"pip install {names}")
    bounds = ", ".join(str(r) for r in wanted if r.specifier != SpecifierSet())
    return Row("packages", "ok", f"{len(wanted)} as setup.py asks ({bounds})")


def _libraries(facts: dict[str, Any], fault: str | None) -> list[Row]:
    rows = []
    reinstall = "pip install -r requirements.lock"
    if "torch" in facts:
        build = f"CUDA {facts['cuda']}" if facts["cuda"] else "no CUDA"
        rows.append(Row("torch", "ok", f"{facts['torch']} ({build})"))
    else:
        rows.append(Row("torch", "broken", fault or "no answer", reinstall))
    if "deepspeed" in facts:
        found = f"{facts['deepspeed']}, accelerator {facts['accelerator']}"
        rows.append(Row("deepspeed", "ok", found))
    elif "torch" in facts:
        rows.append(Row("deepspeed", "broken", fault or "no answer", reinstall))
    return rows


def _gpus(facts: dict[str, Any], driver_file: str = "/proc/driver/nvidia/version") -> list[Row]:
    path = Path(driver_file)
    text = path.read_text() if path.exists() else ""
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    driver = match[1] if match else None
    gpus = facts.get("gpus", [])
    if not gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if driver is None or hidden:
            why = "hidden by CUDA_VISIBLE_DEVICES" if driver else "none; training uses the CPU"
            fix = "unset CUDA_VISIBLE_DEVICES" if driver else "driver, or docker run --gpus all"
            return [Row("gpu", "missing", why, fix, needed=False)]
        found = f"driver {driver} is there, but PyTorch sees no GPU"
        fix = f"docker run --gpus all, or a driver that knows CUDA {facts.get('cuda')}"
        return [Row("gpu", "broken", found, fix)]
    rows = [Row("driver", "ok", driver or "version unknown")]
    for index, gpu in enumerate(gpus):
        free = gpu["free_bytes"]
        memory = f"{gpu['total_bytes'] / 2**30:.1f} GiB"
        if free is not None:
            memory += f", {free / 2**30:.1f} GiB free"
        rows.append(Row(f"gpu {index}", "ok", f"{gpu['name']}, {memory}"))
    return rows


def _nvcc(facts: dict[str, Any]) -> Row:
    """DeepSpeed compiles CUDA ops only with the CUDA that PyTorch was built with."""
    cuda = facts.get("cuda")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        fix = f"CUDA toolkit {cuda}, only for ZeRO++'s quantizer"
        return Row("nvcc", "missing", "no CUDA compiler", fix, needed=False)
    (ended,) = run([(nvcc, "--version")], 10)
    match = re.search(r"release (\d+)\.(\d+)", ended.out)
    version = f"{match[1]}.{match[2]}" if match else "unknown"
    if match and cuda and match[1] != cuda.split(".")[0]:
        fix = f"CUDA_HOME of a CUDA {cuda} toolkit"
        found = f"{version} at {nvcc}, PyTorch has CUDA {cuda}"
        return Row("nvcc", "broken", found, fix, needed=False)
    return Row("nvcc", "ok", f"{version} at {nvcc}", needed=False)


def _compiler() -> Row:
    """Triton's kernels and `engine.compile` are built when they are first used."""
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler)
    if path is None:
        fix = "apt-get install g++" if compiler == "g++" else "unset CXX, or install what it names"
        found = f"no {compiler} on PATH, for engine.compile and Triton"
        return Row("compiler", "missing", found, fix, needed=False)
    (ended,) = run([(path, "--version")], 10)
    if ended.fault is not None:
        found = f"{path}: {ended.fault}"
        return Row("compiler", "broken", found, "install g++ anew", needed=False)
    return Row("compiler", "ok", ended.out.splitlines()[0], needed=False)


def _all_reduce(backend: Literal["gloo", "nccl"], size: int) -> Row:
    """A real sum over processes of this machine."""
    name = f"{backend} sum"
    with tempfile.TemporaryDirectory() as folder:
        probes = [
            ("all-reduce", backend, str(rank), str(size), f"{folder}/meeting")
            for rank in range(size)
        ]
        facts, fault = _probe(probes, REDUCE_SECONDS)
    if fault is None:
        found = f"{size} process(es), 16 MiB in {1000 * facts['seconds']:.1f} ms"
        return Row(name, "ok", found)
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    if variable in os.environ:
        fix = f"{variable}={os.environ[variable]}: unset it, or name an interface of `ip link`"
    elif backend == "gloo":
        fix = "let `hostname` resolve in /etc/hosts, or GLOO_SOCKET_IFNAME=lo"
    else:
        fix = "NCCL_DEBUG=INFO tells more; NCCL_P2P_DISABLE=1 goes around broken peer access"
    return Row(name, "broken", fault, fix)


def _shared_memory(folder: str = "/dev/shm") -> Row:
    """Data workers hand batches over, and NCCL and gloo exchange data, through /dev/shm."""
    fix = "docker run --shm-size=16g (compose: shm_size), or --ipc=host"
    if not Path(folder).is_dir():
        return Row("/dev/shm", "missing", "not mounted", fix)
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} GiB"
    return Row("/dev/shm", "ok" if usage.free >= SHM_BYTES else "broken", found, fix)


def _open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    text = "unlimited" if soft == unlimited else f"{soft} (hard limit {hard})"
    good = soft == unlimited or soft >= OPEN_FILES
    return Row("open files", "ok" if good else "broken", text, "ulimit -n 65536")


def _disk() -> Row:
    free = shutil.disk_usage(".").free
    found = f"{free / 1e9:,.0f} GB free in {Path.cwd()}"
    fix = "free space, or run.dir on another file system; a ViT-L/14 checkpoint has 8 GB"
    return Row("disk", "ok" if free >= DISK_BYTES else "broken", found, fix)


def _nccl(facts: dict[str, Any]) -> Row:
    if "nccl" in facts:
        return Row("nccl", "ok", facts["nccl"], needed=False)
    needed = bool(facts.get("gpus"))
    return Row("nccl", "missing", "PyTorch has none", "a PyTorch with CUDA", needed)


@dataclass(frozen=True)
class Diagnosis:
    """Rows, and whether they allow to train."""

    rows: list[Row]
    quick: bool

    @property
    def faults(self) -> list[str]:
        """Names of what is needed and does not work."""
        return [row.name for row in self.rows if row.needed and row.status != "ok"]

    def json(self) -> str:
        """Keys `ok quick faults rows`; a row has `name status found fix needed`."""
        rows = [asdict(row) for row in self.rows]
        facts = {"ok": not self.faults, "quick": self.quick, "faults": self.faults, "rows": rows}
        return json.dumps(facts, indent=1)


def diagnose(quick: bool = False) -> Diagnosis:
    """Examine this machine; takes some 25 s, quick 10 s."""
    return Diagnosis(examine(quick), quick)
