"""The Dockerfile, built for real by buildah on a Debian made by debootstrap; `make test-image`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.image

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
INDEX_VARIABLES = ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
NEEDED_BYTES = 30e9


def run(*command: str, **options) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-5000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Path]:
    for tool in ("buildah", "debootstrap"):
        assert shutil.which(tool), f"apt-get install {tool}"
    folder = tmp_path_factory.mktemp("image")
    assert shutil.disk_usage(folder).free > NEEDED_BYTES, "the build needs 30 GB of disk"
    yield folder
    shutil.rmtree(folder)


def buildah(store: Path, command: str, *arguments: str) -> str:
    where = ("--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "vfs")
    return run("buildah", *where, command, *arguments)


def make_base(store: Path) -> str:
    """Debian with this machine's way to the package index."""
    rootfs = store / "rootfs"
    run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(rootfs))
    settings = {name: os.environ[name] for name in INDEX_VARIABLES if name in os.environ}
    if Path(CERTIFICATES).exists():
        shutil.copy(CERTIFICATES, f"{rootfs}{CERTIFICATES}")
        settings |= {"SSL_CERT_FILE": CERTIFICATES, "PIP_CERT": CERTIFICATES}
    container = buildah(store, "from", "scratch")
    buildah(store, "add", "-q", container, str(rootfs), "/")
    env = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    buildah(store, "config", *env, container)
    buildah(store, "commit", "-q", "--rm", container, "test-base")
    shutil.rmtree(rootfs)
    return "localhost/test-base"


def test_the_image_builds_and_its_doctor_finds_no_fault(store):
    base = make_base(store)
    start = time.monotonic()
    build = ("--isolation", "chroot", "--build-arg", f"BASE={base}", "-t", "test-image")
    buildah(store, "bud", *build, "-f", "docker/Dockerfile", ".")
    seconds = time.monotonic() - start
    size = buildah(store, "images", "--format", "{{.Size}}", "test-image")
    print(f"\nbuilt in {seconds:.0f} s, {size}")

    container = buildah(store, "from", "test-image")
    inside = ("--isolation", "chroot", container, "--")
    assert buildah(store, "run", *inside, "id", "-u") == "10001"
    found = json.loads(buildah(store, "run", *inside, "coca-scale", "doctor", "--json"))
    rows = {row["name"]: row for row in found["rows"]}
    print(json.dumps(found, indent=1))
    assert found["ok"] and found["faults"] == []
    assert rows["gloo sum"]["status"] == rows["mpi"]["status"] == "ok"
    print(buildah(store, "run", *inside, "coca-scale", "doctor", "--quick"))
    recipe = ("coca_scale/train.py", "--recipe", "recipes/tiny.yaml", "--dry-run")
    buildah(store, "run", *inside, "python", *recipe)
