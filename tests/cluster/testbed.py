"""A real SLURM on this machine: munged, slurmctld and eight slurmd, each with eight pretended
GPUs.

All files are in one temporary folder and all ports are free ones, so that several can run at once.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from tests.ports import free_ports

NODES = 8
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# coca-scale test cluster"
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CHECKOUT = Path(__file__).parents[2]

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=5
SlurmctldTimeout=10
MessageTimeout=10
InactiveLimit=0
WaitTime=0
MinJobAge=600
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \
CPUs=128 Sockets=1 CoresPerSocket=128 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def obstacle() -> str | None:
    """Why no cluster can be started here, None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"no {', '.join(missing)}; on Debian: apt-get install {packages}"
    return None if os.geteuid() == 0 else "a SLURM with several nodes on one machine needs root"


class Cluster:
    """The running daemons, and what tests do with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle."""
        host = socket.gethostname()
        ports = free_ports(NODES + 1)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(
                folder=self.folder,
                host=host,
                nodes=NODES,
                controller_port=ports[0],
                first_port=ports[1],
                last_port=ports[-1],
            )
        )
        for number in range(8):
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = ("socket", "key", "pid", "log", "seed")
        files = [
            f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{name}"
            for name in names
        ]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *files)
        self.wait(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in range(1, NODES + 1):
            self.start_node(f"n{node}")
        self.wait_idle()

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """The node is gone: its slurmd and all processes of its tasks, at once."""
        daemon = self._daemons.pop(node)
        tasks = list(processes(f"SLURMD_NODENAME={node}", self.env["SLURM_CONF"]))
        pids = [daemon.pid, *self._step_daemons(node), *tasks]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # or an srun would tell of the other's end
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        daemon.wait()

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until no job is left and every node can take one."""
        self.wait(
            lambda: (
                not self.output("squeue", "-h")
                and self.output("sinfo", "-h", "-o", "%t %D").split() == ["idle", str(NODES)]
            ),
            seconds,
            "idle nodes",
        )

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.env, check=False, capture_output=True)
        time.sleep(1)
        for pid in processes("SLURM_JOB_ID=", self.env["SLURM_CONF"]):
            os.kill(pid, signal.SIGKILL)
        for node in [f"n{i}" for i in range(1, NODES + 1)]:
            for pid in self._step_daemons(node):
                os.kill(pid, signal.SIGKILL)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def output(self, *command: str) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=True, cwd=CHECKOUT
        )
        return done.stdout.strip()

    def submit(self, *arguments: str, **env: str) -> str:
        """`sbatch` from the checkout; the job id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.env, **env},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.output("scontrol", "show", "job", job)))

    def hurried_job(self, job: str) -> dict[str, str]:
        """The same; SLURM waits two minutes after a requeue, and here four seconds are enough."""
        found = self.job(job)
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            wait = datetime.fromisoformat(found["EligibleTime"]) - datetime.now()
            if wait.total_seconds() > 6:
                self.output("scontrol", "update", f"JobId={job}", "StartTime=now+4seconds")
        return found

    def ended(self, job: str) -> str | None:
        """The state of a job that is over, None before."""
        if self.hurried_job(job)["JobState"] not in OVER:
            return None
        time.sleep(2)  # a requeue passes through some of these states
        state = self.job(job)["JobState"]
        return state if state in OVER else None

    def wait_job(self, job: str, seconds: float, log: Path | None = None) -> str:
        """The state of a job once it is over."""
        self.wait(lambda: self.ended(job) is not None, seconds, f"the end of job {job}", log)
        return self.job(job)["JobState"]

    def wait(
        self, condition: Callable[[], bool], seconds: float, what: str, log: Path | None = None
    ) -> None:
        """Poll until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                log = log or self.folder / "slurmctld.log"
                tail = log.read_text()[-6000:] if log.is_file() else f"no {log}"
                raise TimeoutError(f"waited {seconds} s for {what}\n{tail}")
            time.sleep(0.2)

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self._daemons[name or program] = subprocess.Popen(
                [program, *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _step_daemons(self, node: str) -> list[int]:
        """slurmstepd of a node: it writes to the log of its slurmd."""
        log = str(self.folder / f"slurmd-{node}.log")
        return [pid for pid, name in _names() if name == "slurmstepd" and log in _open_files(pid)]


def processes(*marks: str) -> Iterator[int]:
    """Processes with all of these texts in their environment."""
    for pid, _ in _names():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if pid != os.getpid() and all(mark.encode() in environment for mark in marks):
            yield pid


def add_hosts() -> Callable[[], None]:
    """Make n1, n2, … names of this machine; returns what undoes it."""
    known = HOSTS.read_text()
    line = "127.0.0.1 " + " ".join(f"n{i}" for i in range(1, NODES + 1)) + f" {HOSTS_MARK}\n"
    if HOSTS_MARK in known:
        return lambda: None
    HOSTS.write_text(known.rstrip("\n") + "\n" + line)
    return lambda: HOSTS.write_text(HOSTS.read_text().replace(line, "")) and None


def _path() -> str:
    own = str(Path(sys.executable).parent)
    return os.pathsep.join([own, os.environ["PATH"], "/usr/sbin", "/usr/bin"])


def _names() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "comm").read_text().strip()
            except OSError:
                continue


def _open_files(pid: int) -> set[str]:
    try:
        return {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()
