"""Export of a trained model to a model folder, offline and without a GPU."""

from __future__ import annotations

from pathlib import Path

from coca_scale.data.tokens import FastTokenizer
from coca_scale.inference.load import LoadedModel
from coca_scale.openclip.folder import write_folder


def export(loaded: LoadedModel, folder: Path) -> str | None:
    """Write weights, config and, where it is not CLIP's own, the tokenizer.

    Returns:
        Why OpenCLIP cannot load the folder; None where it can.

    Raises:
        UserError: a weight is not finite.
    """

    def write_tokenizer(folder: Path) -> None:
        if isinstance(loaded.tokenizer, FastTokenizer):
            loaded.tokenizer.save(folder)

    return write_folder(loaded.weights, loaded.config, folder, write_tokenizer)
