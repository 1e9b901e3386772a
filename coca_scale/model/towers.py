"""What CoCa asks of its parts; whatever offers it can take their place.

A new tower is one module with one class, and a line in `coca.py` that builds it. `layer_groups` and
`contrastive_parameters` are how recipes lock towers, decay learning rates by layer, and leave out
what a loss of weight 0 never reaches (`freeze.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from coca_scale.model.kv_cache import KVCache
from coca_scale.model.packing import PackedCaptions, Packing
from coca_scale.model.targets import Targets


class ModelPart(Protocol):
    """A module of a CoCa."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of nn.Module."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """As of nn.Module."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """As of nn.Module."""
        ...

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """All parameters, each in one group, from input to output."""
        ...


class ImageTower(ModelPart, Protocol):
    """Pictures in, one vector and a sequence of tokens out."""

    def __call__(
        self, images: Tensor, sample_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode pictures.

        Args:
            images: normalised, [B, 3, H, W].
            sample_ids: int64 [B], names of the samples in this run, for what is drawn at random per
                sample: it must be a function of them. None draws nothing.

        Returns:
            The embedding [B, embed_dim], not of unit length; and the tokens [B, S, D] that the
            decoder reads, of the decoder's width (in a MaMMUT of the tower's), or None in a tower
            of a CLIP.
        """
        ...

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        ...


class TextTower(ModelPart, Protocol):
    """Captions in, one vector per caption and the features of every token out.

    In a CoCa it is causal: no token's features know the words after it.
    """

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values in `KVCache.text`; 0 where it caches by itself."""
        ...

    def pack(
        self, tokens_BT: Tensor, keep_padding: bool = False, targets: Targets | None = None
    ) -> PackedCaptions:
        """Lay out token ids [B, T], T up to the context length, for the tower and the decoder.

        Computed on the device of the ids. With `keep_padding` every given token has a row. With
        `targets` (`with_targets`) these are what the decoder reads and learns.
        """
        ...

    def __call__(
        self, captions: PackedCaptions, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode packed captions, or the next tokens of those in a cache.

        Returns:
            The embedding [B, embed_dim], not of unit length, and the features of all rows [N, D].
        """
        ...

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        ...


class Decoder(ModelPart, Protocol):
    """Features of text and image tokens in, hidden states of text out."""

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values in `KVCache.decoder` and `KVCache.image`."""
        ...

    def __call__(
        self, text_MD: Tensor, rows: Packing, image_BSD: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Decode.

        Args:
            text_MD: features of the text tower at the rows that are read.
            rows: where they lie.
            image_BSD: tokens of the image tower; with a cache needed only with the first tokens.
            cache: of the captions that are being written.

        Returns:
            Hidden states [M, D].
        """
        ...
