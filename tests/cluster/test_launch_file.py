"""What slurm/launch.sh does with exit codes, sites and containers; stand-ins instead of SLURM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

STANDINS = {
    # options and --signal are SLURM's business; what is left is the command of one task
    "srun": """
echo "$@" >>$STATE/srun
while [[ $1 = --* ]]; do shift; done
SLURM_PROCID=0 SLURMD_NODENAME=n1 exec "$@"
""",
    "scontrol": """
case $1 in
  requeue) echo requeued >>$STATE/requeued; [ ! -e $STATE/refuse ] || exit 1; kill -TERM $PPID ;;
  show) [ $2 = hostnames ] && printf 'n1\\nn2\\n' \\
    || printf 'JobState=%s Reason=%s\\n Command=/x/job.sh a=1\\n' $(cat $STATE/job_state) ;;
esac
""",
    "python": """
if [ "$1" = -c ]; then exec "$REAL_PYTHON" "$@"; fi
echo "training $*"
[ ! -e $STATE/progress ] || { mkdir -p $RUN/checkpoints; date +%N >$RUN/checkpoints/latest; }
[ ! -e $STATE/kill ] || kill -KILL $$
exit $(cat $STATE/code)
""",
    "apptainer": """
echo "$@" >>$STATE/apptainer
while [[ $1 != *.sif ]]; do shift; done
shift; exec "$@"
""",
}


class Job:
    """A batch script started by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = 0
        for name, text in STANDINS.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text("#!/usr/bin/env bash\n" + text)
            program.chmod(0o755)
        self.set(job_state="RUNNING None")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "REAL_PYTHON": str(Path(".venv/bin/python").absolute()),
            "PYTHON": str(folder / "bin" / "python"),
            "STATE": str(folder),
            "RUN": str(folder / "run"),
            "LOG_DIR": str(folder / "logs"),
            "SLURM_SUBMIT_DIR": str(Path.cwd()),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "test",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "2",
        }

    def set(self, **state: object) -> None:
        for name, value in state.items():
            (self.folder / name).write_text(f"{value}\n")

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def run(self, *arguments: str, script: str = "coca_b32_8gpu.sh", **env: str):
        """One start of the job, as SLURM would after a requeue."""
        done = subprocess.run(
            ["bash", f"slurm/{script}", f"run.dir={self.folder / 'run'}", *arguments],
            env={**self.env, "SLURM_RESTART_COUNT": str(self.starts), **env},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        self.starts += 1
        return done


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_done_or_faulty_jobs_do_not_come_back(job, code):
    job.set(code=code)
    done = job.run()
    assert done.returncode == code, done.stderr
    assert not job.has("requeued")
    assert ("a fault that a restart does not mend" in done.stderr) == (code > 0)
    assert "training coca_scale/train.py --recipe=recipes/small.yaml" in done.stdout
    assert "0: training" in job.read("logs/test-4711/n1.log")


def test_a_saved_or_killed_job_comes_back(job):
    job.set(code=75)
    assert job.run().returncode == -15  # ended by SLURM
    job.set(code=0, kill="")
    done = job.run()
    assert done.returncode == -15
    assert "a rank died (exit code 137)" in done.stderr
    assert len(job.read("requeued").splitlines()) == 2


def test_a_crash_loop_ends_and_progress_counts(job):
    job.set(code=70)
    for _ in range(2):
        assert job.run(MAX_RESTARTS="2").returncode == -15
    job.set(progress="")
    for _ in range(3):
        assert job.run(MAX_RESTARTS="2").returncode == -15
    (job.folder / "progress").unlink()
    for _ in range(2):
        assert job.run(MAX_RESTARTS="2").returncode == -15
    done = job.run(MAX_RESTARTS="2")
    assert done.returncode == 70
    assert "3 starts in a row saved nothing new" in done.stderr
    assert len(job.read("requeued").splitlines()) == 7


def test_a_refused_requeue_says_what_to_type(job):
    job.set(code=75, refuse="")
    done = job.run()
    assert done.returncode == 75
    assert "sbatch /x/job.sh a=1" in done.stderr


@pytest.mark.parametrize("state", ["CANCELLED None", "COMPLETING None", "PREEMPTED None"])
def test_a_cancelled_job_stays_away(job, state):
    job.set(code=75, job_state=state)
    done = job.run()
    assert done.returncode == 75
    assert f"SLURM has the job as JobState={state.split()[0]}" in done.stderr
    assert not job.has("requeued")


def test_a_job_that_ran_out_of_time_while_saving_comes_back(job):
    job.set(code=143, job_state="COMPLETING TimeLimit")
    assert job.run().returncode == -15
    assert job.has("requeued")


def test_a_wrong_recipe_never_reaches_the_ranks(job):
    job.set(code=0)
    done = job.run("train.micro_batchs=3")
    assert done.returncode == 2
    assert done.stderr.count("did you mean train.micro_batch?") == 1
    assert "training" not in done.stdout


def test_site_file_and_apptainer(job):
    site = job.folder / "site.sh"
    site.write_text(
        'echo $NEVER_SET; export SRUN_ARGS="--mpi=none --label" CONTAINER=coca.sif\n'
        "export CONTAINER_RUNTIME=apptainer CONTAINER_MOUNTS=/data:/data\n"
    )
    job.set(code=0)
    done = job.run(SITE=str(site))
    assert done.returncode == 0, done.stderr
    assert job.read("srun").count("--mpi=none --label") == 2
    inside = f"exec --nv --bind /data:/data --pwd {Path.cwd()} coca.sif {job.folder}/bin/python"
    lines = job.read("apptainer").splitlines()
    assert lines[0].startswith(f"{inside} -c")
    assert lines[-1].startswith(f"{inside} coca_scale/train.py --recipe=recipes/small.yaml")


def test_pyxis(job):
    job.set(code=0)
    done = job.run(CONTAINER="coca.sqsh", CONTAINER_RUNTIME="pyxis")
    assert done.returncode == 0, done.stderr
    here = Path.cwd()
    options = (
        f"--container-image=coca.sqsh --container-mounts={here}:{here} --container-workdir={here}"
    )
    assert job.read("srun").count(options) == 2


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SITE": "nowhere.sh"}, "SITE=nowhere.sh: no such file"),
        ({"CONTAINER": "x.sif"}, "choose pyxis or apptainer"),
    ],
)
def test_wrong_settings(job, env, message):
    done = job.run(**env)
    assert done.returncode == 2
    assert message in done.stderr


def test_without_sbatch():
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", "slurm/coca_b32_8gpu.sh"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "submit this script with sbatch" in done.stderr
