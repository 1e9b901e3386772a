"""What a checkpoint is of, and whether a recipe may go on from it.

A checkpoint keeps the recipe that wrote it and what the recipe's names stood for: the model, the
tokenizer, the data. `KEYS` says of every key whether another value would make it another run, which
is refused before anything is loaded, or a change of the same run, which is said.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from coca_scale.data.sample import BadSample, RawSample, Source
from coca_scale.data.tokens import Tokenizer
from coca_scale.errors import UserError
from coca_scale.model import ModelConfig
from coca_scale.model.config import parse_model_config
from coca_scale.recipe import Recipe
from coca_scale.recipe.section import Section
from coca_scale.recipe.stages import Stage
from coca_scale.recipe.text import visible

STAGES = "schedule.stages"
SAMPLES = 3  # that tell data which moved from other data
_SHOWN = 80  # characters of a value


class Key(Enum):
    """What another value of a recipe's key means for a run that goes on."""

    FIXED = "another run"
    RESOLVED = "another run, if what it stands for differs"
    FREE = "the same run"
    START = "the same run, and this start says so anyway"


def _keys(section: str, kind: Key, names: str) -> dict[str, Key]:
    return {f"{section}.{name}": kind for name in names.split()}


KEYS: dict[str, Key] = {
    **_keys("run", Key.FIXED, "seed"),
    **_keys("run", Key.FREE, "name"),
    **_keys("run", Key.START, "dir"),
    **_keys("model", Key.RESOLVED, "name image_size context_length"),
    # where the weights came from, and which of them train
    **_keys("model", Key.FIXED, "pretrained pretrained_towers"),
    **_keys("model", Key.FIXED, "lock_image image_unlocked_groups lock_text text_unlocked_groups"),
    **_keys("model", Key.FREE, "patch_dropout"),
    **_keys("data", Key.RESOLVED, "train lanes"),
    # which samples there are, and their order (docs/data.md)
    **_keys("data", Key.FIXED, "shuffle_window replacement captions filters"),
    **_keys("data", Key.FIXED, "contrastive_captions caption_captions"),
    **_keys("data", Key.FIXED, "image_column caption_column encoding"),
    **_keys("data", Key.FREE, "val mean_tokens train_samples workers crop_scale_min"),
    **_keys("data", Key.FREE, "caption_mean_tokens"),
    **_keys("data", Key.FREE, "retries timeout_seconds cache_dir cache_gigabytes max_bad_fraction"),
    **_keys(
        "loss", Key.FIXED, "contrastive contrastive_weight caption_weight label_smoothing z_loss"
    ),
    **_keys("loss", Key.RESOLVED, "distill"),
    **_keys("loss", Key.FREE, "contrastive_chunk_rows contrastive_resident caption_chunk_rows"),
    **_keys("loss", Key.FIXED, "caption_parallel"),
    **_keys("loss", Key.FREE, "caption_kernel"),
    **_keys("optim", Key.FIXED, "name layer_decay"),  # what its state is, and is cut for
    **_keys("optim", Key.FREE, "lr weight_decay beta1 beta2 eps clip_norm ema_decay"),
    **_keys("schedule", Key.FREE, "name warmup_steps cooldown_steps"),
    **_keys("schedule", Key.RESOLVED, "stages"),  # finished ones are fixed
    **_keys("train", Key.FIXED, "global_batch"),
    **_keys("train", Key.FREE, "steps samples epochs micro_batch"),
    **_keys("engine", Key.FIXED, "precision"),  # DeepSpeed's files of one are not those of another
    **_keys("engine", Key.FREE, "zero_stage activation_checkpointing compile offload"),
    **_keys("engine", Key.FREE, "activation_budget_gb secondary_shard gc_every_steps deepspeed"),
    **_keys("engine", Key.FREE, "start_timeout_minutes step_timeout_minutes save_timeout_minutes"),
    **_keys("engine", Key.FREE, "silence_timeout_minutes attention_kernel fp8 kept_graphs"),
    **_keys("checkpoint", Key.FREE, "every_steps every_minutes keep keep_every_steps background"),
    **_keys("checkpoint", Key.FREE, "local_every_steps local_dir"),
    **_keys("checkpoint", Key.FREE, "mirror"),
    **_keys("checkpoint", Key.START, "resume"),
    **_keys("health", Key.FREE, "max_bad_steps rollbacks spike_deviations straggler_factor"),
    **_keys("eval", Key.FREE, "every_steps samples captions scored_captions"),
    **_keys("eval", Key.FREE, "zeroshot classnames templates"),
    **_keys("log", Key.FREE, "every_steps tensorboard wandb profile_steps"),
}

# parts of a model config that neither change what a training step computes nor fit no weights
_FREE_IN_MODEL = {
    *("custom_text", "vision_cfg.patch_dropout", "vision_cfg.timm_model_pretrained"),
    *("text_cfg.hf_model_pretrained", "text_cfg.hf_model_name", "text_cfg.hf_tokenizer_name"),
    *("text_cfg.hf_config._name_or_path", "text_cfg.hf_config.transformers_version"),
    *("multimodal_cfg.dim_head", "multimodal_cfg.n_queries", "multimodal_cfg.attn_pooler_heads"),
    *("multimodal_cfg.hf_tokenizer_name", "text_cfg.variable_text", "multimodal_cfg.variable_text"),
}
_MODEL_KEYS = {
    "vision_cfg.image_size": "model.image_size",
    "text_cfg.context_length": "model.context_length",
    "multimodal_cfg.context_length": "model.context_length",
}

# whatever a caption may have; ids of these words tell one vocabulary from another
_PROBES = (
    "a photo of two small dogs and a red bicycle in front of the old station at night, 1984",
    "Person's hands holding the world's best café-au-lait: €3.50!",
    "the quick brown fox jumps over the lazy dog; sphinx of black quartz, judge my vow",
    "eine Straße in Zürich, été à Paris, 東京の夜, Москва зимой, शहर",
    "0 1 2 3 4 5 6 7 8 9 # % & ( ) * + / < = > ? @ [ ] ^ _ { | } ~",
)


@dataclass(frozen=True)
class Identity:
    """What a run is in one of its stages, as a checkpoint keeps it beside model config and lanes.

    Attributes:
        recipe: of the stage, as plain data by key, with the stages of the run.
        ranks: of the job.
        tokenizer: digest of what it makes of captions.
        data: digest of the training data's names, sizes and weights, wherever they lie.
        samples: digest of the first samples; None if one of them could not be read.
        teacher: digest of what the run learns from beside its data; None for nothing.
    """

    recipe: dict[str, Any]
    ranks: int
    tokenizer: str
    data: str
    samples: str | None
    teacher: str | None = None


def identify(
    run: Recipe,
    recipe: Recipe,
    ranks: int,
    tokenizer: Tokenizer,
    source: Source,
    teacher: str | None = None,
) -> Identity:
    """What a run is in the stage that has `recipe`; reads the first samples of its data."""
    values = recipe.model_dump(mode="json")
    flat = {key: _value(values, key) for key in KEYS}
    flat[STAGES] = run.model_dump(mode="json")["schedule"]["stages"]
    tokens = tokenizer_digest(tokenizer)
    return Identity(flat, ranks, tokens, source.identity(), _first_samples(source), teacher)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of what it makes of captions, its context included."""
    about = (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)
    ids = [ids.tolist() for ids in tokenizer(list(_PROBES))]
    return _digest(about, ids)


def compare(
    checkpoint: Path,
    saved: Mapping[str, Any],
    now: Identity,
    config: ModelConfig,
    lanes: int,
    stage: Stage,
) -> list[str]:
    """See that a checkpoint is of this run.

    Args:
        checkpoint: its folder.
        saved: its progress, which of old checkpoints says less.
        now: what the run is in the stage that the checkpoint is of.
        config: the model of that stage.
        lanes: of the run.
        stage: that one, as the run has it now.

    Returns:
        Lines about what has changed in the run.

    Raises:
        UserError: it is of another run, and in what.
    """
    old = parse_model_config(saved.get("model_cfg"), str(checkpoint))
    if now.recipe["model.pretrained"] is not None:
        config = config.for_weights_of(old)  # with what came with the weights
    other = list(_other_model(old, config))
    other += _other_past(saved, stage)
    if (count := len(saved["lanes"])) != lanes:
        other.append(f"data.lanes {count} → {lanes}")
    changed, notes = list[str](), list[str]()
    identity = saved.get("identity")
    if identity is not None:
        values = {**_defaults(), **identity["recipe"]}
        other += _other_stages(values[STAGES], now.recipe[STAGES], stage.number - 1)
        for key, kind in KEYS.items():
            if key in values and values[key] != now.recipe[key] and kind is not Key.START:
                line = f"{key} {_shown(values[key])} → {_shown(now.recipe[key])}"
                (other if kind is Key.FIXED else changed).append(line)
        if identity["tokenizer"] != now.tokenizer and not other:  # another context cuts elsewhere
            other.append("the tokenizer makes other tokens of captions")
        other += _other_teacher(identity.get("teacher"), now.teacher, values, now.recipe)
        moved = values.get("data.train") != now.recipe["data.train"]
        other += _other_data(identity, now, moved, notes)
        if identity["ranks"] != now.ranks:
            changed.append(f"ranks {identity['ranks']} → {now.ranks}")
    if other:
        raise UserError(
            f"{checkpoint} is of another run: {'; '.join(dict.fromkeys(other))}. Set that as it "
            f"was, or start a new run from its weights: model.pretrained={checkpoint}, run.dir=…"
        )
    if changed:
        notes.insert(0, f"changed since {checkpoint.name}: {'; '.join(changed)}")
    return notes


def _other_model(old: ModelConfig, new: ModelConfig) -> Iterator[str]:
    """What makes two configs two models, under the recipe's names where it has them."""
    before, after = (dict(_flat(config.model_dump(mode="json"))) for config in (old, new))
    for field in sorted((before.keys() | after.keys()) - _FREE_IN_MODEL):
        if before.get(field) != after.get(field):
            key = _MODEL_KEYS.get(field, f"model.name ({field})")
            yield f"{key} {_shown(before.get(field))} → {_shown(after.get(field))}"


def _other_past(saved: Mapping[str, Any], stage: Stage) -> Iterator[str]:
    """What of the steps and samples up to here does not fit the stages of the run."""
    step, goes_on = saved["step"], stage.number < stage.of
    if step < stage.first or (goes_on and step > stage.last):
        yield f"{stage.name} is of steps {stage.first:,} to {stage.last:,}, and it has {step:,}"
    elif stage.number > 1 and saved["samples_seen"] != stage.samples_seen(step):
        yield f"samples seen {saved['samples_seen']:,} → {stage.samples_seen(step):,}"


def _other_stages(old: list[Any], new: list[Any], finished: int) -> Iterator[str]:
    """What was changed in the first `finished` stages; how they were cut over ranks is free."""
    for number, (before, after) in enumerate(zip(old[:finished], new, strict=False)):
        for key in sorted((before.keys() | after.keys()) - {"micro_batch"}):
            if before.get(key) != after.get(key):
                shown = f"{_shown(before.get(key))} → {_shown(after.get(key))}"
                yield f"{STAGES}.{number}.{key} {shown}, of a stage that is finished"


def _other_teacher(
    old: str | None, new: str | None, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[str]:
    """What of a teacher makes it another run: who it is, and how much is learnt from it."""
    if old != new:
        there = ("none" if one is None else "one" for one in (old, new))
        yield f"loss.distill: {'another teacher' if old and new else ' → '.join(there)}"
    elif new is not None:
        for key in ("weight", "feature_weight"):
            values = [recipe["loss.distill"][key] for recipe in (before, after)]
            if values[0] != values[1]:
                yield f"loss.distill.{key} {values[0]} → {values[1]}"


def _other_data(
    identity: Mapping[str, Any], now: Identity, moved: bool, notes: list[str]
) -> Iterator[str]:
    """What makes it other training data; the same in another place gets a note."""
    if identity["data"] != now.data:
        yield "data.train: other names, numbers or weights of shards or samples, or a manifest less"
        return
    known = identity["samples"] is not None and now.samples is not None
    differ = known and identity["samples"] != now.samples
    if moved and differ:
        yield "data.train: the first samples are others"
    elif moved:
        notes.append("data.train has moved: names and sizes are the same in the new place")
    elif differ:
        notes.append(
            "warning: the first samples of data.train are not those that they were when it was "
            "saved; the run goes on at the same numbers in other data"
        )


def _first_samples(source: Source) -> str | None:
    found = []
    for sample in itertools.islice(source.ordered(0, 1), SAMPLES):
        if isinstance(sample, BadSample):
            return None
        found.append((_picture(sample), sample.caption))
    return _digest(*found)


def _picture(sample: RawSample) -> str:
    image = sample.image
    data = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.sha256(data).hexdigest()


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _value(values: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name]


def _defaults() -> dict[str, Any]:
    """Of the keys that have one: what recipes meant that did not know a key yet."""
    found = {}
    for section, field in Recipe.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name, inner in field.annotation.model_fields.items():
            if not inner.is_required():
                value = inner.get_default(call_default_factory=True)
                plain = value.model_dump(mode="json") if isinstance(value, Section) else value
                found[f"{section}.{name}"] = plain
    return found


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
