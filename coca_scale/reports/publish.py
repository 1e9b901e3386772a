"""What of an export and its run goes to the Hugging Face hub."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from coca_scale.data.tokens import TOKENIZER_CONFIG, TOKENIZER_FILE
from coca_scale.errors import UserError
from coca_scale.model import load_model_config
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
from coca_scale.reports.card import model_card, public, read_scores, validation_scores
from coca_scale.reports.page import last_sheet, read_run


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
    sets = [*validation_scores(record), *(read_scores(path) for path in scores)]
    sheet = None if record is None else last_sheet(record)
    about = (config, config_file, parameters, repo, record, sets, licence)
    card = model_card(*about, has_captions=sheet is not None)
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
