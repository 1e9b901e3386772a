"""The keys of a recipe that say where samples come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat

from coca_scale.recipe.section import (
    Fraction,
    NonNegativeInt,
    PathText,
    PositiveInt,
    SampleCount,
    Section,
)
from coca_scale.recipe.text import known_encoding


class WeightedShards(Section):
    """Shards with the number of times an epoch has each of them."""

    shards: PathText | Annotated[list[PathText], Field(min_length=1)] = Field(
        description="Patterns as in data.train."
    )
    weight: Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)] = Field(
        1.0, description="Upsampling factor; for a fraction, shards take turns."
    )


class FieldRule(Section):
    """What a field of a sample's .json must be; a sample without it is left out."""

    min: FiniteFloat | None = Field(None, description="Smallest number.")
    max: FiniteFloat | None = Field(None, description="Largest number.")
    one_of: Annotated[list[str | int | bool], Field(min_length=1)] | None = Field(
        None, description="Values it may have."
    )

    def accepts(self, value: object) -> bool:
        """Whether a value satisfies all that is set."""
        if self.one_of is not None and not any(_same(value, one) for one in self.one_of):
            return False
        if self.min is None and self.max is None:
            return value is not None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = self.min is None or value >= self.min
        return low and (self.max is None or value <= self.max)


def _same(found: object, wanted: object) -> bool:
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted  # true is no 1


class DataFilters(Section):
    """Samples to leave out; they are counted, but not as bad."""

    min_side: PositiveInt | None = Field(None, description="Shortest side of a picture, in pixels.")
    max_aspect_ratio: Annotated[float, Field(ge=1.0)] | None = Field(
        None, description="Longest side over shortest side."
    )
    fields: dict[str, FieldRule] = Field(
        default_factory=dict,
        description="Conditions on fields of the .json: {similarity: {min: 0.28}, "
        "LANGUAGE: {one_of: [en]}}.",
    )


def _sources(value: object) -> object:
    """One pattern, or a list of patterns and weighted ones, as a list of weighted ones."""
    entries = value if isinstance(value, list) else [value]
    return [{"shards": entry} if isinstance(entry, str) else entry for entry in entries]


Sources = Annotated[
    list[WeightedShards],
    Field(min_length=1),
    BeforeValidator(_sources, json_schema_input_type=str | list[str | WeightedShards]),
]


CaptionWeights = dict[str, Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]]


class DataSection(Section):
    """Where samples come from and in which order they are taken."""

    train: Sources = Field(
        description="WebDataset shards (folder, path, {000..999} braces, glob, http(s)://, s3://, "
        "gs://, pipe:), a list of them or of {shards: …, weight: 2.0}, a .csv/.tsv file, or "
        "synthetic://shapes?count=N."
    )
    val: Sources | None = Field(
        None, description="Validation data, same forms; null turns validation off."
    )
    mean_tokens: Annotated[float, Field(ge=2.0, le=2**16)] = Field(
        20.0,
        description="Tokens of a caption on average, start and end included, as `coca-scale data "
        "inspect` counts them; what is planned depends on it, training does not.",
    )
    caption_mean_tokens: Annotated[float, Field(ge=2.0, le=2**16)] | None = Field(
        None,
        description="Likewise of captions to write, where those have captions of their own; null: "
        "as mean_tokens.",
    )
    train_samples: SampleCount | None = Field(
        None, description="Samples per epoch, needed for train.epochs where it cannot be counted."
    )
    workers: NonNegativeInt = Field(
        4, description="Loader processes per rank; 0 decodes in the training process."
    )
    lanes: PositiveInt | None = Field(
        None,
        description="Independent sample streams; divides global_batch, multiple of the ranks. "
        "Fixes the sample order, so it must not change during a run. "
        "Default: the divisor of global_batch up to 1024 that itself has most divisors.",
    )
    shuffle_window: PositiveInt = Field(
        128, description="Raw samples per lane that are shuffled together while reading shards."
    )
    replacement: bool = Field(
        False,
        description="Draw the shards of an epoch with replacement, weights as chances.",
    )
    captions: CaptionWeights = Field(
        default_factory=dict,
        description="Sampling weights of several captions per picture: txt (one per line), or a "
        "field of the .json (text or list of texts): {txt: 0.5, recaption: 0.5}; captions of one "
        "name share its weight. Empty: .txt, else the field caption. NAME:sentences are the "
        "sentences of a text, each by itself.",
    )
    contrastive_captions: CaptionWeights = Field(
        default_factory=dict,
        description="Likewise of the captions that pictures are matched to, where captions to "
        "write are drawn apart: {txt: 1.0, recaption:sentences: 1.0}. Empty: as captions.",
    )
    caption_captions: CaptionWeights = Field(
        default_factory=dict,
        description="Likewise of the captions that the model learns to write, drawn apart: "
        "{recaption: 1.0}. Empty: as captions. With neither, one caption is for both.",
    )
    filters: DataFilters = Field(
        default_factory=lambda: DataFilters(),
        description="min_side (pixels), max_aspect_ratio, fields: conditions on the .json, such "
        "as {similarity: {min: 0.28}, LANGUAGE: {one_of: [en]}}.",
    )
    retries: NonNegativeInt = Field(5, description="Further attempts to read a part of a shard.")
    timeout_seconds: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        60.0, description="Longest wait for 4 MiB of a remote shard."
    )
    cache_dir: PathText | None = Field(
        None, description="Keep copies of remote shards in this folder."
    )
    cache_gigabytes: Annotated[float, Field(gt=0.0, le=1e9)] | None = Field(
        None, description="Most that is kept in cache_dir; further shards are streamed."
    )
    image_column: str = Field("filepath", description="CSV/TSV column with the image path.")
    caption_column: str = Field("title", description="CSV/TSV column with the caption.")
    encoding: Annotated[str, AfterValidator(known_encoding)] | None = Field(
        None, description="Of CSV/TSV files that are neither UTF-8 nor UTF-16: cp1252, …"
    )
    crop_scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.9,
        description="Smallest area fraction of the random training crop; 1 uses the centre crop.",
    )
    max_bad_fraction: Fraction = Field(
        0.1,
        description="Share of unusable samples above which the run stops; below 256 samples, "
        "when chance does not explain it.",
    )

    @property
    def two_captions(self) -> bool:
        """Whether captions to match and captions to write are drawn apart."""
        return bool(self.contrastive_captions or self.caption_captions)

    @property
    def caption_weights(self) -> tuple[CaptionWeights, CaptionWeights | None]:
        """Of captions to match, and of captions to write; None: what is drawn is for both."""
        if not self.two_captions:
            return self.captions, None
        return self.contrastive_captions or self.captions, self.caption_captions or self.captions
