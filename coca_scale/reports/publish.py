"""A model's page on the Hugging Face hub: what is said of it, and what goes there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from safetensors import SafetensorError, safe_open

from coca_scale.data.tokens import TOKENIZER_CONFIG, TOKENIZER_FILE
from coca_scale.errors import UserError
from coca_scale.evaluation.tasks import score_label
from coca_scale.losses import LABELS
from coca_scale.model import ModelConfig, load_model_config
from coca_scale.openclip.folder import (
    BIN_FILE,
    CONFIG_FILE,
    OWN_CONFIG_FILE,
    OWN_WEIGHTS_FILE,
    SAFETENSORS_FILE,
    is_model_folder,
)
from coca_scale.openclip.hub import HubFile
from coca_scale.recipe.load import read_sections
from coca_scale.recipe.run_folder import EXPORT, RECIPE
from coca_scale.reports.page import RunRecord, last_sheet, read_run
from coca_scale.version import __version__

_MACHINE = re.compile(r"^(/|~|\.\.?/|[A-Za-z]:\\)")
_COUNTS = {"step", "samples"}
_KINDS = {"image_to_": "retrieval", "text_to_": "retrieval", "zeroshot_": "zeroshot"}
_TASKS = {
    "zeroshot": "zero-shot-image-classification",
    "retrieval": "image-text-retrieval",
    "captioning": "image-to-text",
}


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one kind on some data.

    Attributes:
        task: zeroshot, retrieval or captioning.
        data: what it was measured on, for people.
        scores: by name, between 0 and 1; CIDEr up to 10.
    """

    task: str
    data: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Publication:
    """What goes to the hub.

    Attributes:
        files: in the order they are listed.
        warnings: what a person should think about before.
    """

    files: list[HubFile]
    warnings: list[str]

    @property
    def card(self) -> str:
        """The model card."""
        (card,) = (f.content for f in self.files if f.name == "README.md")
        assert isinstance(card, bytes)
        return card.decode()


def prepare(
    folder: Path,
    repo: str,
    run: Path | None = None,
    scores: Sequence[Path] = (),
    licence: str | None = None,
) -> Publication:
    """Collect the files of an export and write its model card; nothing is sent.

    Args:
        folder: an exported folder, or a run, whose export it is then.
        repo: ORG/NAME on the hub.
        run: the run it came from, if that is neither `folder` nor the folder it lies in.
        scores: JSON files of `coca-scale eval … --out`.
        licence: as the hub calls it, such as mit.

    Raises:
        UserError: not a model, damaged, or not scores.
    """
    export, run = _locate(folder, run)
    record = None if run is None else read_run(run)
    config_file, weight_files = _model_files(export)
    config = load_model_config(str(config_file))
    parameters = _count_parameters(weight_files[0])
    sets = [*_validation_scores(record), *(_read_scores(path) for path in scores)]
    sheet = None if record is None else last_sheet(record)
    card = _card(config, config_file, parameters, repo, record, sets, licence, sheet is not None)
    content = [HubFile(path.name, path) for path in weight_files]
    content += _config_and_tokenizer(config_file, repo)
    content.append(HubFile("README.md", card.encode()))
    if record is not None:
        text = yaml.safe_dump(public(read_sections(record.folder / RECIPE)), sort_keys=False)
        content.append(HubFile(RECIPE, text.encode()))
    if sheet is not None:
        content.append(HubFile("captions.png", sheet))
    warnings = []
    if licence is None:
        warnings.append("no licence chosen: --licence mit, apache-2.0, cc-by-4.0, ...")
    if not sets:
        warnings.append("no scores: --scores takes what coca-scale eval wrote with --out")
    return Publication(content, warnings)


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


def _locate(folder: Path, run: Path | None) -> tuple[Path, Path | None]:
    """The exported folder and the run it is from, if that is known."""
    if (folder / RECIPE).is_file() and not is_model_folder(folder):
        if not is_model_folder(folder / EXPORT):
            raise UserError(
                f"{folder}: this run has no export yet; coca-scale export {folder} --out "
                f"{folder / 'export'} writes one"
            )
        return folder / EXPORT, run or folder
    if not is_model_folder(folder):
        raise UserError(
            f"{folder}: neither an exported model nor a run; coca-scale export writes one"
        )
    parent = folder.resolve().parent
    if run is None and folder.name == EXPORT and (parent / RECIPE).is_file():
        run = parent
    return folder, run


def _model_files(export: Path) -> tuple[Path, list[Path]]:
    """Config and weight files, safetensors first."""
    if (export / OWN_CONFIG_FILE).is_file():
        config, names = export / OWN_CONFIG_FILE, [OWN_WEIGHTS_FILE]
    else:
        config, names = export / CONFIG_FILE, [SAFETENSORS_FILE, BIN_FILE]
    missing = [name for name in names if not (export / name).is_file()]
    if missing:
        raise UserError(f"{export}: {', '.join(missing)} missing; export the model again")
    return config, [export / name for name in names]


def _config_and_tokenizer(config_file: Path, repo: str) -> list[HubFile]:
    """A tokenizer of the model's own is looked for where its config says: in the repository."""
    names = (TOKENIZER_FILE, TOKENIZER_CONFIG)
    own = [
        HubFile(n, config_file.with_name(n)) for n in names if config_file.with_name(n).is_file()
    ]
    if not own:
        return [HubFile(config_file.name, config_file)]
    content = json.loads(config_file.read_text())
    content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo
    return [HubFile(config_file.name, json.dumps(content, indent=2).encode()), *own]


def _count_parameters(weights: Path) -> int:
    try:
        with safe_open(weights, "pt") as content:
            shapes = [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{weights}: damaged ({error}); export the model again") from error
    return sum(math.prod(shape) for shape in shapes)


def _read_scores(path: Path) -> ScoreSet:
    try:
        found = json.loads(path.read_text())
        names = ", ".join(public(str(name)) for name in found["data"])
        counts = f"{found['pictures']:,} pictures" if "pictures" in found else "pictures"
        return ScoreSet(found["task"], f"{names}, {counts}", dict(found["scores"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not scores of coca-scale eval ({error!r})") from error


def _validation_scores(record: RunRecord | None) -> list[ScoreSet]:
    """Those of the last validation."""
    if record is None or not record.validation:
        return []
    last = record.validation[-1]
    about = f"the run's own validation data, {last['samples']:,} pictures, step {last['step']:,}"
    sets: dict[str, dict[str, float]] = {}
    for name, value in last.items():
        if name not in _COUNTS:
            kind = next((t for start, t in _KINDS.items() if name.startswith(start)), "captioning")
            sets.setdefault(kind, {})[name] = value
    return [ScoreSet(task, about, values) for task, values in sets.items()]


def _card(
    config: ModelConfig,
    config_file: Path,
    parameters: int,
    repo: str,
    record: RunRecord | None,
    sets: Sequence[ScoreSet],
    licence: str | None,
    has_captions: bool,
) -> str:
    captions = config.multimodal_cfg is not None
    own = config_file.name == OWN_CONFIG_FILE
    vision, text = config.vision_cfg, config.text_cfg
    model = {
        "image tower": vision.timm_model_name or f"ViT, patches of {vision.patch_size} px",
        "picture size": f"{vision.image_size} px",
        "text tower": text.hf_model_name or f"transformer, {text.layers} × {text.width}",
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
                "title": f"{found.task} on {found.data}",
                "rows": [(score_label(k), f"{100 * v:.1f}") for k, v in found.scores.items()],
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
            task_type=_TASKS[found.task],
            dataset_type=slug,
            dataset_name=found.data,
            metric_type=name,
            metric_name=score_label(name),
            metric_value=round(100 * value, 2),
        )
        for name, value in found.scores.items()
    ]


def _training_facts(record: RunRecord) -> dict[str, str]:
    recipe, last = record.recipe, record.metrics[-1]
    sources = [public(source["shards"]) for source in recipe.get("data.train", [])]
    start = public(recipe.get("model.pretrained"))
    versions = record.about.get("versions", {})
    return {
        "data": ", ".join(map(str, sources)),
        **({"starting from": str(start)} if start else {}),
        "samples seen": f"{last['samples_seen']:,} in {last['step']:,} steps of "
        f"{last['global_batch']:,}",
        "loss": " + ".join(f"{recipe.get(f'loss.{name}_weight')} × {name}" for name in LABELS),
        "optimizer": f"AdamW, lr {recipe.get('optim.lr')}, weight decay "
        f"{recipe.get('optim.weight_decay')}, {recipe.get('schedule.name')} schedule, "
        f"{recipe.get('schedule.warmup_steps')} steps of warm-up",
        "engine": f"DeepSpeed ZeRO {recipe.get('engine.zero_stage')}, "
        f"{recipe.get('engine.precision')}, {record.about.get('ranks', '?')} rank(s)",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
