"""What slurm/launch.sh does with exit codes, sites and containers; stand-ins instead of SLURM."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

STANDINS = {
    # options and --signal are SLURM's business; what is left is the command of one task
    "srun": """
echo "$@" >>$STATE/srun
SLURMD_NODENAME=n1
while [[ $1 = --* ]]; do
  [[ $1 != --nodelist=* ]] || { nodes=${1#*=}; SLURMD_NODENAME=${nodes%%,*}; }
  shift
done
[[ $4 != guard ]] || exit 0  # it looks now and then, as long as the job runs
export SLURMD_NODENAME SLURM_PROCID=0
[[ $4 != rank || ! -e $STATE/victim ]] || read SLURMD_NODENAME <$STATE/victim
exec "$@"
""",
    "scontrol": """
case $1 in
  requeue) echo requeued >>$STATE/requeued; [ ! -e $STATE/refuse ] || exit 1; kill -TERM $PPID ;;
esac
case "$1 $2" in
  "show hostnames") tr , '\\n' <<<"$3" ;;
  "show node")
    for node in ${4//,/ }; do
      state=$(cat $STATE/state.$node 2>/dev/null || echo MIXED)
      echo "NodeName=$node Arch=x State=$state Weight=1"
    done ;;
  "show job")
    read state reason <$STATE/job_state
    printf ' %s' JobState=$state Reason=$reason EndTime=$(cat $STATE/end) BatchHost=n1 \\
      ReqNodeList=x NodeList=$(cat $STATE/nodes)
    printf '\\n Command=/x/job.sh a=1\\n' ;;
esac
""",
    "scancel": 'echo "$@" >>$STATE/scancel; touch $STATE/told\n',
    "sleep": '[ "$1" = 300 ] && exec /bin/sleep 300\necho "$1" >>$STATE/slept; /bin/sleep 0.1\n',
    "python": """
case "$1 $2" in
  "-m coca_scale.planning.nodes") exec "$REAL_PYTHON" "$@" ;;
  "-m coca_scale.doctor.node")
    [ ! -e $STATE/hung.$SLURMD_NODENAME ] || /bin/sleep 100
    [ ! -e $STATE/sick.$SLURMD_NODENAME ] || { echo "node: GPU 3 is broken"; exit 1; }
    echo "node: $(cat $STATE/device.$SLURMD_NODENAME 2>/dev/null || echo CPU)"; exit ;;
esac
echo "training $*"
echo "$COCA_SCALE_LAUNCH $MASTER_ADDR $MASTER_PORT: $COCA_SCALE_WHY" >>$STATE/starts
read code saved <$STATE/code
[ $(wc -l <$STATE/code) = 1 ] || sed -i 1d $STATE/code
[ -z "$saved" ] || { mkdir -p $RUN/checkpoints; date +%N >$RUN/checkpoints/latest; }
if [ -e $STATE/failure ]; then
  "$REAL_PYTHON" -c "
from pathlib import Path
from coca_scale.training.events import append_failure
append_failure(Path('$RUN'), {0: '$(cat $STATE/failure)'}, 'rank 0: no sign of life')"
fi
[ ! -e $STATE/meanwhile ] || . $STATE/meanwhile
while [ $code = wait ]; do  # for a signal
  [ ! -e $STATE/told ] || code=75
  /bin/sleep 0.05
done
[ $code != 137 ] || kill -KILL $$
exit $code
""",
    "apptainer": """
echo "$@" >>$STATE/apptainer
while [[ $1 != *.sif ]]; do shift; done
shift; exec "$@"
""",
}
NODES = ["n1", "n2", "n3"]


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
        self.set(job_state="RUNNING None", end="2099-01-01T00:00:00", nodes="n1,n2")
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
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": "2",
            "SLURMD_NODENAME": "n1",
        }

    def set(self, **state: object) -> None:
        for name, value in state.items():
            (self.folder / name.replace("__", ".")).write_text(f"{value}\n")

    def drop(self, name: str) -> None:
        (self.folder / name.replace("__", ".")).unlink()

    @property
    def steps(self) -> list[str]:
        """Nodes of every start of the ranks."""
        lines = [line for line in self.read("srun").splitlines() if " bash -c as_rank" in line]
        return [line.partition("--nodelist=")[2].split()[0] for line in lines]

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


def test_a_saved_job_goes_to_the_queue_and_a_killed_one_on_in_place(job):
    job.set(code="137 saved\n75 saved")
    done = job.run()
    assert done.returncode == -15  # ended by SLURM
    assert "a rank died (exit code 137) on n1; the ranks start again in place" in done.stderr
    assert "was told to stop, and saved; job 4711 goes back into the queue" in done.stderr
    job.set(code=0)
    assert job.run().returncode == 0
    assert len(job.read("requeued").splitlines()) == 1
    starts = [line.partition(": ") for line in job.read("starts").splitlines()]
    reasons = ["", "a rank died (exit code 137) on n1", "was told to stop, and saved"]
    assert [why for _, _, why in starts] == reasons
    assert [start.split()[:2] for start, _, _ in starts] == [["0", "n1"], ["1", "n1"], ["0", "n1"]]
    assert len({start.split()[2] for start, _, _ in starts}) == 3, "a port of its own each"
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n1,n2" in job.read("srun")


def test_a_crash_loop_ends_and_progress_counts(job):
    job.set(code="70\n70\n70 saved\n70 saved\n70")
    done = job.run(MAX_RESTARTS="2")
    assert done.returncode == 70
    assert "3 starts in a row saved nothing new" in done.stderr
    assert done.stderr.count("launch: start ") == 7
    assert job.read("slept").split() == ["30"] * 2
    assert not job.has("requeued")


def test_what_the_queue_saw_counts_as_well(job):
    job.set(code=75)
    assert [job.run(MAX_RESTARTS="2").returncode for _ in range(3)] == [-15, -15, 75]


@pytest.mark.parametrize(("minutes", "in_place"), [(9, False), (12, True)])
def test_little_time_is_no_time_for_a_start_in_place(job, minutes, in_place):
    end = datetime.now() + timedelta(minutes=minutes)
    job.set(code="137 saved\n0", end=f"{end:%Y-%m-%dT%H:%M:%S}")
    assert job.run().returncode == (0 if in_place else -15)
    assert job.has("requeued") != in_place


def with_spare(job, count=3, **env):
    job.set(nodes=",".join(NODES[:count]))
    return {"SLURM_JOB_NUM_NODES": str(count), "SLURM_NTASKS": str(count), **env}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"sick__n2": ""}, "GPU 3 is broken"),
        ({"hung__n2": ""}, "no answer within 4 s"),
        ({"state__n2": "MIXED+DRAIN"}, "SLURM drains it"),
        ({"state__n2": "DOWN+NOT_RESPONDING"}, "SLURM has it as DOWN+NOT_RESPONDING"),
        ({"device__n2": "8 × H100"}, "8 × H100, and other nodes CPU"),
    ],
)
def test_a_spare_node_takes_the_place_of_one_that_is_not_well(job, state, reason):
    job.set(code="137\n0", **state)
    done = job.run(**with_spare(job, SPARE_NODES="1", NODE_CHECK_SECONDS="4"))
    assert done.returncode == 0, done.stderr
    assert job.steps == ["n1,n3"] * 2
    assert f"node n2 is left out: {reason}" in done.stderr


@pytest.mark.parametrize("told_by", ["victim", "failure"])
def test_a_node_that_is_at_fault_twice_is_left_out(job, told_by):
    """By the code of its rank, or by what the watchdog wrote."""
    code = {"victim": 137, "failure": 70}[told_by]
    job.set(code=f"{code} saved\n{code} saved\n{code} saved\n0", **{told_by: "n1"})
    done = job.run(**with_spare(job, SPARE_NODES="1"))
    assert done.returncode == 0, done.stderr
    # the third time as well: it is no longer there, and nobody else is worse
    assert job.steps == ["n1,n2", "n1,n2", "n2,n3", "n2,n3"]
    assert "node n1 is left out: was at fault 2 times" in done.stderr
    assert f"a rank died (exit code {code}) on n1; " in done.stderr


def test_no_node_is_blamed_for_what_ends_all_ranks(job):
    job.set(code="70 saved\n70 saved\n70 saved\n0")
    done = job.run(**with_spare(job, SPARE_NODES="1"))
    assert done.returncode == 0, done.stderr
    assert job.steps == ["n1,n2"] * 4


def test_without_a_spare_fewer_nodes_do_until_the_other_is_well(job):
    job.set(code="137 saved\n0", sick__n2="", meanwhile="rm -f $STATE/sick.n2")
    done = job.run(ELASTIC="1")
    assert done.returncode == 0, done.stderr
    assert job.steps == ["n1", "n1,n2"]
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n1 bash" in job.read("srun")


def test_fewer_nodes_over_which_the_batch_does_not_divide_are_too_few(job):
    job.set(code=0, sick__n2="", sick__n4="", nodes="n1,n2,n3,n4")
    sizes = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "4", "ELASTIC": "1"}
    assert job.run(**sizes).returncode == 0
    job.drop("sick__n4")
    assert job.run(**sizes).returncode == 0
    assert job.steps == ["n1,n3"] * 2, "three ranks do not"


def test_a_node_that_is_drained_is_better_than_none(job):
    job.set(code=0, state__n2="MIXED+DRAIN")
    assert job.run().returncode == 0
    assert job.steps == ["n1,n2"]


def test_too_few_nodes_go_to_the_queue(job):
    job.set(code=0, sick__n2="")
    done = job.run()
    assert done.returncode == -15
    assert "node n2 is left out: GPU 3 is broken" in done.stderr
    assert "too few of its nodes can take ranks; job 4711 goes back into the queue" in done.stderr
    assert job.steps == []
    assert job.read("slept").split() == ["30"], "it looks again"


def test_a_lost_node_is_told_and_not_asked_for(job):
    """SLURM takes it from a job that is --no-kill; its ranks are not those that end first."""
    job.set(code="137 saved\n0", meanwhile="echo n1,n3 >$STATE/nodes")
    done = job.run(**with_spare(job, SPARE_NODES="1"))
    assert done.returncode == 0, done.stderr
    assert job.steps == ["n1,n2", "n1,n3"]
    assert "launch: node n2 was lost; the ranks start again in place" in done.stderr


def test_ranks_save_and_leave_a_node_that_is_drained_if_there_is_a_spare_one(job):
    drain = "echo MIXED+DRAIN >$STATE/state.n2"
    job.set(code="wait saved\n0", meanwhile=drain)
    done = job.run(**with_spare(job, SPARE_NODES="1"))
    assert done.returncode == 0, done.stderr
    assert job.steps == ["n1,n2", "n1,n3"]
    assert "left n2, which SLURM drains; the ranks start again in place" in done.stderr
    assert job.read("scancel").startswith("--signal=USR1 4711\n")


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
    assert job.read("srun").count("--mpi=none --label") == 5
    inside = f"exec --nv --bind /data:/data --pwd {Path.cwd()} coca.sif {job.folder}/bin/python"
    lines = job.read("apptainer").splitlines()
    assert lines[0].startswith(f"{inside} -m coca_scale.planning.nodes")
    assert lines[1].startswith(f"{inside} -m coca_scale.doctor.node")
    assert lines[-1].startswith(f"{inside} coca_scale/train.py --recipe=recipes/small.yaml")


def test_pyxis(job):
    job.set(code=0)
    done = job.run(CONTAINER="coca.sqsh", CONTAINER_RUNTIME="pyxis")
    assert done.returncode == 0, done.stderr
    here = Path.cwd()
    options = (
        f"--container-image=coca.sqsh --container-mounts={here}:{here} --container-workdir={here}"
    )
    assert job.read("srun").count(options) == 4


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
