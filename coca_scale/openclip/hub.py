"""Published models: OpenCLIP's registry and the Hugging Face hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from open_clip import get_pretrained_cfg
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    list_pretrained_tags_by_model,
)

from coca_scale.openclip.folder import CONFIG_FILE

HUB_PREFIX = "hf-hub:"


def hub_folder(name: str) -> tuple[Path, Path]:
    """Config and weight file of `hf-hub:ORG/NAME`, from the local cache or downloaded.

    Raises:
        ValueError: not there, or not reachable.
    """
    repository = name.removeprefix(HUB_PREFIX)
    try:
        config = download_pretrained_from_hf(repository, filename=CONFIG_FILE)
        return Path(config), Path(download_pretrained_from_hf(repository))
    except _FAULTS as error:
        raise ValueError(_unreachable(name, error)) from error


def registry_file(model: str, tag: str) -> Path:
    """Weight file of an OpenCLIP registry entry, from the local cache or downloaded.

    Raises:
        ValueError: OpenCLIP has no such tag, or it is not reachable.
    """
    entry = get_pretrained_cfg(model, tag)
    if not entry:
        tags = list_pretrained_tags_by_model(model)
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = f"it has {', '.join(tags)}" if tags else f"it has no weights for {model}"
        raise ValueError(
            f"{tag!r} is neither a file, nor a folder, nor a tag of {model} in OpenCLIP; "
            f"{hint}{known}"
        )
    try:
        return Path(download_pretrained(entry))
    except _FAULTS as error:
        raise ValueError(_unreachable(f"{model}@{tag}", error)) from error


# faults of the network and of the hub are OSErrors, malformed repository names ValueErrors
_FAULTS = (OSError, ValueError, RuntimeError)


def _unreachable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160]
    return (
        f"{name} is not in the local cache and cannot be downloaded ({reason}); fetch it where "
        "there is a network, and give the folder or file instead"
    )
