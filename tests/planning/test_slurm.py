"""The shipped job scripts are what `coca-scale slurm` writes; what it refuses, what it submits."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.planning.slurm import render, write

SHIPPED = {
    "coca_l14_64gpu.sh": ("recipes/large.yaml", 64),
    "coca_b32_8gpu.sh": ("recipes/small.yaml", 8),
    "coca_2b_512gpu.sh": ("recipes/coca_2b.yaml", 512),
    "coca_l14_coco_finetune.sh": ("recipes/coco_finetune.yaml", 8),
}


# what a shell or sbatch would act upon, and what has to survive them
PIECES = (
    *("$(touch PWNED)", "`touch PWNED`", ";touch PWNED;", "|", "&", "$HOME", "${IFS}", "<(x)"),
    *("\n#SBATCH --wrap=x", "\r", "\t", "\x1b[31m", "'", '"', "\\", "}", "{", "%j", "!", "*", "~"),
    *("-", " ", "=", "#", "é", "日", "\u2028", "\u00a0", "a", "0", "7"),
)
NASTY = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
# a stand-in of slurm/launch.sh that writes down what it was given
STANDIN = 'launch_training() { printf "%s\\0" "$@" >"$GOT"; }\n'


def slurm(*arguments):
    return CliRunner().invoke(app, ["slurm", *arguments])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scripts_are_rendered_ones(name):
    recipe, gpus = SHIPPED[name]
    done = slurm(recipe, "--gpus", str(gpus))
    assert done.exit_code == 0
    assert (Path("slurm") / name).read_text() == done.stdout
    assert f"#SBATCH --nodes={gpus // 8}\n#SBATCH --ntasks-per-node=8\n" in done.stdout
    assert ("\n#SBATCH --no-kill\n" in done.stdout) == (gpus > 8)


def test_every_training_script_is_listed():
    others = {"launch.sh", "nodes.sh", "eval_array.sh", "site.example.sh", "site.sh"}
    assert {p.name for p in Path("slurm").glob("*.sh")} - others == set(SHIPPED)


def test_overrides_and_options_are_in_the_script(tmp_path):
    file = tmp_path / "job.sh"
    options = ["--gpus", "4", "--gpus-per-node", "4", "--time", "2-00:00:00", "--out", str(file)]
    data = "data.train=/my data/{00..11}.tar"
    done = slurm("recipes/small.yaml", *options, "data.workers=2", data)
    assert done.exit_code == 0, done.output
    script = file.read_text()
    for line in (
        *("--nodes=1", "--ntasks-per-node=4", "--gres=gpu:4", "--mem=0", "--time=2-00:00:00"),
        *("--cpus-per-task=6", "--signal=USR1@300", "--requeue", "--open-mode=append"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert 'launch_training "${RECIPE:-$recipe}" data.workers=2 ' in script
    assert " 'data.train=/my data/{00..11}.tar' \"$@\"\n" in script
    again = "coca-scale slurm recipes/small.yaml --gpus 4 --gpus-per-node 4 --time 2-00:00:00 data."
    assert again in script


def test_spare_nodes():
    done = slurm("recipes/large.yaml", "--gpus", "16", "--spares", "2")
    assert done.exit_code == 0, done.output
    for line in ("#SBATCH --nodes=4", "#SBATCH --no-kill", "SPARE_NODES=${SPARE_NODES:-2}"):
        assert f"\n{line}\n" in done.stdout
    assert "2 nodes × 8 tasks, one task per GPU, and 2 spare nodes." in done.stdout
    assert "\n#   coca-scale slurm recipes/large.yaml --gpus 16 --spares 2\n" in done.stdout


def test_a_recipe_outside_the_checkout_is_named_in_full(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Path("recipes/tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert f"\nrecipe={recipe}\n" in render(Path("mine.yaml"), gpus=2)


def received(script, home, **environment):
    """The words that a job script starts training with, in a folder of its own."""
    file, got = home / "job.sh", home / "got"
    write(script, file)
    subprocess.run(["bash", "-n", str(file)], check=True)
    environment = {**os.environ, "COCA_SCALE_HOME": str(home), "GOT": str(got), **environment}
    subprocess.run(["bash", str(file)], cwd=home, env=environment, check=True)
    assert not list(home.rglob("PWNED"))
    return os.fsdecode(got.read_bytes()).split("\0")[:-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a job takes for the checkout."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "launch.sh").write_text(STANDIN)
    return folder


@settings(max_examples=60, deadline=None)
@given(recipe=NASTY, folder=NASTY, name=NASTY)
def test_names_are_never_commands(home, recipe, folder, name):
    """Whatever a file or an override is called, training gets it as it is, and nothing runs."""
    file = home / f"{recipe}.yaml"
    file.write_text(Path("recipes/tiny.yaml").read_text())
    overrides = [f"run.dir={json.dumps(folder)}", f'data.val="pipe:{name_in_yaml(name)}"']
    overrides += [f"run.name={json.dumps(name)}"]
    script = render(file, overrides, gpus=2, gpus_per_node=2)
    assert received(script, home) == [str(file), *overrides]
    assert received(script, home, RECIPE="another $(touch PWNED).yaml")[0].startswith("another $(")
    head = script.partition("\n. ")[0].splitlines()
    assert all(line.startswith("#") or not line for line in head)
    directives = [line for line in head if line.startswith("#SBATCH")]
    assert len(directives) == script.count("\n#SBATCH ") == 11
    assert re.fullmatch(r"#SBATCH --job-name=[\w.-]{1,100}", directives[0])


def name_in_yaml(text):
    """As it stands between quotes, with its new lines, but without what YAML has no room for."""
    return re.sub(r"[\x1b\r]", "", text).replace("\\", "").replace('"', "")


@pytest.mark.parametrize("name", [b"caf\xe9", b"-x", b"--help", b"\xff'\n7"])
def test_names_that_are_no_text_or_look_like_options(home, name, monkeypatch):
    file = home / (os.fsdecode(name) + ".yaml")
    file.write_text(Path("recipes/tiny.yaml").read_text())
    assert received(render(file, gpus=2, gpus_per_node=2), home) == [str(file)]
    monkeypatch.setenv("COCA_SCALE_HOME", str(home))  # a name that counts from the checkout
    (recipe,) = received(render(file, gpus=2, gpus_per_node=2), home)
    assert not recipe.startswith("-") and (home / recipe).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "7"], "train.global_batch=4096 does not divide over 7 ranks"),
        (["--gpus", "16", "train.micro_batch=512"], "train.micro_batch=256 would"),
        (["--gpus", "16", "--gpus-per-node", "6", "train.micro_batch=256"], "whole nodes of 6"),
        (["--gpus", "8", "--time", "tomorrow"], "D-HH:MM:SS"),
        (["--gpus", "8", "train.batch=3"], "unknown key"),
        (["--gpus", "4", "--spares", "1"], "spares are whole nodes"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = slurm("recipes/small.yaml", *arguments)
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_submit_sends_the_script_with_the_settings_of_the_site(tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sent = tmp_path / "sent"
    sbatch.write_text(
        f"""#!/usr/bin/env bash
        {{ echo "$SBATCH_ACCOUNT $PWD"; cat "$2"; }} >{sent}
        echo "4711;main"
        """
    )
    sbatch.chmod(0o755)
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_ACCOUNT=vision\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SITE", str(site))
    done = slurm("recipes/small.yaml", "--gpus", "8", "--submit")
    assert done.stdout == "job 4711\n", done.output
    first, _, script = sent.read_text().partition("\n")
    assert first == f"vision {Path.cwd()}"
    assert script == Path("slurm/coca_b32_8gpu.sh").read_text()
    sbatch.write_text("#!/usr/bin/env bash\n")
    done = slurm("recipes/small.yaml", "--gpus", "8", "--submit")
    assert "no job number" in str(done.exception)
    sbatch.write_text("#!/usr/bin/env bash\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    done = slurm("recipes/small.yaml", "--gpus", "8", "--submit")
    assert done.exit_code == 1
    assert "sbatch refused the job: sbatch: error: invalid account" in str(done.exception)


def test_submit_without_slurm_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = slurm("recipes/small.yaml", "--gpus", "8", "--submit")
    assert done.exit_code == 1
    assert "there is no sbatch here" in str(done.exception)
