"""Checks of what only some clusters have: MPI, SLURM, InfiniBand and EFA. All are notes."""

from __future__ import annotations

import ctypes.util
import resource
import shutil
import sys
from pathlib import Path

from coca_scale.doctor.processes import run
from coca_scale.doctor.table import Row

LIMIT_SECONDS = 20
_MPI_VERSION = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().splitlines()[0].split(',')[0])"
)


def mpi() -> Row:
    """`mpirun`, and the library it starts programs with as mpi4py finds it."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        fix = "apt-get install openmpi-bin, to start with mpirun"
        return Row("mpi", "missing", "no mpirun on PATH", fix, needed=False)
    (ended,) = run([(sys.executable, "-c", _MPI_VERSION)], LIMIT_SECONDS)
    if ended.fault is not None:
        found = f"{mpirun}, but mpi4py: {ended.fault}"
        fix = "put the folder of libmpi.so on LD_LIBRARY_PATH, or pip install mpi4py anew"
        return Row("mpi", "broken", found, fix, needed=False)
    return Row("mpi", "ok", f"{mpirun}; mpi4py with {ended.out.strip()}", needed=False)


def slurm() -> Row:
    """The commands, and whether the controller answers."""
    absent = [name for name in ("sbatch", "srun", "sinfo") if shutil.which(name) is None]
    if absent:
        fix = "apt-get install slurm-client, to submit jobs from here"
        return Row("slurm", "missing", f"no {', '.join(absent)} on PATH", fix, needed=False)
    (ended,) = run([("sinfo", "--noheader", "--format=%P %D %G")], LIMIT_SECONDS)
    if ended.fault is not None:
        fix = "SLURM_CONF or /etc/slurm/slurm.conf, munge, and slurmctld"
        return Row("slurm", "broken", ended.fault, fix, needed=False)
    partitions = "; ".join(line.strip() for line in ended.out.splitlines())
    return Row("slurm", "ok", partitions or "no partition is up", needed=False)


def fabric(root: Path = Path("/sys/class/infiniband")) -> Row:
    """Adapters that NCCL can use between nodes: InfiniBand, RoCE, EFA."""
    devices = sorted(root.iterdir()) if root.is_dir() else []
    if not devices:
        fix = "none needed on one node; between nodes NCCL takes TCP"
        return Row("infiniband", "missing", "no InfiniBand, RoCE or EFA", fix, needed=False)
    found = ", ".join(f"{device.name} {_state(device)}" for device in devices)
    if not any("ACTIVE" in _state(device) for device in devices):
        fix = "ibstat on the host; the cable, the switch, the subnet manager"
        return Row("infiniband", "broken", found, fix, needed=False)
    if ctypes.util.find_library("ibverbs") is None:
        fix = "apt-get install libibverbs1 ibverbs-providers"
        return Row("infiniband", "broken", f"{found}; no libibverbs", fix, needed=False)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited, or docker run --ulimit memlock=-1"
        found = f"{found}; locked memory limited to {soft // 1024} KiB"
        return Row("infiniband", "broken", found, fix, needed=False)
    if any(_driver(device) == "efa" for device in devices) and not _has_nccl_plugin():
        fix = "EFA installer's aws-ofi-nccl, with its lib folder on LD_LIBRARY_PATH"
        return Row("infiniband", "broken", f"{found}; no NCCL plugin", fix, needed=False)
    return Row("infiniband", "ok", found, needed=False)


def _driver(device: Path) -> str:
    link = device / "device" / "driver"
    return link.resolve().name if link.exists() else "unknown"


def _state(device: Path) -> str:
    """Such as `4: ACTIVE, 400 Gb/sec (4X NDR)`, of the first port."""
    parts = [device / "ports" / "1" / name for name in ("state", "rate")]
    return ", ".join(part.read_text().strip() for part in parts if part.exists())


def _has_nccl_plugin() -> bool:
    """NCCL loads a plug-in by its file name through the dynamic linker."""
    try:
        ctypes.CDLL("libnccl-net.so")
    except OSError:
        return ctypes.util.find_library("nccl-net-ofi") is not None
    return True
