"""What is evaluated: something that encodes pictures and captions, and writes captions.

A loaded model is one (`loaded_encoder`), the training engine under ZeRO-3 another
(`training/validation.py`). Evaluators see no difference, and none between one rank and many:
`rounds.py` deals the work to ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coca_scale.data.tokens import Tokenizer
from coca_scale.engine.world import World
from coca_scale.inference.generate import Generated, generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.load import LoadedModel
from coca_scale.model import CoCa, ModelConfig

Progress = Callable[[int, int | None], None]  # pictures done, and in all where that is known


class Encoder(Protocol):
    """A model on every rank of a job. Its methods are called by all ranks, equally often."""

    @property
    def world(self) -> World:
        """The ranks."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [n, 3, H, W] → unit features, fp32 [n, d]."""
        ...

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Token ids [n, T] → unit features, fp32 [n, d]."""
        ...

    def write(
        self,
        pixels: Tensor,
        options: GenerationOptions,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
    ) -> Generated:
        """Captions of uint8 pixels [n, 3, H, W], as of `generate`."""
        ...


@dataclass(frozen=True)
class CocaEncoder:
    """A CoCa or CLIP of this package, in evaluation mode; an `Encoder`.

    Attributes:
        world: the ranks.
        coca: the model, whole on every rank or sharded over them.
        tokenizer: of the model.
        prepare: uint8 pixels [n, 3, H, W] → images on its device, in its dtype.
        same_steps: write captions in as many steps on every rank, as a sharded model needs it.
    """

    world: World
    coca: CoCa
    tokenizer: Tokenizer
    prepare: Callable[[Tensor], Tensor]
    same_steps: bool

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.coca.config

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """As of `Encoder`."""
        return self.coca.encode_image(self.prepare(pixels)).float()

    @torch.no_grad()
    def encode_texts(self, tokens: Tensor) -> Tensor:
        """As of `Encoder`."""
        return self.coca.encode_text(tokens.to(self.world.device)).float()

    def write(
        self,
        pixels: Tensor,
        options: GenerationOptions,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
    ) -> Generated:
        """As of `Encoder`.

        Raises:
            UserError: as `generate`; with `same_steps` on all ranks together, as they all are here.
        """

        def attempt() -> Generated:
            return generate(
                self.coca,
                self.prepare(pixels),
                self.tokenizer,
                options,
                prompts=prompts,
                seeds=seeds,
                same_steps=self.same_steps,
            )

        return self.world.agree(attempt) if self.same_steps else attempt()


def loaded_encoder(loaded: LoadedModel, world: World) -> CocaEncoder:
    """A loaded model on the world's device, whole on every rank."""
    coca = loaded.model.coca
    return CocaEncoder(world, coca, loaded.tokenizer, loaded.normalize, same_steps=False)


@dataclass(frozen=True)
class Feeding:
    """How a model is fed.

    Attributes:
        batch_size: pictures or sentences at a time, on each rank.
        limit: use at most that many pictures, the first ones of the inputs.
        progress: is told of pictures done and in all.
    """

    batch_size: int = 64
    limit: int | None = None
    progress: Progress = lambda _done, _total: None


def stack_pixels(pixels: Sequence[Tensor], image_size: int) -> Tensor:
    """uint8 [n, 3, H, W]; a blank picture if there is none, so that the model has something."""
    if not pixels:
        return torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    return torch.stack(list(pixels))
