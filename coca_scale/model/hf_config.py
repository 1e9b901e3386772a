"""Architectures of Hugging Face text models, without a hub where possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coca_scale.errors import UserError

SHIPPED = Path(__file__).parent / "configs" / "huggingface"
# models whose attention becomes causal with `is_decoder`, each covered by a test
CAUSAL_TYPES = ("bert", "camembert", "roberta", "xlm-roberta")
NEEDED = ("hidden_size", "vocab_size", "pad_token_id", "max_position_embeddings")


def architecture(name: str, origin: str) -> dict[str, Any]:
    """The `config.json` of a Hugging Face model: a local folder, a shipped copy, or the hub.

    Raises:
        UserError: not found, or of a kind that cannot be made causal.
    """
    config = _read(name, origin)
    kind = config.get("model_type")
    if kind not in CAUSAL_TYPES:
        raise UserError(
            f"{origin}: text_cfg.hf_model_name {name!r} is of type {kind!r}; "
            f"supported are {', '.join(CAUSAL_TYPES)}"
        )
    missing = [key for key in NEEDED if not isinstance(config.get(key), int)]
    if missing:
        raise UserError(f"{origin}: the config of {name!r} does not say {', '.join(missing)}")
    return config


def _read(name: str, origin: str) -> dict[str, Any]:
    is_folder = Path(name).is_dir()
    file = Path(name) / "config.json"
    if not is_folder:
        file = SHIPPED / f"{name.removeprefix('FacebookAI/')}.json"
    if file.is_file():
        try:
            config: dict[str, Any] = json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not readable as JSON: {error}") from error
        return config
    if is_folder:
        raise UserError(f"{origin}: text_cfg.hf_model_name {name}: no config.json in this folder")
    from transformers import AutoConfig  # slow to import, rarely needed

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{origin}: text_cfg.hf_model_name {name!r} is neither a folder nor in the local cache "
            "nor reachable on the hub; download it where there is a network and give the folder"
        ) from error
    return found
