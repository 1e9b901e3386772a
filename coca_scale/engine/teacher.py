"""What a model learns from: another one that runs beside it, or features that one has left.

A teacher is no part of what is trained: it has no gradients, is in no checkpoint and in no export.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_scale.engine.cut_layers import CutLayers
from coca_scale.engine.world import World
from coca_scale.model.coca import CoCa
from coca_scale.model.image import normalize_pixels
from coca_scale.model.packing import Lesson, PackedCaptions, sent
from coca_scale.model.weights import Model


class Teacher(Protocol):
    """Features of the samples that train, by whatever means.

    Attributes:
        width: elements of a feature.
        log_scale: ln of the teacher's logit scale.
    """

    width: int
    log_scale: float

    def lay_out(self, told: Iterable[Tensor]) -> list[Lesson]:
        """What `features` takes of the samples of each micro-batch. Local, in any thread.

        Args:
            told: what the loader brings of them, on the host: the teacher's token ids int64 [b, T],
                or stored features fp16 [b, 2, width].
        """
        ...

    def features(self, images: Tensor, lesson: Lesson) -> Tensor:
        """Unit features [b, 2, width] (image, text) of a micro-batch. A collective.

        Args:
            images: its uint8 pictures [b, 3, H, W], as they train, on the device.
            lesson: by `lay_out`.
        """
        ...


class StoredTeacher:
    """Features that `coca-scale data embed` has stored; a `Teacher`."""

    def __init__(self, width: int, log_scale: float, dtype: torch.dtype, world: World) -> None:
        """`dtype`: of the features that it hands on."""
        self.width, self.log_scale = width, log_scale
        self._dtype, self._device = dtype, world.device

    def lay_out(self, told: Iterable[Tensor]) -> list[Lesson]:
        """As of `Teacher`."""
        return [sent(part, self._device) for part in told]

    def features(self, images: Tensor, lesson: Lesson) -> Tensor:
        """As of `Teacher`."""
        assert isinstance(lesson, Tensor) and len(lesson) == len(images)
        return lesson.to(self._dtype)


class RunningTeacher:
    """A model that sees what the student sees, resized to its own size; a `Teacher`."""

    def __init__(self, model: Model, dtype: torch.dtype, world: World, cut: bool) -> None:
        """Bring the towers of `model` to the device; its decoder is dropped.

        Args:
            model: in evaluation mode, on the host, the same on every rank.
            dtype: that it computes in.
            world: the ranks.
            cut: whether each rank keeps its part of the weights, and blocks are gathered when they
                compute.
        """
        self.width = model.config.embed_dim
        self.log_scale = float(model.logit_scale.log_scale)
        self._dtype, self._device = dtype, world.device
        self._coca: CoCa = model.coca
        self._coca.decoder = self._coca.caption_head = None
        self._cut = CutLayers(self._coca, dtype, world) if cut and world.size > 1 else None
        self._coca.to(world.device, dtype)

    @property
    def resident_bytes(self) -> int:
        """Of weights on this rank's device while it does not compute."""
        whole = sum(p.nbytes for p in self._coca.parameters())
        return whole + (0 if self._cut is None else self._cut.resident_bytes)

    def lay_out(self, told: Iterable[Tensor]) -> list[Lesson]:
        """As of `Teacher`."""
        return [self._coca.text.pack(part).to(self._device) for part in told]

    @torch.no_grad()
    def features(self, images: Tensor, lesson: Lesson) -> Tensor:
        """As of `Teacher`."""
        assert isinstance(lesson, PackedCaptions)
        config = self._coca.config
        pixels = resized(images, config.vision_cfg.image_size)
        if self._cut is not None:
            self._cut.begin()
        inputs = normalize_pixels(pixels, self._dtype, config.preprocess_cfg)
        return self._coca.encode(inputs, lesson).features


def resized(images: Tensor, size: int) -> Tensor:
    """Pictures [b, 3, H, W] with values of pixels, square, bicubically made `size` pixels wide."""
    if images.shape[-1] == size:
        return images
    wide = F.interpolate(
        images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return wide.clamp_(0, 255)
