"""The model card of an export: what is said of a model on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from pydantic import Field

from coca_scale.engine.optimizer import kind_of
from coca_scale.errors import UserError
from coca_scale.evaluation.kinds import KINDS, by_kind
from coca_scale.evaluation.results import Kind, Score
from coca_scale.losses import LABELS
from coca_scale.model import ModelConfig
from coca_scale.openclip.folder import needs_openclip
from coca_scale.recipe.files import read_json_as
from coca_scale.recipe.load import load_recipe
from coca_scale.recipe.public import public_text
from coca_scale.recipe.run_folder import RECIPE
from coca_scale.recipe.schema import Recipe
from coca_scale.recipe.stages import recipes_of
from coca_scale.reports.page import LARGEST, RunRecord
from coca_scale.version import __version__


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one kind on some data.

    Attributes:
        kind: of evaluation.
        data: what it was measured on, for people.
        scores: by name.
    """

    kind: Kind
    data: str
    scores: dict[str, float]

    def score(self, name: str) -> Score:
        """What is known of a score; of a name that nobody knows, the name."""
        return self.kind.scores.get(name) or Score(name)


@dataclass(frozen=True)
class _ScoreFile:
    task: str
    data: list[str]
    scores: dict[str, Annotated[float, Field(gt=-LARGEST, lt=LARGEST, allow_inf_nan=False)]]
    pictures: int | None = None


def read_scores(path: Path) -> ScoreSet:
    """A file that `coca-scale eval --out` wrote.

    Raises:
        UserError: it is none.
    """
    try:
        found = read_json_as(path, _ScoreFile)
    except UserError as error:
        raise UserError(f"{error}: not scores of coca-scale eval") from error
    if found.task not in KINDS:
        raise UserError(f"{path}: not scores of coca-scale eval, which has no {found.task!r:.40}")
    names = ", ".join(map(public_text, found.data))
    counts = "pictures" if found.pictures is None else f"{found.pictures:,} pictures"
    scores = {public_text(name): value for name, value in found.scores.items()}
    return ScoreSet(KINDS[found.task], f"{names}, {counts}", scores)


def validation_scores(record: RunRecord | None) -> list[ScoreSet]:
    """Those of the last validation."""
    if record is None or not record.validation:
        return []
    last = record.validation[-1]
    pictures = f" {last['samples']:,} pictures," if "samples" in last else ""
    about = f"the run's own validation data,{pictures} step {last['step']:,}"
    return [ScoreSet(KINDS[name], about, scores) for name, scores in by_kind(last).items()]


def model_card(
    config: ModelConfig,
    obstacle: str | None,
    parameters: int,
    repo: str,
    record: RunRecord | None,
    sets: Sequence[ScoreSet],
    licence: str | None,
    has_captions: bool,
) -> str:
    """Text of the card.

    Args:
        config: of the model, as it is published.
        obstacle: why OpenCLIP cannot load it.
        parameters: of the model.
        repo: ORG/NAME.
        record: of the run it came from.
        sets: scores.
        licence: as the hub calls it.
        has_captions: whether captions.png goes with it.

    Raises:
        UserError: the run's recipe is none.
    """
    captions, family = config.multimodal_cfg is not None, config.family.lower()
    needed = needs_openclip(config)
    vision, text = config.vision_cfg, config.text
    model = {
        "image tower": vision.label,
        "picture size": f"{vision.image_size} px",
        "text tower": text.label,
        "caption length": f"{config.context_length} tokens",
    }
    data = ModelCardData(
        language="en",
        library_name="coca-scale" if obstacle else "open_clip",
        license=licence,
        model_name=repo.partition("/")[2],
        pipeline_tag="image-to-text" if captions else "zero-shot-image-classification",
        tags=["clip", *([family, "image-captioning"] if captions else []), "coca-scale"],
        eval_results=[result for found in sets for result in _eval_results(found)] or None,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    template = files("coca_scale.reports").joinpath("card.md").read_text(encoding="utf-8")
    text_of = environment.from_string(template).render(
        card_data=data.to_yaml(),
        name=repo.partition("/")[2],
        repo=repo,
        kind=f"{config.family} (contrastive captioner)" if captions else "CLIP",
        openclip="OpenCLIP" if needed == "3.0" else f"OpenCLIP {needed} or later",
        parameters=f"{parameters:,}",
        version=__version__,
        model=model,
        captions=captions,
        has_captions=has_captions,
        obstacle=obstacle or "",
        scores=[
            {
                "title": f"{found.kind.name} on {found.data}",
                "rows": [
                    (found.score(k).label, f"{found.score(k).shown(v):.1f}")
                    for k, v in found.scores.items()
                ],
            }
            for found in sets
        ],
        trained={} if record is None else _training_facts(record),
        licence=licence,
    )
    return re.sub(r"\n{3,}", "\n\n", text_of)


def _eval_results(found: ScoreSet) -> list[EvalResult]:
    slug = re.sub(r"\W+", "-", found.data).strip("-").lower()
    return [
        EvalResult(
            task_type=found.kind.hub_task,
            dataset_type=slug,
            dataset_name=found.data,
            metric_type=name,
            metric_name=found.score(name).label,
            metric_value=round(found.score(name).shown(value), 2),
        )
        for name, value in found.scores.items()
    ]


def _training_facts(record: RunRecord) -> dict[str, str]:
    recipe = load_recipe(record.folder / RECIPE)
    stages = [*recipes_of(recipe).values()]
    shards = [source.shards for stage in stages for source in stage.data.train]
    sources = [name for of in shards for name in (of if isinstance(of, list) else [of])]
    start, optim, schedule = recipe.model.pretrained, recipe.optim, recipe.schedule
    loss = stages[-1].loss
    teacher = recipe.loss.distill.teacher
    weights = {name: _weight(loss.weight(name)) for name in LABELS if loss.learns(name)}
    kinds = {"contrastive": f"contrastive ({loss.contrastive})"}
    several = len(stages) > 1
    return {
        "data": ", ".join(dict.fromkeys(map(public_text, sources))),
        **({"starting from": public_text(start)} if start else {}),
        **({"learnt from": public_text(teacher)} if teacher else {}),
        "samples seen": _length(record.metrics[-1], with_batch=not several),
        **({"stages": "; then ".join(map(_stage, stages))} if several else {}),
        "loss": " + ".join(f"{weight} × {kinds.get(n, n)}" for n, weight in weights.items()),
        "optimizer": f"{kind_of(optim).label}, lr {optim.lr}, weight decay {optim.weight_decay}, "
        f"{schedule.name} schedule, {schedule.warmup_steps} steps of warm-up",
        "engine": f"DeepSpeed ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}, "
        f"{record.ranks or '?'} rank(s)",
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }


def _weight(weight: float | dict[str, float]) -> str:
    """A loss's factor, or its points."""
    if not isinstance(weight, dict):
        return str(weight)
    return f"({', '.join(f'{factor} from {place}' for place, factor in weight.items())})"


def _stage(recipe: Recipe) -> str:
    """A part of a run in a few words; its lr where it has one of its own is in the recipe."""
    train, size = recipe.train, recipe.model.image_size
    length = f"{train.steps:,} steps" if train.samples is None else f"{train.samples:,} samples"
    return f"{length} of {train.global_batch:,} at {'full size' if size is None else f'{size} px'}"


def _length(last: dict[str, Any], with_batch: bool) -> str:
    """How far a run has come, as far as its last line of metrics says."""
    seen = f"{last['samples_seen']:,} in " if "samples_seen" in last else ""
    batch = f" of {last['global_batch']:,}" if with_batch and "global_batch" in last else ""
    return f"{seen}{last['step']:,} steps{batch}"
