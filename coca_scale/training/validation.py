"""Validation during training: the evaluators of `coca-scale eval` on the sharded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from coca_scale.data.sample import Source
from coca_scale.data.tokens import Tokenizer
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.evaluation.captioning import Captioned
from coca_scale.evaluation.captioning_scores import Captioning
from coca_scale.evaluation.encoder import CocaEncoder, Feeding
from coca_scale.evaluation.pictures import BadPicture, Picture, first_pictures
from coca_scale.evaluation.results import Evaluator, Result
from coca_scale.evaluation.retrieval import Retrieval
from coca_scale.evaluation.zeroshot import Labelled, ZeroShot
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.model import ModelConfig
from coca_scale.recipe.schema import EvalSection

GREEDY = GenerationOptions("greedy", min_seq_len=0)


class HeldPictures:
    """The first samples of data.val, read once; a `PictureSource`."""

    name = "data.val"

    def __init__(self, source: Source, most: int) -> None:
        self.count = most
        self._source = source
        self._entries: list[Picture | BadPicture] | None = None

    def entries(
        self, model: ModelConfig, rank: int, ranks: int, _: bool
    ) -> Iterator[Picture | BadPicture]:
        """As of `PictureSource`; dealt in turn, always."""
        if self._entries is None:
            self._entries = first_pictures(self._source, model, self.count, rank, ranks)
        yield from self._entries


@dataclass(frozen=True)
class ToWrite:
    """The same pictures with the captions that the model learns to write; a `PictureSource`."""

    pictures: HeldPictures

    @property
    def name(self) -> str:
        """As of the pictures."""
        return self.pictures.name

    @property
    def count(self) -> int:
        """As of the pictures."""
        return self.pictures.count

    def entries(
        self, model: ModelConfig, rank: int, ranks: int, strided: bool
    ) -> Iterator[Picture | BadPicture]:
        """As of the pictures."""
        for entry in self.pictures.entries(model, rank, ranks, strided):
            if isinstance(entry, Picture) and entry.targets is not None:
                entry = replace(entry, captions=entry.targets)
            yield entry


@dataclass
class ValidationResult:
    """What a validation found.

    Attributes:
        results: of each evaluation, the same on every rank.
    """

    results: list[Result] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Pairs of picture and caption."""
        return self.results[0].counts["pictures"]

    @property
    def scores(self) -> dict[str, float]:
        """All scores, under names that stand beside each other."""
        return {name: value for found in self.results for name, value in found.flat().items()}

    @property
    def captioned(self) -> list[Captioned]:
        """Pictures with the model's captions."""
        return [item for found in self.results for item in found.captioned]


class Validation:
    """The evaluations that a recipe asks for, on its validation data."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        settings: EvalSection,
        labelled: Labelled | None,
        captions: bool,
    ) -> None:
        """Plan them.

        Args:
            source: of data.val.
            tokenizer: of the model.
            settings: of the recipe.
            labelled: pictures for zero-shot classification, if any.
            captions: whether the model writes captions.
        """
        self._tokenizer = tokenizer
        pictures = HeldPictures(source, settings.samples)
        self._evaluators: list[Evaluator] = [Retrieval(pictures, equal_captions=True)]
        if captions and (settings.scored_captions or settings.captions):
            scored, shown = settings.scored_captions, settings.captions
            to_write = ToWrite(pictures)
            self._evaluators.append(Captioning(to_write, GREEDY, scored, shown, java=False))
        if labelled is not None:
            self._evaluators.append(ZeroShot(labelled))

    def run(self, engine: TrainEngine) -> ValidationResult:
        """Measure. A collective.

        Raises:
            AgreedError: no rank has a usable sample, or a rank cannot read its own.
        """
        engine.evaluate()
        prepare, world = engine.prepare, engine.world
        encoder = CocaEncoder(world, engine.module, self._tokenizer, prepare, same_steps=True)
        return ValidationResult([e.run(encoder, Feeding()) for e in self._evaluators])
