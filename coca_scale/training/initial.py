"""The model a run begins with: fresh, pretrained, or as a checkpoint will fill it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca_scale.engine.checkpoint import read_config, read_trained
from coca_scale.engine.config import require_compilable, require_fp8
from coca_scale.engine.constants import read_constants
from coca_scale.engine.world import World
from coca_scale.errors import UserError
from coca_scale.inference.load import Found, find_model, pretrained_name
from coca_scale.model import CoCa, LogitScale, ModelConfig
from coca_scale.model.config import SIGMOID_START
from coca_scale.model.deferred import Drawn, FirstWeights, ToBeLoaded, deferred
from coca_scale.model.freeze import Kind, freeze, pausing
from coca_scale.model.preprocess import OPENAI
from coca_scale.model.tower_weights import load_tower_weights, require_statistics
from coca_scale.model.weights import fit_weights, load_coca, require_finite
from coca_scale.recipe import Recipe
from coca_scale.recipe.schema import ModelSection

# what may differ between the config that weights were made for and the one they are loaded into
_ADAPTED = {
    "vision_cfg": {"image_size", "patch_dropout", "output_tokens", "timm_model_pretrained"},
    "text_cfg": {
        *("context_length", "vocab_size", "output_tokens", "hf_tokenizer_name"),
        *("hf_model_name", "hf_model_pretrained", "hf_config", "variable_text"),
    },
    "multimodal_cfg": {
        *("context_length", "vocab_size", "dim_head", "n_queries", "attn_pooler_heads"),
        *("output_tokens", "hf_tokenizer_name", "variable_text"),
    },
}


@dataclass(frozen=True)
class Start:
    """What a run begins with, before there is a model in memory.

    Attributes:
        config: the model, with what comes with the weights.
        found: weights to start from, where the recipe names some and the run is new.
        checkpoint: that the run will resume from.
    """

    config: ModelConfig
    found: Found | None
    checkpoint: Path | None


def find_start(recipe: Recipe, config: ModelConfig, checkpoint: Path | None, world: World) -> Start:
    """Where a run begins, the same on every rank.

    A collective: rank 0 goes first, so that only one downloads.

    Args:
        recipe: what to start from.
        config: the model that the recipe names.
        checkpoint: that the run will resume from.
        world: the ranks.

    Raises:
        AgreedError: weights are of another model, or cannot be had.
    """
    return world.agree(lambda: _find(recipe.model, config, checkpoint), first_alone=True)


@dataclass(frozen=True)
class Initial:
    """The model before training.

    Attributes:
        coca: with what is locked marked as such. Tensors have no memory, or what a mapped file
            holds; those of towers of other libraries, and locked ones of a checkpoint, have theirs.
        logit_scale: its temperature.
        first: the values of tensors without memory, the same on every rank; None without any.
    """

    coca: CoCa
    logit_scale: LogitScale
    first: FirstWeights | None


def initial_model(recipe: Recipe, start: Start, world: World, notes: list[str]) -> Initial:
    """The model before training, the same on every rank.

    A collective: rank 0 goes first, so that only one downloads.

    Args:
        recipe: what to lock.
        start: with a checkpoint only what training leaves alone is read here.
        world: the ranks.
        notes: gets a line for everything a user should know.

    Raises:
        AgreedError: the weights do not fit or are damaged, or those of a tower cannot be had.
    """
    initial = world.agree(lambda: _build(recipe, start, notes), first_alone=True)
    world.agree(lambda: require_fp8(initial.coca, recipe.engine, world.device))
    return initial


def _find(section: ModelSection, config: ModelConfig, checkpoint: Path | None) -> Start:
    if checkpoint is not None:
        return Start(config.for_weights_of(read_config(checkpoint)), None, checkpoint)
    if section.pretrained is None:
        return Start(config, None, None)
    name = pretrained_name(section)
    found = find_model(name, section.name)
    config = config.for_weights_of(found.config)
    differences = _differences(found.config, config)
    if differences:
        raise UserError(f"model.pretrained={name}: made for another model: {differences}")
    return Start(config, found, None)


def _build(recipe: Recipe, start: Start, notes: list[str]) -> Initial:
    torch.manual_seed(recipe.run.seed)
    logit_scale, first = LogitScale.of(start.config), None
    if start.checkpoint is not None:
        coca, first = _without_memory(start.config, recipe.run.seed, will_be_loaded=True)
        freeze(coca, recipe.model, recipe.loss)
        coca.load_state_dict(_constants(start.checkpoint, coca), strict=False, assign=True)
    elif start.found is not None:
        coca = _pretrained(start.config, start.found, logit_scale, recipe.model, notes)
    else:
        coca, first = _without_memory(start.config, recipe.run.seed)
        filled = load_tower_weights(coca) if recipe.model.pretrained_towers else []
        notes += filled
        if filled:
            require_finite(coca.state_dict())
        require_statistics(coca, has_weights=any("image tower" in line for line in filled))
    freeze(coca, recipe.model, recipe.loss)
    require_compilable(coca, recipe.engine)
    frozen = sum(p.numel() for p in coca.parameters() if not p.requires_grad)
    if frozen:
        total = sum(p.numel() for p in coca.parameters())
        notes.append(f"{frozen:,} of {total:,} parameters are locked")
    return Initial(coca, logit_scale, first)


def _without_memory(
    config: ModelConfig, seed: int, will_be_loaded: bool = False
) -> tuple[CoCa, FirstWeights | None]:
    """A model and what gives its tensors their values; zeros where a checkpoint will do that.

    Towers of other libraries are made as those want it, with memory.
    """
    if config.has_foreign_towers:
        return CoCa(config), None
    with deferred() as record:
        coca = CoCa(config)
    return coca, ToBeLoaded(record) if will_be_loaded else Drawn(record, seed)


def _constants(checkpoint: Path, coca: CoCa) -> dict[str, Tensor]:
    """What training will leave alone, and what it has left alone so far.

    A stage before may have trained it, or had it in another size.
    """
    found = read_constants(checkpoint)
    locked = [name for name, p in coca.named_parameters() if not p.requires_grad]
    found |= read_trained(checkpoint, [name for name in locked if name not in found])
    return fit_weights(found, coca.config)[0]


def trained_sizes(recipe: Recipe) -> dict[str, tuple[torch.Size, Kind | None]]:
    """The weights that a recipe trains, by name, with their shapes.

    And with the losses at whose weight they pause: by all that the optimizer's state is cut.
    """
    with torch.device("meta"):
        coca = CoCa(ModelConfig.from_recipe(recipe.model))
    freeze(coca, recipe.model, recipe.loss)
    pauses = pausing(coca, recipe.loss)
    trained = {name: p for name, p in coca.named_parameters() if p.requires_grad}
    return {name: (p.shape, pauses.get(p)) for name, p in trained.items()}


def _pretrained(
    config: ModelConfig,
    found: Found,
    logit_scale: LogitScale,
    section: ModelSection,
    notes: list[str],
) -> CoCa:
    name = pretrained_name(section)
    weights, changes = fit_weights(found.weights, config)
    try:
        coca = load_coca(config, logit_scale, weights)
    except UserError as error:
        raise UserError(f"model.pretrained={name}: {error}") from error
    notes.append(f"starts from {name}: {len(weights)} tensors")
    notes += changes
    notes += _trained_with(config, found.config, section.name)
    return coca


def _trained_with(config: ModelConfig, found: ModelConfig, name: str) -> list[str]:
    """Lines about what came with the weights, where it is not OpenAI's default."""
    notes = ["the weights were trained with QuickGELU"] if found.quick_gelu else []
    ours, theirs = config.preprocess_cfg, found.preprocess_cfg
    if ours != theirs:
        notes.append(f"warning: {name} has {ours}, but the weights were trained with {theirs}")
    elif ours != OPENAI:
        notes.append(f"pictures as the weights were trained: {ours}")
    return notes


def _differences(made_for: ModelConfig, wanted: ModelConfig) -> str:
    """Fields in which two configs differ though weights cannot be adapted to it."""
    theirs, ours = made_for.model_dump(), wanted.model_dump()
    lines = []
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        old: dict[str, Any] = theirs.pop(part) or {}
        new: dict[str, Any] = ours.pop(part) or {}
        if bool(old) != bool(new):
            lines.append(f"{part} is {'there' if old else 'not there'}")
            continue
        for key in sorted(old.keys() - _ADAPTED[part]):
            if old[key] != new[key]:
                lines.append(f"{part}.{key} {old[key]}, not {new[key]}")
    for key in ("custom_text", "preprocess_cfg"):
        theirs.pop(key), ours.pop(key)
    for key in SIGMOID_START:  # weights without a bias get one
        theirs.pop(key), ours.pop(key)
    lines += [f"{key} {theirs[key]}, not {ours[key]}" for key in theirs if theirs[key] != ours[key]]
    return "; ".join(lines)
