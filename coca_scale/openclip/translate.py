"""OpenCLIP's training command as a recipe."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from open_clip_train.params import parse_args

from coca_scale.errors import UserError
from coca_scale.model.config import load_model_config
from coca_scale.openclip.newer import (
    Given,
    data_keys,
    is_harmless,
    log_keys,
    loss_keys,
    optim_keys,
    split_newer,
)
from coca_scale.openclip.options import OPTIONS, Fate
from coca_scale.openclip.weight_files import WEIGHT_SUFFIXES
from coca_scale.recipe import recipe_from_dict
from coca_scale.recipe.batch import default_lanes
from coca_scale.recipe.files import read_text
from coca_scale.recipe.lanes import MAX_USUAL_LANES, divisors
from coca_scale.recipe.text import shell_word
from coca_scale.recipe.yaml_text import dump_yaml

_ENTRY = re.compile(r"(^|[./])(open_clip_train|training)[./]main(\.py)?$")
_LINE_END = re.compile(r"\\\n")
_OPERATORS = frozenset("();<>|&")
_SBATCH = re.compile(r"^#SBATCH\s+(.*)$", re.MULTILINE)
_NODES = ("--nnodes", "--nodes", "--num_nodes", "-N")
_STARTED = ("--nproc_per_node", "--nproc-per-node", "--num_gpus")
_TASKS_OF_NODE = ("--ntasks-per-node", "--gpus-per-node")
_RANKS = ("--ntasks", "-n", "-np", "--np")
_PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "pure_fp16": "fp16"}
_SCHEDULES = {"cosine": "cosine", "const": "constant", "const-cooldown": "constant-cooldown"}


@dataclass(frozen=True)
class Translation:
    """A recipe, and what became of the options that were given.

    Attributes:
        command: OpenCLIP's arguments.
        gpus: that the batch was counted for.
        recipe: as a recipe file has it.
        given: option names by what became of them.
        notes: what a person should know.
    """

    command: list[str]
    gpus: int
    recipe: dict[str, Any]
    given: dict[Fate, list[str]]
    notes: list[str]

    def yaml(self) -> str:
        """The recipe file."""
        words = " ".join(map(shell_word, ["open_clip_train.main", *self.command]))
        body = dump_yaml(self.recipe)
        return f"# from {words}\n# on {self.gpus} GPU(s)\n{body}"

    def report(self) -> str:
        """For people: what was taken over, what differs, what is missing."""
        lines = []
        taken = [
            f"{_flag(name)} → {key}" if (key := OPTIONS[name].key) else _flag(name)
            for name in self.given["taken"]
        ]
        if taken:
            lines.append(f"taken over: {', '.join(taken)}")
        for fate in ("differs", "not needed", "left out"):
            for name in self.given[fate]:
                option = OPTIONS[name]
                key = f" → {option.key}" if option.key else ""
                lines.append(f"{fate}: {_flag(name)}{key}: {option.note}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def translate(command: str, gpus: int | None = None) -> Translation:
    """Translate a training command of OpenCLIP's, or a shell or sbatch script that has one.

    Args:
        command: what is typed in a shell, or the path of a script.
        gpus: of the job; by default what the launcher in front of the command says, else 1.

    Raises:
        UserError: there is no such command, OpenCLIP does not understand it, or it asks for
            something that would make another run of it here.
    """
    launcher, arguments = _split(_script(command))
    rest, newer = split_newer(arguments)
    args = _parsed(rest)
    typed = _typed(arguments)
    _refuse(args, newer, typed)
    found = _count_gpus(launcher, command) if gpus is None else gpus
    notes = []
    if found is None:
        notes.append("the command does not say how many GPUs; --gpus N does, 1 is assumed")
    count = found or 1
    recipe = _recipe(args, newer, typed, count, notes)
    recipe_from_dict(recipe, "the translated recipe")
    given: dict[Fate, list[str]] = {f: [] for f in ("taken", "differs", "not needed", "left out")}
    for name in typed:
        fate = OPTIONS[name].fate
        given["taken" if fate == "refused" else fate].append(name)
    return Translation(arguments, count, recipe, given, notes)


def _script(command: str) -> str:
    """The text of a script if it is the path of one."""
    if len(command) < 4096 and "\n" not in command and Path(command).is_file():
        return read_text(Path(command))
    return command


def _split(text: str) -> tuple[list[str], list[str]]:
    """Words before OpenCLIP's entry, and its arguments."""
    for line in _LINE_END.sub(" ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError as error:
            if _ENTRY.search(line):
                raise UserError(f"not a shell command: {error}") from error
            continue
        entries = [index for index, word in enumerate(words) if _ENTRY.search(word)]
        if entries:
            rest = words[entries[0] + 1 :]
            end = next((n for n, word in enumerate(rest) if set(word) <= _OPERATORS), len(rest))
            if rest[end - 1 : end] in (["1"], ["2"]) and rest[end:]:
                end -= 1  # 2>&1
            return words[: entries[0]], rest[:end]
    if text.lstrip().startswith("--"):
        return [], _words(text)
    raise UserError(
        "no OpenCLIP training command: give all of 'python -m open_clip_train.main --model …' in "
        "quotes, or a script that has it"
    )


def _words(line: str) -> list[str]:
    """As a shell cuts a line."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"not a shell command: {error}") from error


def _parsed(arguments: list[str]) -> Namespace:
    """As OpenCLIP itself reads them, with its defaults."""
    variables = [word for word in arguments if "$" in word]
    if variables:
        raise UserError(f"{variables[0]}: write out the shell variable first")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            args: Namespace = parse_args(arguments)
    except SystemExit as error:
        said = complaint.getvalue().strip().splitlines() or ["nothing"]
        raise UserError(f"OpenCLIP does not understand it: {said[-1]}") from error
    except (ValueError, SyntaxError) as error:  # of its --aug-cfg
        raise UserError(f"OpenCLIP does not understand it: {error}") from error
    return args


def _typed(arguments: Sequence[str]) -> list[str]:
    """Names of the options that are there, abbreviated ones in full.

    Raises:
        UserError: one that the installed OpenCLIP has, and no table here.
    """
    names: dict[str, None] = {}
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            name = name if name in OPTIONS else name.removeprefix("no_")
            full = [name] if name in OPTIONS else [o for o in OPTIONS if o.startswith(name)]
            if not full:
                raise UserError(
                    f"{word.partition('=')[0]}: an option of OpenCLIP {version('open_clip_torch')} "
                    "that coca-scale does not know yet; leave it out if the run is the same without"
                )
            names[full[0]] = None
    return list(names)


def _refuse(args: Namespace, newer: Given, typed: Sequence[str]) -> None:
    """What would be another run without it."""
    harmless = {
        "opt": args.opt.lower() == "adamw",
        "lr_cooldown_end": args.lr_scheduler != "const-cooldown" or args.lr_cooldown_end == 0,
        "lr_cooldown_power": args.lr_scheduler != "const-cooldown" or args.lr_cooldown_power == 1,
        "image_interpolation": args.image_interpolation == "bicubic",
        "image_resize_mode": args.image_resize_mode == "shortest",
    }
    faults = [
        f"{_flag(name)}: {OPTIONS[name].note}"
        for name in typed
        if OPTIONS[name].fate == "refused"
        and not (harmless.get(name, False) or is_harmless(name, newer))
    ]
    if args.resume not in (None, "latest"):
        faults.append(
            f"--resume {args.resume}: OpenCLIP's optimizer state cannot be taken over; "
            f"--pretrained {args.resume} starts from its weights"
        )
    if args.csv_separator not in ("\t", ",", "\\t"):
        faults.append(f"--csv-separator {args.csv_separator}: tables have tabs or commas")
    if (args.distill_model is None) != (args.distill_pretrained is None):
        faults.append("--distill-model and --distill-pretrained: OpenCLIP distills with both only")
    if args.train_data is None and args.dataset_type != "synthetic":
        faults.append("--train-data is missing")
    if faults:
        raise UserError("; ".join(faults))


def _count_gpus(launcher: list[str], command: str) -> int | None:
    """Processes of the job, as launcher and #SBATCH lines say; None if they do not."""
    sbatch = [word for line in _SBATCH.findall(_script(command)) for word in _words(line)]
    words = [*launcher, *sbatch]  # the command line wins
    nodes, tasks = _number(words, _NODES), _number(words, _RANKS)
    started = _number(words, _STARTED)
    if started is not None:  # torchrun, perhaps once per task
        return started * (nodes or tasks or 1)
    if tasks is not None:
        return tasks
    per_node = _number(words, _TASKS_OF_NODE)
    return None if per_node is None else per_node * (nodes or 1)


def _number(words: Sequence[str], options: Iterable[str]) -> int | None:
    """The number behind one of these options."""
    for index, word in enumerate(words):
        for option in options:
            if word == option and index + 1 < len(words) and words[index + 1].isdecimal():
                return int(words[index + 1])
            if word.startswith(f"{option}=") and word.partition("=")[2].isdecimal():
                return int(word.partition("=")[2])
    return None


def _recipe(
    args: Namespace, newer: Given, typed: Sequence[str], gpus: int, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """Sections of the recipe."""
    batch = args.batch_size * gpus * args.accum_freq
    epoch = None if args.train_num_samples is None else -(-args.train_num_samples // batch)
    if epoch is None and not str(args.train_data).endswith((".csv", ".tsv")):
        notes.append("set data.train_samples, unless the shards have a manifest or sizes.json")
    loss = _loss(args)
    recipe = {
        "run": _run(args),
        "model": _model(args, notes),
        "data": _data(args) | data_keys(newer) | _lanes(batch, gpus, args.workers),
        "loss": loss | loss_keys(newer, loss["caption_weight"]),
        "optim": {
            "lr": args.lr,
            "weight_decay": args.wd,
            "beta1": args.beta1,
            "beta2": args.beta2,
            "eps": args.eps,
            "clip_norm": args.grad_clip_norm or 0.0,
            **optim_keys(newer),
        },
        "schedule": _schedule(args, epoch),
        "train": {
            "epochs": float(args.epochs),
            "global_batch": batch,
            "micro_batch": args.batch_size,
        },
        "engine": _engine(args) | ({"offload": "all"} if "fsdp_offload_cpu" in newer else {}),
        "checkpoint": _checkpoint(args, epoch, typed, notes),
        "eval": _eval(args, epoch, notes),
        "log": _log(args) | log_keys(newer),
    }
    return {name: section for name, section in recipe.items() if section}


def _run(args: Namespace) -> dict[str, Any]:
    name = args.name or re.sub(r"[^\w.]+", "_", Path(args.model).stem).lower()
    section = {"name": name, "seed": args.seed}
    if args.logs != "./logs/":
        section["dir"] = str(Path(args.logs) / name)
    return section


def _model(args: Namespace, notes: list[str]) -> dict[str, Any]:
    config = load_model_config(args.model)
    section: dict[str, Any] = {"name": args.model}
    if args.pretrained:
        section["pretrained"] = args.pretrained
    elif config.multimodal_cfg is not None and args.coca_contrastive_loss_weight == 0:
        notes.append(
            "captioning alone, and no --pretrained: OpenCLIP's guide forgets it too; "
            "model.pretrained=laion2b_s13b_b90k is what it means"
        )
    if args.pretrained_image:
        section["pretrained_towers"] = True
    sizes = set(args.force_image_size or [])
    if len(sizes) > 1:
        raise UserError("--force-image-size: pictures are square")
    values = {
        "image_size": next(iter(sizes), None),
        "context_length": args.force_context_length,
        "patch_dropout": args.force_patch_dropout,
        "lock_image": args.lock_image or None,
        "image_unlocked_groups": args.lock_image_unlocked_groups if args.lock_image else None,
        "lock_text": args.lock_text or None,
        "text_unlocked_groups": args.lock_text_unlocked_layers if args.lock_text else None,
    }
    return section | {key: value for key, value in values.items() if value}


def _data(args: Namespace) -> dict[str, Any]:
    if args.train_data is None:
        train: Any = f"synthetic://shapes?count={args.train_num_samples or 100000}&size=224"
    else:
        train = _sources(args.train_data, args.train_data_upsampling_factors)
    section = {"train": train, "val": args.val_data, "workers": args.workers}
    if args.train_num_samples is not None:
        section["train_samples"] = args.train_num_samples
    if args.dataset_resampled:
        section["replacement"] = True
    if args.csv_img_key != "filepath":
        section["image_column"] = args.csv_img_key
    if args.csv_caption_key != "title":
        section["caption_column"] = args.csv_caption_key
    scale = args.aug_cfg.get("scale")
    if scale is not None:
        section["crop_scale_min"] = float(min(scale))
    return section


def _lanes(batch: int, gpus: int, workers: int) -> dict[str, int]:
    """Sample streams, where the usual number of them cannot be dealt to so many ranks."""
    try:
        default_lanes(batch, gpus)
    except ValueError:
        most = max(MAX_USUAL_LANES, gpus * workers)
        return {"lanes": max(d for d in divisors(batch) if d % gpus == 0 and d <= most)}
    return {}


def _sources(names: str, factors: str | None) -> Any:
    """`a::b` and `2::1` as weighted sources."""
    parts = names.split("::")
    if factors is None:
        return parts[0] if len(parts) == 1 else parts
    try:
        weights = [float(factor) for factor in factors.split("::")]
    except ValueError as error:
        raise UserError(f"--train-data-upsampling-factors: {error}") from error
    if len(weights) != len(parts):
        raise UserError(f"--train-data-upsampling-factors: {len(parts)} sources, {factors}")
    return [{"shards": s, "weight": w} for s, w in zip(parts, weights, strict=True)]


def _loss(args: Namespace) -> dict[str, Any]:
    """OpenCLIP takes the captioning loss if the name of the model has "coca" in it."""
    captions = load_model_config(args.model).multimodal_cfg is not None
    weights = {
        **({"contrastive": "sigmoid"} if args.siglip else {}),
        "contrastive_weight": args.coca_contrastive_loss_weight if captions else 1.0,
        "caption_weight": args.coca_caption_loss_weight if captions else 0.0,
    }
    return weights | _distill(args)


def _distill(args: Namespace) -> dict[str, Any]:
    """A teacher, which OpenCLIP has for CLIP only, without accumulation and with weight 1."""
    model, weights = args.distill_model, args.distill_pretrained
    if model is None:
        return {}
    if Path(weights).suffix in WEIGHT_SUFFIXES:
        return {"distill": {"teacher": weights, "config": model}}
    return {"distill": {"teacher": f"{model}@{weights}"}}


def _schedule(args: Namespace, epoch: int | None) -> dict[str, Any]:
    if args.skip_scheduler:
        return {"name": "constant"}
    if args.lr_scheduler not in _SCHEDULES:
        raise UserError(f"--lr-scheduler {args.lr_scheduler}: one of {', '.join(_SCHEDULES)}")
    section = {"name": _SCHEDULES[args.lr_scheduler], "warmup_steps": args.warmup}
    if args.lr_scheduler == "const-cooldown":
        if args.epochs_cooldown is None or epoch is None:
            raise UserError(
                "const-cooldown: --epochs-cooldown and --train-num-samples say how long it is"
            )
        section["cooldown_steps"] = args.epochs_cooldown * epoch
    return section


def _engine(args: Namespace) -> dict[str, Any]:
    section = {"precision": _PRECISIONS.get(args.precision, "bf16")}
    if args.grad_checkpointing:
        section["activation_checkpointing"] = "full"
    if args.torchcompile and not (args.lock_image or args.lock_text):
        section["compile"] = "blocks"
    return section


def _checkpoint(
    args: Namespace, epoch: int | None, typed: Sequence[str], notes: list[str]
) -> dict[str, Any]:
    """OpenCLIP keeps all its checkpoints, one every `save_frequency` epochs."""
    section: dict[str, Any] = {"keep": 1 if args.delete_previous_checkpoint else None}
    if epoch is not None and args.save_frequency > 0:
        section["every_steps"] = args.save_frequency * epoch
    elif "save_frequency" in typed:
        notes.append("--save-frequency: epochs of unknown length; set checkpoint.every_steps")
    return section


def _eval(args: Namespace, epoch: int | None, notes: list[str]) -> dict[str, Any]:
    if args.val_data is None and args.imagenet_val is None:
        return {}
    section: dict[str, Any] = {}
    every = args.val_frequency if args.val_data is not None else args.zeroshot_frequency
    if epoch is not None and every > 0:
        section["every_steps"] = every * epoch
    elif every > 0:
        notes.append("epochs of unknown length: set eval.every_steps to validate before the end")
    if args.val_num_samples is not None:
        section["samples"] = args.val_num_samples
    if args.imagenet_val is not None:
        if args.val_data is None:
            notes.append("eval.zeroshot is part of validation: name some pairs as data.val as well")
        section |= {"zeroshot": args.imagenet_val, "classnames": "imagenet"}
    return section


def _log(args: Namespace) -> dict[str, Any]:
    section = {"every_steps": args.log_every_n_steps}
    if "wandb" in args.report_to or "all" in args.report_to:  # as OpenCLIP looks for it
        section["wandb"] = args.wandb_project_name
    return section


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
