"""OpenCLIP's padding mask of the CLS token against the one it should have been, on drawings.

    python benchmarks/cls_mask.py --out benchmarks/results/cls_mask_cpu.json

The experiment that open_clip's issue 554 asks for: the same model, data, order and seeds with the
mask that is shifted by one, which published weights were trained with, and with the mask where it
belongs (`correct_cls_mask`); and the second mask given to the model that was trained with the
first. Each model is asked to find 256 held-out drawings by their captions, and the captions by
their drawings, where any equal caption is right, and to write them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from drawings import compare

from coca_scale.data.sources import open_source
from coca_scale.engine.world import World
from coca_scale.evaluation.captioning_scores import Captioning
from coca_scale.evaluation.encoder import Feeding, loaded_encoder
from coca_scale.evaluation.retrieval import Retrieval
from coca_scale.inference.load import load_model
from coca_scale.model import load_model_config
from coca_scale.recipe import load_recipe
from coca_scale.training.validation import GREEDY, HeldPictures

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
HELD_OUT = 256


def model_file(folder: Path, corrected: bool) -> Path:
    """recipes/tiny.yaml's model with one of the masks."""
    raw = load_model_config("coca_tiny").to_dict()
    raw["text_cfg"]["correct_cls_mask"] = corrected
    file = folder / f"{'corrected' if corrected else 'legacy'}.json"
    file.write_text(json.dumps(raw))
    return file


def scores(folder: Path, world: World) -> dict[str, float]:
    """Of the model that a run has left."""
    recipe = load_recipe(RECIPE, ())
    assert recipe.data.val is not None
    pictures = HeldPictures(open_source(recipe.data.val, recipe.data, 0), HELD_OUT)
    loaded = load_model(str(folder))
    encoder = loaded_encoder(loaded, world)
    found: dict[str, float] = {}
    names = ("image_to_text_r1", "text_to_image_r1")
    retrieval = Retrieval(pictures, equal_captions=True)
    for name in names:
        found[name] = retrieval.run(encoder, Feeding()).scores[name]
    found["captions_right"] = (
        Captioning(pictures, GREEDY, HELD_OUT, java=False).run(encoder, Feeding()).scores["exact"]
    )
    text = loaded.model.coca.text
    if not text.correct_cls_mask:
        text.correct_cls_mask = True
        for name in names:
            found[f"{name}_other_mask"] = retrieval.run(encoder, Feeding()).scores[name]
    return found


def main() -> None:
    """Train both, three seeds each."""
    with tempfile.TemporaryDirectory() as folder:
        files = {corrected: model_file(Path(folder), corrected) for corrected in (False, True)}
        cases = {
            "legacy mask": (f"model.name={files[False]}", "train.steps=300"),
            "corrected mask": (f"model.name={files[True]}", "train.steps=300"),
        }
        compare(__doc__, RECIPE, cases, scores)


if __name__ == "__main__":
    main()
