"""What a caption for each loss gives and costs, on drawings and with several seeds.

    python benchmarks/two_captions.py --seeds 0 1 2 --out benchmarks/results/two_captions_cpu.json

Trains recipes/tiny_two_captions.yaml, which matches short captions and writes long ones, and the
same with either for both, to their ends, one after the other on one rank. All are asked the same
of 256 held-out drawings: to find them by their short captions and by their long ones, where any
drawing with an equal caption is right, and to write, which is compared with the long ones. FLOPs
are those of forward and backward passes, counted, of all samples seen.
"""

from __future__ import annotations

from pathlib import Path

from drawings import compare

from coca_scale.data.sources import open_source
from coca_scale.engine.world import World
from coca_scale.evaluation.captioning_scores import Captioning
from coca_scale.evaluation.encoder import Feeding, loaded_encoder
from coca_scale.evaluation.retrieval import Retrieval
from coca_scale.inference.load import load_model
from coca_scale.recipe import load_recipe
from coca_scale.training.validation import GREEDY, HeldPictures

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_two_captions.yaml"
ONE = ("data.contrastive_captions={}", "data.caption_captions={}")
CASES = {
    "short for both": ONE,
    "long for both": (*ONE, "data.captions={long: 1.0}", "data.mean_tokens=31"),
    "short to match, long to write": (),
    "short or a sentence to match, long to write": (
        "data.contrastive_captions={txt: 0.5, long:sentences: 0.5}",
    ),
    "as the third, 25 % in parallel": ("loss.caption_parallel=0.25",),
}
HELD_OUT = 256


def scores(folder: Path, world: World) -> dict[str, float]:
    """Of the model that a run has left."""
    encoder = loaded_encoder(load_model(str(folder)), world)
    found: dict[str, float] = {}
    for kind in ("txt", "long"):
        recipe = load_recipe(RECIPE, (*ONE, f"data.captions={{{kind}: 1.0}}"))
        assert recipe.data.val is not None
        pictures = HeldPictures(open_source(recipe.data.val, recipe.data, 0), HELD_OUT)
        retrieval = Retrieval(pictures, equal_captions=True).run(encoder, Feeding())
        for name in ("image_to_text_r1", "text_to_image_r1"):
            found[f"{kind}_{name}"] = retrieval.scores[name]
    written = Captioning(pictures, GREEDY, HELD_OUT, java=False).run(encoder, Feeding())
    return found | {name: written.scores[name] for name in ("cider", "exact")}


if __name__ == "__main__":
    compare(__doc__, RECIPE, CASES, scores)
