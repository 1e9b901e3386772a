"""What of an export and its run goes to the Hugging Face hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coca_scale.data.tokens import TOKENIZER_CONFIG, TOKENIZER_FILE
from coca_scale.errors import UserError
from coca_scale.model import ModelConfig, load_model_config
from coca_scale.openclip.folder import (
    BIN_FILE,
    CONFIG_FILE,
    OWN_CONFIG_FILE,
    OWN_WEIGHTS_FILE,
    SAFETENSORS_FILE,
    is_model_folder,
    openclip_obstacle,
    to_openclip_config,
)
from coca_scale.openclip.hub import HubFile
from coca_scale.recipe.files import read_json_as
from coca_scale.recipe.public import PRIVATE, public_architecture, public_hub_name
from coca_scale.recipe.run_folder import EXPORT, RECIPE
from coca_scale.recipe.yaml_text import dump_yaml
from coca_scale.reports.card import model_card, read_scores, validation_scores
from coca_scale.reports.page import last_sheet, read_run

_TOKENIZER_KEY = re.compile(
    r"(tokenizer_class|model_max_length|do_lower_case|clean_up_tokenization_spaces|"
    r"add_prefix_space|added_tokens_decoder|(pad|bos|eos|cls|sep|unk|mask)_token)"
)


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
    config = _without_folders(load_model_config(str(config_file)))
    obstacle = openclip_obstacle(config) if config_file.name == OWN_CONFIG_FILE else None
    parameters = _count_parameters(weight_files[0])
    sets = [*validation_scores(record), *(read_scores(path) for path in scores)]
    sheet = None if record is None else last_sheet(record)
    about = (config, obstacle, parameters, repo, record, sets, licence)
    card = model_card(*about, has_captions=sheet is not None)
    content = [HubFile(path.name, path) for path in weight_files]
    content += _config_and_tokenizer(config_file, config, repo)
    content.append(HubFile("README.md", card.encode()))
    if record is not None:
        content.append(HubFile(RECIPE, dump_yaml(record.sections).encode()))
    if sheet is not None:
        content.append(HubFile("captions.png", sheet))
    warnings = []
    if licence is None:
        warnings.append("no licence chosen: --licence mit, apache-2.0, cc-by-4.0, ...")
    if PRIVATE in (config.text.hf_model_name, config.vision_cfg.timm_model_name):
        warnings.append("a tower is named by a folder of this machine, which others do not have")
    if not sets:
        warnings.append("no scores: --scores takes what coca-scale eval wrote with --out")
    return Publication(content, warnings)


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


def _without_folders(config: ModelConfig) -> ModelConfig:
    """The config as others can use it: models and tokenizers that lie on this machine are none."""
    vision, text = config.vision_cfg, config.text
    names = ("hf_model_name", "hf_tokenizer_name")
    change: dict[str, Any] = {n: public_hub_name(v) for n in names if (v := getattr(text, n))}
    if text.hf_config is not None:
        change["hf_config"] = public_architecture(text.hf_config)
    section = config.text_section
    parts: dict[str, Any] = {section: getattr(config, section).model_copy(update=change)}
    if vision.timm_model_name is not None:
        shown = {"timm_model_name": public_hub_name(vision.timm_model_name)}
        parts["vision_cfg"] = vision.model_copy(update=shown)
    return config.model_copy(update=parts)


def _config_and_tokenizer(config_file: Path, config: ModelConfig, repo: str) -> list[HubFile]:
    """Made anew, as a file may hold more than it has to.

    A tokenizer of the model's own is looked for where its config says: in the repository.
    """
    own = config_file.name == OWN_CONFIG_FILE
    model = config.to_dict() if own else to_openclip_config(config)
    tokenizer = _tokenizer(config_file.parent)
    if tokenizer:
        model[config.text_section]["hf_tokenizer_name"] = repo
    preprocess = config.preprocess_cfg.model_dump(mode="json")  # numbers, and words of its own
    content: dict[str, Any] = {"model_cfg": model, "preprocess_cfg": preprocess}
    if own:
        content["why"] = openclip_obstacle(config)
    return [HubFile(config_file.name, _json(content)), *tokenizer]


def _tokenizer(folder: Path) -> list[HubFile]:
    """The files of a tokenizer, if there are some; of its settings those that a tokenizer needs."""
    files = []
    if (folder / TOKENIZER_FILE).is_file():
        files.append(HubFile(TOKENIZER_FILE, folder / TOKENIZER_FILE))
    if (folder / TOKENIZER_CONFIG).is_file():
        found = read_json_as(folder / TOKENIZER_CONFIG, dict[str, Any])
        kept = {key: value for key, value in found.items() if _TOKENIZER_KEY.fullmatch(key)}
        files.append(HubFile(TOKENIZER_CONFIG, _json(kept)))
    return files


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _count_parameters(weights: Path) -> int:
    try:
        with safe_open(weights, "pt") as content:
            if set(content.metadata() or {}) - {"format"}:
                raise UserError(f"{weights}: has notes of another program; export the model again")
            shapes = [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{weights}: damaged ({error}); export the model again") from error
    return sum(math.prod(shape) for shape in shapes)
