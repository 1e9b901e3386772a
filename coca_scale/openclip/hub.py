"""Published models: OpenCLIP's registry and the Hugging Face hub."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # of whichever client it uses

from coca_scale.errors import UserError
from coca_scale.openclip.alone import package_folder
from coca_scale.openclip.folder import CONFIG_FILE

HUB_PREFIX = "hf-hub:"


def hub_folder(name: str) -> tuple[Path, Path]:
    """Config and weight file of `hf-hub:ORG/NAME`, from the local cache or downloaded.

    Raises:
        UserError: not there, or not reachable.
    """
    from open_clip.pretrained import download_pretrained_from_hf  # takes seconds

    repository = name.removeprefix(HUB_PREFIX)
    try:
        config = download_pretrained_from_hf(repository, filename=CONFIG_FILE)
        return Path(config), Path(download_pretrained_from_hf(repository))
    except _FAULTS as error:
        raise UserError(_unreachable(name, error)) from error


def registry_file(model: str, tag: str) -> Path:
    """Weight file of an OpenCLIP registry entry, from the local cache or downloaded.

    Raises:
        UserError: OpenCLIP has no such tag, or it is not reachable.
    """
    from open_clip.pretrained import (  # takes seconds
        download_pretrained,
        get_pretrained_cfg,
        list_pretrained_tags_by_model,
    )

    entry = get_pretrained_cfg(model, tag)
    if not entry:
        tags = list_pretrained_tags_by_model(model)
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = f"it has {', '.join(tags)}" if tags else f"it has no weights for {model}"
        raise UserError(
            f"{tag!r} is neither a file, nor a folder, nor a tag of {model} in OpenCLIP; "
            f"{hint}{known}"
        )
    try:
        return Path(download_pretrained(entry))
    except _FAULTS as error:
        raise UserError(_unreachable(f"{model}@{tag}", error)) from error


def registry_config(model: str) -> Path | None:
    """OpenCLIP's own config of that name, None if it has none."""
    file = package_folder("open_clip") / "model_configs" / f"{model}.json"
    return file if file.is_file() else None


def registry_facts(model: str, tag: str) -> dict[str, Any]:
    """What OpenCLIP's registry says of an entry's weights, as fields of a model config.

    QuickGELU where they were trained with it, which OpenCLIP itself only warns of unless the
    model's name ends in -quickgelu, and how pictures become pixels.
    """
    from open_clip.pretrained import get_pretrained_cfg  # takes seconds

    entry = get_pretrained_cfg(model, tag)
    forced = {"quick_gelu": True} if entry.get("quick_gelu") else {}
    return {**forced, "preprocess_cfg": entry}


@dataclass(frozen=True)
class HubFile:
    """A file for the hub, on disk or in memory.

    Attributes:
        name: in the repository.
        content: its path, or what is in it.
    """

    name: str
    content: Path | bytes

    @property
    def size_bytes(self) -> int:
        """How large it is."""
        held = self.content
        return held.stat().st_size if isinstance(held, Path) else len(held)


def upload(repository: str, files: Sequence[HubFile], private: bool | None, message: str) -> str:
    """Put files into a repository of the Hugging Face hub, in one commit; make it if need be.

    Args:
        repository: ORG/NAME.
        files: files of the same names are replaced, others stay.
        private: None leaves it to the hub's default.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: not signed in, not allowed, or not reachable.
    """
    api = HfApi(library_name="coca-scale")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(file.name, file.content) for file in files]
        api.create_commit(repository, operations, commit_message=message)
    except (HTTPError, OSError) as error:
        raise UserError(_not_uploaded(repository, error)) from error
    return str(address)


def _not_uploaded(repository: str, error: Exception) -> str:
    """What to do about it, in one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the hub does not know you: hf auth login, or set HF_TOKEN to a token that may write"
    if status == 403:
        return f"this token may not write to {repository}: make one that may at the hub's settings"
    reason = " ".join(str(error).split())[:160]
    return f"{repository} was not uploaded ({reason}); the same command tries again"


# faults of the network and of the hub are OSErrors, malformed repository names ValueErrors
_FAULTS = (OSError, ValueError, RuntimeError)


def _unreachable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160]
    return (
        f"{name} is not in the local cache and cannot be downloaded ({reason}); fetch it where "
        "there is a network, and give the folder or file instead"
    )
