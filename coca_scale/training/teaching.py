"""The teacher that a recipe names: found before a run begins, in memory when its engine is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from coca_scale.data.loader import Tell
from coca_scale.data.sample import Source
from coca_scale.data.stored_features import StoredFeatures, are_stored
from coca_scale.data.tokens import Tokenizer, make_tokenizer
from coca_scale.engine.config import DTYPES, apply_kernels
from coca_scale.engine.teacher import RunningTeacher, StoredTeacher, Teacher
from coca_scale.engine.world import World
from coca_scale.errors import UserError
from coca_scale.inference.load import Found, find_model
from coca_scale.model.weights import build_model
from coca_scale.recipe import Recipe
from coca_scale.recipe.distill import DistillSection
from coca_scale.training.identity import tokenizer_digest


class Teaching(Protocol):
    """What a run learns from, beside its data."""

    @property
    def width(self) -> int:
        """Elements of its features."""
        ...

    @property
    def identity(self) -> str:
        """Digest of what it is; another one makes another run."""
        ...

    def check(self, source: Source) -> None:
        """Raises UserError for training data that it has nothing to say about."""
        ...

    def tell(self, tokenizer: Tokenizer, /) -> Tell | None:
        """What the loader brings for it; None where that is the student's own token ids."""
        ...

    def make(self, recipe: Recipe, world: World, cut: Callable[[], bool], /) -> tuple[Teacher, str]:
        """Bring it to this rank's device, and say so in a line. A collective.

        Args:
            recipe: of the stage.
            world: the ranks.
            cut: asked on rank 0 whether its weights are cut over the ranks.
        """
        ...


def find_teaching(section: DistillSection) -> Teaching | None:
    """What a recipe names; None where it names no teacher.

    Raises:
        UserError: there is no such model, or no such features.
    """
    name = section.teacher
    if name is None:
        return None
    if are_stored(name):
        return StoredTeaching(StoredFeatures(Path(name)))
    try:
        found = find_model(name, section.config)
        return ModelTeaching(name, found, make_tokenizer(found.config, found.folder))
    except UserError as error:
        raise UserError(
            f"loss.distill.teacher: {error}; or a folder of features (coca-scale data embed)"
        ) from error


@dataclass(frozen=True)
class StoredTeaching:
    """Features that were stored before; a `Teaching`."""

    features: StoredFeatures

    @property
    def width(self) -> int:
        """As of `Teaching`."""
        return self.features.facts.embed_dim

    @property
    def identity(self) -> str:
        """As of `Teaching`; the same model that runs sees augmented pictures, and is another."""
        facts = self.features.facts
        return _digest("stored", facts.identity, facts.precision)

    def check(self, source: Source) -> None:
        """As of `Teaching`."""
        self.features.check(source)

    def tell(self, _: Tokenizer) -> Tell:
        """As of `Teaching`."""
        return self.features

    def make(self, recipe: Recipe, world: World, _: Callable[[], bool]) -> tuple[Teacher, str]:
        """As of `Teaching`."""
        facts, dtype = self.features.facts, DTYPES[recipe.engine.precision]
        teacher = StoredTeacher(facts.embed_dim, facts.log_scale, dtype, world)
        return teacher, f"learns from stored features of {facts.model}"


@dataclass(frozen=True)
class ModelTeaching:
    """A model that runs beside the student; a `Teaching`."""

    name: str
    found: Found
    tokenizer: Tokenizer

    @property
    def width(self) -> int:
        """As of `Teaching`."""
        return self.found.config.embed_dim

    @cached_property
    def identity(self) -> str:
        """As of `Teaching`; reads the weights."""
        return _digest("model", self.found.digest())

    def check(self, source: Source) -> None:
        """As of `Teaching`: it looks at pictures and captions of any data."""

    def tell(self, tokenizer: Tokenizer) -> Tell | None:
        """As of `Teaching`."""
        if tokenizer_digest(tokenizer) == tokenizer_digest(self.tokenizer):
            return None
        return lambda _, caption: self.tokenizer([caption])[0]

    def make(self, recipe: Recipe, world: World, cut: Callable[[], bool]) -> tuple[Teacher, str]:
        """As of `Teaching`."""
        is_cut = world.size > 1 and world.on_first(cut)
        teacher = world.agree(lambda: self._load(recipe, world, is_cut))
        where = f"cut over {world.size} ranks" if is_cut else "whole on every rank"
        size = teacher.resident_bytes / 1e9
        return teacher, f"learns from {self.name}, {where}: {size:,.2f} GB of a rank"

    def _load(self, recipe: Recipe, world: World, cut: bool) -> RunningTeacher:
        try:
            model = build_model(self.found.config, self.found.read())
        except UserError as error:
            raise UserError(f"loss.distill.teacher={self.name}: {error}") from error
        apply_kernels(model.coca, recipe.engine)
        return RunningTeacher(model, DTYPES[recipe.engine.precision], world, cut)


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
