"""`coca-scale doctor` on this machine, and with things broken on purpose."""

from __future__ import annotations

import json
import resource
import time

import pytest
from typer.testing import CliRunner

from coca_scale import cli
from coca_scale.doctor import cluster, doctor
from coca_scale.doctor import processes as children
from coca_scale.doctor import table as report


def by_name(rows):
    return {row.name: row for row in rows}


def test_this_machine_can_train(monkeypatch):
    done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"ok", "quick", "faults", "rows"}
    assert all(set(row) == {"name", "status", "found", "fix", "needed"} for row in found["rows"])
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["gloo sum"]["status"] == "ok"


def test_what_is_missing_is_told_with_the_fix(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no compiler, which training can miss
    monkeypatch.setattr("sys.argv", ["coca-scale", "doctor", "--quick"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "apt-get install g++" in out and "ulimit -n 65536" in out
    assert err.startswith("coca-scale: training does not work here: open files")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "\x1b" not in out


def test_a_failing_collective_is_named_with_its_cause(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    row = doctor._all_reduce("gloo", 2)
    assert row.status == "broken" and row.needed
    assert "GLOO_SOCKET_IFNAME=nowhere0" in row.fix


def test_a_collective_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "REDUCE_SECONDS", 0.2)
    row = doctor._all_reduce("gloo", 2)
    assert (row.status, row.found) == ("broken", "no end after 0 s")


def test_children_end_with_what_they_started():
    start = time.monotonic()
    (ended,) = children.run([("sh", "-c", "echo said; sleep 60 & wait")], 0.5)
    assert ended == children.Ended("said\n", "no end after 0 s")
    assert time.monotonic() - start < 10
    (ended,) = children.run([("sh", "-c", "echo 'OSError: gone' >&2; exit 1")], 10)
    assert ended.fault == "OSError: gone"


def test_a_package_too_old_is_named(monkeypatch):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "2.1" if name == "torch" else real(name)
    )
    row = doctor._packages()
    assert row.status == "broken" and "torch 2.1" in row.found
    assert row.fix == "pip install 'torch>=2.8'"


def test_a_driver_without_visible_gpus_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")
    (row,) = doctor._gpus({"gpus": [], "cuda": "13.2"}, str(version))
    assert row.status == "broken" and row.needed and "580.95.05" in row.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = doctor._gpus({"gpus": []}, str(version))
    assert row.status == "missing" and not row.needed


def test_gpus_are_listed_with_their_memory(tmp_path):
    gpu = {"name": "H100", "total_bytes": 80 * 2**30, "free_bytes": 79 * 2**30}
    rows = by_name(doctor._gpus({"gpus": [gpu, gpu]}, str(tmp_path / "none")))
    assert rows["gpu 1"].found == "H100, 80.0 GiB, 79.0 GiB free"


def test_nvcc_of_another_cuda_is_a_note(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    row = doctor._nvcc({"cuda": "13.2"})
    assert row.status == "broken" and not row.needed and "13.2" in row.fix
    assert doctor._nvcc({"cuda": "12.4"}).status == "ok"


def test_small_shared_memory_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHM_BYTES", 2**80)
    assert doctor._shared_memory(str(tmp_path)).status == "broken"
    assert doctor._shared_memory(str(tmp_path / "none")).status == "missing"


def test_adapters_are_read_from_sysfs(tmp_path):
    assert cluster.fabric(tmp_path / "none").status == "missing"
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "state").write_text("1: DOWN\n")
    row = cluster.fabric(tmp_path)
    assert row.status == "broken" and "mlx5_0 1: DOWN, 400 Gb/sec" in row.found
    assert not row.needed


def test_missing_slurm_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for row in (cluster.slurm(), cluster.mpi()):
        assert row.status == "missing" and not row.needed and row.fix
    report.show([row])
