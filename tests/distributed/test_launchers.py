"""The same curve from every launcher, on two ranks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import launch
from tests.json_lines import curve
from tests.ports import free_port

BIN = Path(sys.executable).parent

LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc_per_node=2", "--master_port={port}"],
    "deepspeed": [BIN / "deepspeed", "--num_gpus=2", "--master_port={port}"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_curve_of_srun(name, undisturbed, cluster_data, tmp_path):
    command = [str(part).format(port=free_port()) for part in LAUNCHERS[name]]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}; on Debian: apt-get install openmpi-bin libopenmpi-dev")
    launch(tmp_path / "run", cluster_data, *command, **os.environ, MASTER_PORT=str(free_port()))
    assert curve(tmp_path / "run") == curve(undisturbed.run)
