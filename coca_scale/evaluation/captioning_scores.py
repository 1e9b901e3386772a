"""Captioning as an evaluation: captions are written and compared with true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coca_scale.evaluation.caption_scores import score_captions
from coca_scale.evaluation.captioning import Captioned, Captioner
from coca_scale.evaluation.encoder import Encoder, Feeding
from coca_scale.evaluation.pictures import PictureSource
from coca_scale.evaluation.results import Kind, Result, Score
from coca_scale.evaluation.rounds import PictureRounds
from coca_scale.inference.generation_options import GenerationOptions

KIND = Kind(
    "captioning",
    "image-to-text",
    {
        "bleu_1": Score("BLEU-1"),
        "bleu_2": Score("BLEU-2"),
        "bleu_3": Score("BLEU-3"),
        "bleu_4": Score("BLEU-4", headline=True, charted=True),
        "rouge_l": Score("ROUGE-L"),
        "cider": Score("CIDEr", headline=True, charted=True),
        "meteor": Score("METEOR"),
        "spice": Score("SPICE"),
        "exact": Score("captions exactly right"),
    },
)


@dataclass(frozen=True)
class Captioning:
    """BLEU, METEOR, ROUGE-L, CIDEr and SPICE of generated captions, by COCO's own code.

    Attributes:
        pictures: with captions.
        options: how captions are written.
        scored: pictures whose captions are scored; None for all.
        shown: pictures that the result keeps with their captions.
        java: use Java if it is there, for METEOR and SPICE.
    """

    pictures: PictureSource
    options: GenerationOptions
    scored: int | None = None
    shown: int = 0
    java: bool = True

    def run(self, encoder: Encoder, feeding: Feeding) -> Result:
        """As of `Evaluator`."""
        world = encoder.world
        captioner = world.agree(lambda: Captioner(encoder, self.options))
        if self.scored is not None:
            feeding = replace(feeding, limit=max(self.scored, self.shown))
        rounds = PictureRounds(self.pictures, encoder, feeding)
        written: list[Captioned] = []
        for batch in rounds:
            for item in captioner.batch(batch):
                keep = len(written) < self.shown  # the first of all are among the first here
                written.append(item if keep else item.without_pixels())
        everyone = rounds.collect(written)
        result = world.on_first(lambda: self._score(everyone[: self.scored]))
        result.bad = rounds.bad
        result.captioned = everyone[: self.shown]
        return result

    def _score(self, captioned: Sequence[Captioned]) -> Result:
        if not captioned:
            return Result(KIND, {}, {})
        references = {number: item.picture.captions for number, item in enumerate(captioned)}
        captions = {number: item.captions[0] for number, item in enumerate(captioned)}
        found = score_captions(references, captions, self.java)
        exact = sum(item.right for item in captioned) / len(captioned)
        counts = {"pictures": len(captioned), "references": sum(map(len, references.values()))}
        return Result(KIND, found.values | {"exact": exact}, counts, dict(found.left_out))
