"""What docker/ says agrees with itself and with the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

DOCKER = Path("docker")
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DEFINITION = (DOCKER / "coca-scale.def").read_text()


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^%(\w+)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_linters_have_nothing_to_say(tmp_path):
    script = tmp_path / "post.sh"
    script.write_text("#!/bin/sh\nset -e\n" + sections(DEFINITION)["post"])
    for command in (
        ["hadolint", "docker/Dockerfile"],
        ["shellcheck", "docker/install.sh", str(script)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_copied_files_exist_and_enter_the_context():
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    allowed = [e[1:] for e in Path(".dockerignore").read_text().splitlines() if e.startswith("!")]
    for name in (name for names in copied for name in names):
        assert Path(name).exists()
        assert name in allowed


def test_compose_refers_to_what_exists():
    (service,) = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values()
    context = DOCKER / service["build"]["context"]
    assert (context / service["build"]["dockerfile"]).exists()
    _, script, _, recipe, _ = service["command"].split()
    assert Path(script).exists()
    assert Path(recipe.removeprefix("${RECIPE:-").removesuffix("}")).exists()
    targets = {volume.replace(":ro", "").rsplit(":", 1)[1] for volume in service["volumes"]}
    assert targets == {"/data", "/opt/coca-scale/runs"}
    assert service["ulimits"]["memlock"] == -1


def test_apptainer_definition_matches_the_dockerfile():
    found = sections(DEFINITION)
    assert set(found) == {"files", "post", "environment", "runscript", "test", "help"}
    for line in found["files"].split("\n"):
        assert not line.strip() or Path(line.split()[0]).exists()
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    assert base is not None and f"From: {base[1]}\n" in DEFINITION
    version = re.search(r"^ARG UV_VERSION=(\S+)$", DOCKERFILE, re.M)
    assert version is not None and f"UV_VERSION={version[1]}\n" in found["post"]


def entries(lock: str) -> dict[str, list[str]]:
    """Hashes of every line of a lock file that names a package."""
    lines = lock.replace("\\\n", "").splitlines()
    return {line.partition(" --hash")[0].strip(): line.split("--hash=")[1:] for line in lines}


def test_every_package_has_one_version_and_its_hashes():
    lock = Path("requirements.lock").read_text()
    assert "://" not in lock, "no addresses of indexes"
    for named, hashes in entries(lock).items():
        pins = list(Requirement(named).specifier)
        assert [pin.operator for pin in pins] == ["=="], named
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", found) for found in hashes)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_no_python_gets_two_versions(python):
    place = {"python_version": python, "python_full_version": f"{python}.1"}
    place |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    found = [Requirement(named) for named in entries(Path("requirements.lock").read_text())]
    here = [r.name for r in found if r.marker is None or r.marker.evaluate(place)]
    assert len(here) == len(set(here)) > 150
    assert {"torch", "deepspeed", "hypothesis"} <= set(here)


def test_the_image_installs_deepspeed_apart_from_the_rest():
    """Its entry has several lines; the commands are those of the script."""
    script = (DOCKER / "install.sh").read_text()
    lock = Path("requirements.lock").read_text()
    parts = []
    for command in re.findall(r"^  (sed .*) \"\$lock\"", script, re.M):
        done = subprocess.run(["sh", "-c", command], input=lock, capture_output=True, text=True)
        parts.append(entries(done.stdout))
    others, deepspeed = parts
    assert [named.partition("==")[0] for named in deepspeed] == ["deepspeed"]
    assert {**others, **deepspeed} == entries(lock)
