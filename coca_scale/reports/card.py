"""The model card of an export: what is said of a model on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from coca_scale.engine.optimizer import kind_of
from coca_scale.errors import UserError
from coca_scale.evaluation.kinds import KINDS, by_kind
from coca_scale.evaluation.results import Kind, Score
from coca_scale.losses import LABELS
from coca_scale.model import ModelConfig
from coca_scale.openclip.folder import OWN_CONFIG_FILE
from coca_scale.recipe.schema import OptimSection
from coca_scale.reports.page import RunRecord
from coca_scale.version import __version__

_MACHINE = re.compile(r"^(/|~|\.\.?/|[A-Za-z]:\\)")


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


def read_scores(path: Path) -> ScoreSet:
    """A file that `coca-scale eval --out` wrote.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(path.read_text())
        names = ", ".join(public(str(name)) for name in found["data"])
        counts = f"{found['pictures']:,} pictures" if "pictures" in found else "pictures"
        return ScoreSet(KINDS[found["task"]], f"{names}, {counts}", dict(found["scores"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not scores of coca-scale eval ({error!r})") from error


def validation_scores(record: RunRecord | None) -> list[ScoreSet]:
    """Those of the last validation."""
    if record is None or not record.validation:
        return []
    last = record.validation[-1]
    about = f"the run's own validation data, {last['samples']:,} pictures, step {last['step']:,}"
    return [ScoreSet(KINDS[name], about, scores) for name, scores in by_kind(last).items()]


def public(value: Any) -> Any:
    """The same without what is of one machine or secret.

    Of local paths the last part stays, of `pipe:` commands nothing, and from addresses user,
    password and query are cut.
    """
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return "pipe:..."
    if "://" in value:
        try:
            parts = urlsplit(value)
        except ValueError:  # no address after all
            return "..."
        if parts.scheme == "synthetic":
            return value
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    return Path(value).name or value if _MACHINE.match(value) else value


def model_card(
    config: ModelConfig,
    config_file: Path,
    parameters: int,
    repo: str,
    record: RunRecord | None,
    sets: Sequence[ScoreSet],
    licence: str | None,
    has_captions: bool,
) -> str:
    """Text of the card.

    Args:
        config: of the model.
        config_file: as it is published.
        parameters: of the model.
        repo: ORG/NAME.
        record: of the run it came from.
        sets: scores.
        licence: as the hub calls it.
        has_captions: whether captions.png goes with it.
    """
    captions = config.multimodal_cfg is not None
    own = config_file.name == OWN_CONFIG_FILE
    vision, text = config.vision_cfg, config.text_cfg
    model = {
        "image tower": vision.label,
        "picture size": f"{vision.image_size} px",
        "text tower": text.label,
        "caption length": f"{config.context_length} tokens",
    }
    data = ModelCardData(
        language="en",
        library_name="coca-scale" if own else "open_clip",
        license=licence,
        model_name=repo.partition("/")[2],
        pipeline_tag="image-to-text" if captions else "zero-shot-image-classification",
        tags=["clip", *(["coca", "image-captioning"] if captions else []), "coca-scale"],
        eval_results=[result for found in sets for result in _eval_results(found)] or None,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    template = files("coca_scale.reports").joinpath("card.md").read_text(encoding="utf-8")
    text_of = environment.from_string(template).render(
        card_data=data.to_yaml(),
        name=repo.partition("/")[2],
        repo=repo,
        kind="CoCa (contrastive captioner)" if captions else "CLIP",
        parameters=f"{parameters:,}",
        version=__version__,
        model=model,
        captions=captions,
        has_captions=has_captions,
        obstacle=json.loads(config_file.read_text())["why"] if own else "",
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
    recipe, last = record.recipe, record.metrics[-1]
    sources = [public(source["shards"]) for source in recipe.get("data.train", [])]
    start = public(recipe.get("model.pretrained"))
    versions = record.about.get("versions", {})
    keys = {k.partition(".")[2]: v for k, v in recipe.items() if k.startswith("optim.")}
    optim = OptimSection.model_validate(keys)
    weights = {name: recipe.get(f"loss.{name}_weight") for name in LABELS}
    return {
        "data": ", ".join(map(str, sources)),
        **({"starting from": str(start)} if start else {}),
        "samples seen": f"{last['samples_seen']:,} in {last['step']:,} steps of "
        f"{last['global_batch']:,}",
        "loss": " + ".join(f"{weight} × {name}" for name, weight in weights.items() if weight),
        "optimizer": f"{kind_of(optim).label}, lr {recipe.get('optim.lr')}, weight decay "
        f"{recipe.get('optim.weight_decay')}, {recipe.get('schedule.name')} schedule, "
        f"{recipe.get('schedule.warmup_steps')} steps of warm-up",
        "engine": f"DeepSpeed ZeRO {recipe.get('engine.zero_stage')}, "
        f"{recipe.get('engine.precision')}, {record.about.get('ranks', '?')} rank(s)",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
