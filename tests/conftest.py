"""Shared helpers: real process groups on CPU ranks, tiny recipes, a clean environment."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # `make test-gpu` says cuda
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from tests.captioner import Captioner, read_captioner, train_captioner
from tests.cluster import testbed
from tests.cluster.runs import Data, TrainingJob
from tests.cluster.testbed import Cluster

torch.set_num_threads(1)
# the same inputs every time: what CI finds, a person finds too
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: small ones fill the end, when a worker has no more."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish() -> None:
    """A process that a test left behind would be waited for when this one ends, for ever."""
    for child in multiprocessing.active_children():
        print(f"\nleft running: {child}")
        child.terminate()  # a loader process that is killed makes torch raise in its parent
        child.join(5)
        child.kill()


def tiny_recipe(**changes: Any) -> Any:
    """A small valid recipe; `section__key=value` sets a key."""
    from coca_scale.recipe import recipe_from_dict

    raw: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "model": {"name": "coca_tiny"},
        "data": {"train": "synthetic://shapes?count=512&size=48", "workers": 0},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "global_batch": 16, "micro_batch": 8},
        "engine": {"precision": "fp32"},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        raw.setdefault(section, {})[key] = value
    return recipe_from_dict(raw)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    """A captioner that has learnt something, here and in open_clip; the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "trained").is_dir():
            train_captioner(shared / "trained")
    return read_captioner(shared / "trained")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A SLURM of eight nodes, stopped at the end of the tests."""
    reason = testbed.obstacle()
    if reason is not None:
        pytest.skip(reason)
    forget_hosts = testbed.add_hosts()
    folder = Path(tempfile.mkdtemp(prefix="coca-slurm-", dir="/tmp"))  # a socket's path is short
    running = testbed.Cluster(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        forget_hosts()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """What the jobs of the cluster train on."""
    return Data(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def undisturbed(
    cluster: Cluster, cluster_data: Data, tmp_path_factory: pytest.TempPathFactory
) -> TrainingJob:
    """A finished job that nothing happened to."""
    job = TrainingJob(cluster, tmp_path_factory.mktemp("jobs") / "undisturbed", cluster_data)
    job.finish()
    return job
