"""Export of a trained model to an OpenCLIP folder, offline and without a GPU."""

from __future__ import annotations

from pathlib import Path

from coca_scale.data.tokens import ClipPrefixTokenizer
from coca_scale.engine.loading import LoadedModel
from coca_scale.openclip.folder import write_folder


def export(loaded: LoadedModel, folder: Path) -> None:
    """Write weights, config and, where it is not CLIP's own, the tokenizer.

    Raises:
        ValueError: a weight is not finite.
    """
    write_folder(loaded.weights, loaded.config, folder)
    if isinstance(loaded.tokenizer, ClipPrefixTokenizer):
        loaded.tokenizer.save(folder)
