"""The shipped job scripts are what `coca-scale slurm` writes; what it refuses, what it submits."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.planning.slurm import render

SHIPPED = {
    "coca_l14_64gpu.sh": ("recipes/large.yaml", 64),
    "coca_b32_8gpu.sh": ("recipes/small.yaml", 8),
    "coca_2b_512gpu.sh": ("recipes/coca_2b.yaml", 512),
    "coca_l14_coco_finetune.sh": ("recipes/coco_finetune.yaml", 8),
}


def slurm(*arguments):
    return CliRunner().invoke(app, ["slurm", *arguments])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scripts_are_rendered_ones(name):
    recipe, gpus = SHIPPED[name]
    done = slurm(recipe, "--gpus", str(gpus))
    assert done.exit_code == 0
    assert (Path("slurm") / name).read_text() == done.stdout
    assert f"#SBATCH --nodes={gpus // 8}\n#SBATCH --ntasks-per-node=8\n" in done.stdout


def test_every_training_script_is_listed():
    others = {"launch.sh", "eval_array.sh", "site.example.sh", "site.sh"}
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
    assert 'recipes/small.yaml}" data.workers=2 \'data.train=/my data/{00..11}.tar\' "$@"' in script
    again = "coca-scale slurm recipes/small.yaml --gpus 4 --gpus-per-node 4 --time 2-00:00:00 data."
    assert again in script


def test_a_recipe_outside_the_checkout_is_named_in_full(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Path("recipes/tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert f"${{RECIPE:-{recipe}}}" in render(Path("mine.yaml"), gpus=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "7"], "train.global_batch=4096 does not divide over 7 ranks"),
        (["--gpus", "16", "train.micro_batch=512"], "train.micro_batch=256 would"),
        (["--gpus", "16", "--gpus-per-node", "6", "train.micro_batch=256"], "whole nodes of 6"),
        (["--gpus", "8", "--time", "tomorrow"], "D-HH:MM:SS"),
        (["--gpus", "8", "train.batch=3"], "unknown key"),
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
    sbatch.write_text("#!/usr/bin/env bash\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    done = slurm("recipes/small.yaml", "--gpus", "8", "--submit")
    assert done.exit_code == 1
    assert "sbatch refused the job: sbatch: error: invalid account" in str(done.exception)


def test_submit_without_slurm_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = slurm("recipes/small.yaml", "--gpus", "8", "--submit")
    assert done.exit_code == 1
    assert "there is no sbatch here" in str(done.exception)
