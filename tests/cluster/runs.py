"""Training jobs for the cluster of the tests, small and as slow as a test wants them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.testbed import CHECKOUT, Cluster, processes
from tests.data.shards import write_shards

STEPS = 18
BATCH = 16
SHARDS = 40
SCRIPT = "slurm/coca_l14_64gpu.sh"
RECIPE = "recipes/tiny.yaml"


class Data:
    """Shards of which a rank opens one in every step, after a pause that can be changed."""

    def __init__(self, folder: Path) -> None:
        self._pause = folder / "pause"
        self.pause(0)
        shards = write_shards(folder, [BATCH // 2] * SHARDS)
        self.overrides = [
            f"data.train=pipe:sleep $(cat {self._pause}) && cat {shards}",
            f"data.shuffle_window={BATCH // 2}",
            *("data.val=null", "data.lanes=2"),
            *(f"train.global_batch={BATCH}", "train.micro_batch=4", f"train.steps={STEPS}"),
            *("checkpoint.every_steps=3", "log.every_steps=1", "log.tensorboard=false"),
        ]

    def pause(self, seconds: float) -> None:
        """Before every shard from now on."""
        self._pause.write_text(f"{seconds}\n")


class TrainingJob:
    """A shipped script on two ranks of two nodes."""

    def __init__(
        self, cluster: Cluster, folder: Path, data: Data, *options: str, **env: str
    ) -> None:
        self.cluster = cluster
        self.run = folder / "run"
        self.log = folder / "job.out"
        folder.mkdir(parents=True)
        self.id = submit(cluster, folder, SCRIPT, *options, arguments=data.overrides, **env)

    def finish(self, seconds: float = 300) -> None:
        """Wait for the end, which must be a good one."""
        state = self.cluster.wait_job(self.id, seconds, self.log)
        assert state == "COMPLETED", f"{state}\n{self.log.read_text()[-6000:]}"

    def wait_step(self, step: int, restarts: int, seconds: float = 300) -> None:
        """Wait until this start of the job has done a step."""
        self.wait_restart(restarts, seconds)
        self.cluster.wait(
            lambda: self._step() >= step, seconds, f"step {step} of start {restarts}", self.log
        )

    def wait_restart(self, restarts: int, seconds: float = 300) -> None:
        """Wait until the job runs for the given time."""

        def runs() -> bool:
            state = self.cluster.ended(self.id)
            assert state is None, f"{state}\n{self.log.read_text()[-6000:]}"
            found = self.cluster.job(self.id)
            return found["JobState"] == "RUNNING" and int(found["Restarts"]) >= restarts

        self.cluster.wait(runs, seconds, f"start {restarts} of job {self.id}", self.log)

    def wait_first_step(self, start: str, seconds: float = 300) -> float:
        """Wait until a start, RESTART.LAUNCH, has done a step; how long that has taken."""
        began = time.monotonic()
        words = f"launch: start {start} of job"

        def done() -> bool:
            state = self.cluster.ended(self.id)
            assert state is None, f"{state}\n{self.log.read_text()[-6000:]}"
            _, _, after = self.log.read_text().partition(words)
            return re.search(r"^0: step \d+/", after, re.M) is not None

        self.cluster.wait(done, seconds, f"the first step of start {start}", self.log)
        return time.monotonic() - began

    def rank(self, number: int) -> int:
        """The process of a rank."""
        marks = (f"SLURM_JOB_ID={self.id}\0", f"SLURM_PROCID={number}\0", str(self.cluster.folder))
        found = [
            pid
            for pid in processes(*marks)
            if Path(f"/proc/{pid}/comm").read_text().startswith("python")
        ]
        return min(found)

    def nodes(self) -> list[str]:
        """Of the present start."""
        names = self.cluster.job(self.id)["NodeList"]
        return self.cluster.output("scontrol", "show", "hostnames", names).split()

    def _step(self) -> int:
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0


def submit(
    cluster: Cluster,
    folder: Path,
    script: str,
    *options: str,
    arguments: list[str],
    **env: str,
) -> str:
    """A shipped script with the recipe and the sizes of a test."""
    site = folder / "site.sh"
    site.write_text("")
    sizes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=500", "--time=20")
    return cluster.submit(
        *sizes,
        f"--output={folder / 'job.out'}",
        *options,
        script,
        *arguments,
        f"run.dir={folder / 'run'}",
        **settings(folder),
        **env,
    )


def settings(folder: Path) -> dict[str, str]:
    """Environment of a job."""
    return {
        "RECIPE": RECIPE,
        "PYTHON": sys.executable,
        "SITE": str(folder / "site.sh"),
        "LOG_DIR": str(folder / "logs"),
    }


def launch(run: Path, data: Data, *launcher: str, **env: str) -> None:
    """The same training under another launcher."""
    done = subprocess.run(
        [*launcher, "coca_scale/train.py", "--recipe", RECIPE, *data.overrides, f"run.dir={run}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=CHECKOUT,
        env=env,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
