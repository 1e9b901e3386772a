"""What docker/ says agrees with itself and with the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

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
