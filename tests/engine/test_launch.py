"""How ranks come together: what they leave in shared memory, and ports that are taken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from coca_scale.engine import launch
from coca_scale.engine.launch import LaunchError, start_world
from tests.ranks import on_ranks

SHARED_MEMORY = Path("/dev/shm")


def left_behind(rank, ranks):
    """What there is of this job in shared memory and of compiled code after a first collective."""
    from coca_scale.engine.launch import end_world, start_world

    world = start_world(60)
    world.barrier()
    port = os.environ["MASTER_PORT"]
    names = [path.name for path in SHARED_MEMORY.iterdir() if f"_{port}_" in path.name]
    world.barrier()
    end_world()
    return names, [*Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir()]


@pytest.mark.slow
def test_ranks_compile_nothing_and_leave_nothing_in_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_SIZE", "2")  # as the launcher does, and DeepSpeed's op then acts on
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert on_ranks(left_behind, 2) == [([], []), ([], [])]


@pytest.mark.parametrize(
    ("variables", "option"),
    [
        ({"CROSS_RANK": "0"}, r"deepspeed --master_port=\d+"),
        ({"CROSS_RANK": "0", "SLURM_PROCID": "0", "LOCAL_SIZE": "1"}, r"deepspeed --master_port="),
        ({"TORCHELASTIC_RUN_ID": "none"}, r"torchrun --master_port=\d+"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, r"MASTER_PORT=\d+ mpirun -x MASTER_PORT"),
        ({"SLURM_PROCID": "0"}, r"export MASTER_PORT=\d+ before srun"),
        ({}, r"MASTER_PORT=\d+$"),
    ],
)
def test_a_taken_port_is_told_with_the_option_that_mends_it(variables, option, monkeypatch, capfd):
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**ranks, **variables, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LaunchError, match=option) as caught:
            start_world(5)
    assert f"cannot serve 127.0.0.1:{port}: Address already in use" in str(caught.value)
    assert "frame #" not in capfd.readouterr().err


@pytest.mark.slow
def test_too_little_shared_memory_is_told_before_a_loader_dies_of_it(tmp_path):
    """As in a container of Docker's 64 MB, with a batch that is as much smaller."""
    arguments = ["--recipe", "recipes/tiny.yaml", f"run.dir={tmp_path}/run", "data.workers=2"]
    command = [sys.executable, "coca_scale/train.py", *arguments, "train.steps=2"]
    small = f"mount -t tmpfs -o size=256k tmpfs {SHARED_MEMORY}"
    mounted = ["unshare", "--mount", "sh", "-c", f'{small} && exec "$@"', "sh"]
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    done = subprocess.run([*mounted, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("coca-scale:")]
    assert len(told) == 1
    assert told[0].startswith("coca-scale: /dev/shm has 0 MB free and the loader processes here")
    assert "--shm-size=16g, or --ipc=host" in told[0]
    assert "Traceback" not in done.stderr


def test_hosts_agree_over_the_interface_that_leads_to_the_others(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert launch._interface_towards("127.0.0.1") == "lo"
    assert launch._interface_towards("nowhere.invalid") is None
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")  # NCCL's pattern, and no name
    assert launch._interface_towards("127.0.0.1") == "lo"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert launch._interface_towards("192.0.2.1") == "lo"
