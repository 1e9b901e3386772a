"""OpenCLIP's training commands mean the same as recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import pytest
from open_clip_train.params import parse_args

from coca_scale.errors import UserError
from coca_scale.openclip.options import NEWER, OPTIONS
from coca_scale.openclip.translate import translate
from coca_scale.recipe import load_recipe
from coca_scale.recipe.batch import BatchSplit
from coca_scale.train import main as train
from tests.invoke import output_of

# OpenCLIP's guide and README
BASIC = """python -m open_clip_train.main --model coca_ViT-B-32 --dataset-type webdataset \\
 --train-data /data/cc12m/{00000..01099}.tar --train-num-samples 10968539 --batch-size 256 \\
 --epochs 30 --lr 1e-3 --wd 0.1 --warmup 2000 --precision amp_bf16 --workers 8 \\
 --coca-contrastive-loss-weight 1.0 --coca-caption-loss-weight 2.0"""
MULTI_GPU = """torchrun --nproc_per_node 8 -m open_clip_train.main --model coca_ViT-B-32 \\
 --train-data '/data/cc12m/{00000..01099}.tar::/data/cc3m/{00000..00331}.tar' \\
 --train-data-upsampling-factors 1::2 --dataset-resampled --train-num-samples 10968539 \\
 --batch-size 320 --accum-freq 2 --precision amp --local-loss --gather-with-grad \\
 --report-to tensorboard --save-frequency 1 --val-data /data/val.tar --imagenet-val /imagenet"""
COCO = """python -m open_clip_train.main --dataset-type "csv" --train-data "coco/train2014.csv" \\
 --warmup 1000 --batch-size 128 --lr 1e-5 --wd 0.1 --epochs 1 --workers 3 --model "coca_ViT-L-14" \\
 --pretrained laion2b_s13b_b90k --report-to "wandb" --coca-contrastive-loss-weight 0 \\
 --coca-caption-loss-weight 1 --log-every-n-steps 100"""
SMALL = """python -m open_clip_train.main --model coca_ViT-B-32 --train-data train.csv \\
 --csv-img-key image --csv-caption-key text --csv-separator , --batch-size 64 --epochs 10 \\
 --lr 5e-4 --force-image-size 224 --aug-cfg 'scale=(0.5, 1.0)' --grad-clip-norm 1.0"""
LARGE = """#!/bin/bash
#SBATCH --nodes=48
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --job-name=coca
export MASTER_PORT=12802
srun --cpu_bind=v --accel-bind=gn python -u src/open_clip_train/main.py \\
    --save-frequency 1 --train-data="/data/laion2b/{000000..231349}.tar" \\
    --train-num-samples 135646078 --dataset-resampled --warmup 2000 --batch-size=240 --epochs=97 \\
    --lr 1e-3 --workers=8 --model coca_ViT-L-14 --name "coca-L14" --seed 4 --local-loss \\
    --gather-with-grad --precision amp_bfloat16 --grad-checkpointing 2>&1 | tee log.txt
"""
ROBERTA = """deepspeed --num_gpus 8 -m open_clip_train.main --model coca_roberta-ViT-B-32 \\
 --lr 5e-4 --train-data /data/cc12m/{00000..01099}.tar --batch-size 256 \\
 --train-num-samples 10968539 \\
 --lock-text --lock-text-unlocked-layers 10 --lock-text-freeze-layer-norm"""
COMMANDS = {
    "basic": (BASIC, 1),
    "multi_gpu": (MULTI_GPU, 8),
    "coco": (COCO, 1),
    "small": (SMALL, 1),
    "large": (LARGE, 384),
    "roberta": (ROBERTA, 8),
}


def arguments_of(command):
    """What OpenCLIP would see, by a shell's own rules where no pipe comes behind."""
    import shlex

    words = shlex.split(command.replace("\\\n", " ").replace("2>&1 | tee log.txt", ""))
    entry = next(n for n, word in enumerate(words) if "open_clip_train" in word)
    return parse_args(words[entry + 1 :])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_recipe_has_the_hyper_parameters_of_the_command(name, tmp_path, capfd):
    command, gpus = COMMANDS[name]
    path = tmp_path / "recipe.yaml"
    given = command
    if name == "large":
        given = str(tmp_path / "job.sh")
        Path(given).write_text(command)
    output_of("translate", given, "--out", path)
    args, recipe = arguments_of(command), load_recipe(path)
    assert recipe.model.name == args.model
    assert recipe.model.pretrained == (args.pretrained or None)
    optim = recipe.optim
    theirs = (args.lr, args.wd, args.beta1, args.beta2, args.eps, args.grad_clip_norm or 0)
    assert theirs == (
        *(optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps),
        optim.clip_norm,
    )
    assert recipe.schedule.warmup_steps == args.warmup
    assert recipe.train.epochs == args.epochs
    assert recipe.train.micro_batch == args.batch_size
    assert recipe.train.global_batch == args.batch_size * gpus * args.accum_freq
    assert BatchSplit.from_recipe(recipe, gpus).accumulation == args.accum_freq
    assert recipe.loss.contrastive_weight == args.coca_contrastive_loss_weight
    assert recipe.loss.caption_weight == args.coca_caption_loss_weight
    assert recipe.data.train_samples == args.train_num_samples
    assert recipe.data.workers == args.workers
    assert train(["--recipe", str(path), "--dry-run"]) == 0, capfd.readouterr().err


def test_particulars(tmp_path):
    multi = translate(MULTI_GPU).recipe
    assert multi["data"]["train"] == [
        {"shards": "/data/cc12m/{00000..01099}.tar", "weight": 1.0},
        {"shards": "/data/cc3m/{00000..00331}.tar", "weight": 2.0},
    ]
    assert multi["data"]["replacement"] is True
    steps = -(-10968539 // (320 * 8 * 2))
    assert multi["checkpoint"] == {"keep": None, "every_steps": steps}
    assert multi["eval"] == {
        "every_steps": steps,
        "zeroshot": "/imagenet",
        "classnames": "imagenet",
    }
    assert translate(COCO).recipe["log"] == {"every_steps": 100, "wandb": "open-clip"}
    small = translate(SMALL).recipe
    assert (small["data"]["image_column"], small["data"]["caption_column"]) == ("image", "text")
    assert small["data"]["crop_scale_min"] == 0.5
    (tmp_path / "job.sh").write_text(LARGE)
    large = translate(str(tmp_path / "job.sh"))
    assert large.gpus == 384
    assert large.recipe["run"] == {"name": "coca-L14", "seed": 4}
    assert large.recipe["engine"] == {"precision": "bf16", "activation_checkpointing": "full"}
    assert large.command[-1] == "--grad-checkpointing"
    assert "--gather-with-grad" in large.report() and "exact" in large.report()
    roberta = translate(ROBERTA).recipe["model"]
    assert (roberta["lock_text"], roberta["text_unlocked_groups"]) == (True, 10)
    assert translate(f"{BASIC} --torchcompile").recipe["engine"]["compile"] == "blocks"
    assert "compile" not in translate(f"{ROBERTA} --torchcompile").recipe["engine"]
    clip = translate(BASIC.replace("coca_ViT-B-32", "ViT-B-32")).recipe
    assert clip["loss"] == {"contrastive_weight": 1.0, "caption_weight": 0.0}
    forgot = translate(COCO.replace("--pretrained laion2b_s13b_b90k", ""))
    assert any("forgets" in note for note in forgot.notes)
    assert any("--gpus" in note for note in forgot.notes)
    assert not any("--gpus" in note for note in translate(COCO, 4).notes)


@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ("torchrun --nnodes 2 --nproc_per_node=4 -m", 8),
        ("srun -n 2 torchrun --nproc-per-node 8 -m", 16),
        ("srun --ntasks=12 python -m", 12),
        ("mpirun -np 3 python -m", 3),
        ("CUDA_VISIBLE_DEVICES=0 python -m", 1),
        ("torchrun --nproc_per_node gpu -m", 1),
    ],
)
def test_gpus_are_those_of_the_launcher(launcher, gpus):
    found = translate(
        f"cd x && {launcher} open_clip_train.main --model ViT-B-32 --train-data a.csv"
    )
    assert found.gpus == gpus


@pytest.mark.parametrize(
    ("weights", "teacher"),
    [
        ("openai", {"teacher": "ViT-L-14@openai"}),
        ("logs/epoch_3.pt", {"teacher": "logs/epoch_3.pt", "config": "ViT-L-14"}),
    ],
)
def test_a_teacher_is_taken_over(weights, teacher):
    distill = f"--distill-model ViT-L-14 --distill-pretrained {weights}"
    command = f"python -m open_clip_train.main --model ViT-B-32 --train-data a.csv {distill}"
    assert translate(command).recipe["loss"]["distill"] == teacher


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--distill-model ViT-L-14", "OpenCLIP distills with both only"),
        ("--opt timm/lion", "AdamW"),
        ("--resume logs/epoch_3.pt", "--pretrained logs/epoch_3.pt"),
        ("--no-such-option", "unrecognized arguments: --no-such-option"),
        ("--epochs many", "invalid int value"),
        ("--model RN50", "RN50"),
        ("--csv-separator ;x", "tabs or commas"),
        ("--train-data $DATA", "shell variable"),
        ("--lr-scheduler const-cooldown", "--epochs-cooldown"),
        ("--force-image-size 224 336", "square"),
    ],
)
def test_what_cannot_be_translated_is_said_in_one_line(more, message):
    quoted = more.replace(";x", "';x'")
    command = f"python -m open_clip_train.main --model ViT-B-32 --train-data a.csv {quoted}"
    with pytest.raises(UserError) as caught:
        translate(command)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_of_a_newer_openclip_is_said_in_one_line(monkeypatch):
    monkeypatch.delitem(OPTIONS, "siglip")
    monkeypatch.delitem(OPTIONS, "loss_dist_impl")
    for option in ("--siglip", "--loss-dist-impl=gather"):
        with pytest.raises(UserError, match=rf"^{option.partition('=')[0]}: an option of OpenCLIP"):
            translate(f"python -m open_clip_train.main --model ViT-B-32 --train-data a {option}")


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("--caption-z-loss-weight 1e-4", "loss.z_loss", 5e-5),
        ("--caption-z-loss-weight=1e-4 --coca-caption-loss-weight 4", "loss.z_loss", 2.5e-5),
        ("--caption-loss-chunk-size 512", "loss.caption_chunk_rows", 512),
        ("--json-text-key recaption", "data.captions", {"recaption": 1.0}),
        (
            "--json-text-key 'a;b;c' --json-text-key-probs 0.5 0.25",
            *("data.captions", {"a": 0.5, "b": 0.25}),
        ),
        ("--image-layer-decay 0.7 --text-layer-decay 0.7", "optim.layer_decay", 0.7),
        ("--visual-layer-decay 0.7 --text-layer-decay 0.7", "optim.layer_decay", 0.7),
        ("--fsdp --fsdp-offload-cpu", "engine.offload", "all"),
        ("--log-metric-every-n-steps 20 --log-every-n-steps 50", "log.every_steps", 20),
        ("--torchcompile --torchcompile-strategy blocks", "engine.compile", "blocks"),
    ],
)
def test_options_of_openclips_main_become_keys(more, key, value):
    section, _, name = key.partition(".")
    translation = translate(f"{BASIC} {more}")
    assert translation.recipe[section][name] == pytest.approx(value)
    assert key in translation.report() or key == "engine.compile"


def test_what_main_has_for_its_own_sake_leaves_the_recipe_as_it_is():
    more = """--fused-caption-loss --text-attention-mask --persistent-workers --length-bucketing
        --caption-loss-compute-dtype bfloat16 --torchcompile-pass-break --torchcompile-dynamic true
        --text-key txt --image-key 'jpg;png' --image-layer-decay 1.0 --caption-z-loss-weight 0"""
    translation = translate(f"{BASIC} {' '.join(more.split())}")
    assert translation.recipe == translate(BASIC).recipe
    assert "--fused-caption-loss: logits never exist as a whole" in translation.report()
    off = translate(f"{BASIC} --no-persistent-workers --no-text-attention-mask")
    assert off.recipe == translate(BASIC).recipe
    assert "--text-attention-mask" in off.report()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--use-naflex", "square"),
        ("--audio-fill pad", "sound"),
        ("--text-key 'txt;caption'", "--json-text-key"),
        ("--image-key thumbnail.jpg", "extension"),
        ("--wd-exclude '*.bias'", "--wd-exclude: matrices are decayed"),
        ("--json-text-key 'a;b'", "--json-text-key-probs has the chances"),
        ("--json-text-key a --json-text-key-probs 1 1", "1 fields"),
        ("--json-text-key a --json-text-key-probs much", "'much' is no number"),
        ("--json-text-key", "one value, not 0"),
        ("--image-layer-decay 0.7", "the same for all towers"),
        ("--caption-z-loss-weight 1 --coca-caption-loss-weight 0", "whose weight is 0"),
        ("--aug-cfg scale", "OpenCLIP does not understand it"),
        ("--aug-cfg 'scale=(0.5,'", "OpenCLIP does not understand it"),
    ],
)
def test_options_of_main_that_would_make_another_run_are_refused(more, message):
    with pytest.raises(UserError) as caught:
        translate(f"{BASIC} {more}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_option_of_main_is_a_traceback():
    for name in NEWER:
        for value in ("", " 1", "=x", " a b c"):
            try:
                translate(f"{BASIC} --{name.replace('_', '-')}{value}")
            except UserError as error:
                assert name.replace("_", "-") in str(error), (name, value)


def test_other_texts_are_no_commands():
    with pytest.raises(UserError, match="no OpenCLIP training command"):
        translate("python train.py --model x")
    with pytest.raises(UserError, match="--train-data is missing"):
        translate("python -m open_clip_train.main --model ViT-B-32")


def test_every_option_of_openclip_has_a_fate():
    seen: list[argparse.ArgumentParser] = []

    class Stop(Exception):
        pass

    def stop(parser, args):
        seen.append(parser)
        raise Stop

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Stop):
        parse_args([])
    names = {action.dest for action in seen[0]._actions} - {"help"}
    flags = {flag for action in seen[0]._actions for flag in action.option_strings} - {"-h"}
    assert names == set(OPTIONS) - set(NEWER)
    assert flags - {"--help"} == {f"--{name.replace('_', '-')}" for name in names}
