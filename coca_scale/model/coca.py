"""CoCa: image tower, unimodal text tower, multimodal decoder, caption head; CLIP and MaMMUT.

A CLIP has no decoder; the decoder of a MaMMUT runs through its text tower once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_scale.errors import UserError
from coca_scale.model.config import ModelConfig
from coca_scale.model.decoder import CaptionHead, ModernDecoder, MultimodalDecoder
from coca_scale.model.hf_text import HuggingFaceTextTower
from coca_scale.model.image import VisionTransformer
from coca_scale.model.kv_cache import KVCache
from coca_scale.model.mammut import MammutDecoder, MammutText
from coca_scale.model.modern import ModernBlock
from coca_scale.model.modern_text import ModernText
from coca_scale.model.packing import PackedCaptions, next_tokens, pick
from coca_scale.model.recompute import Recomputable, SelectiveRecompute
from coca_scale.model.text import TextTransformer
from coca_scale.model.timm_tower import TimmClipTower, TimmTower
from coca_scale.model.tower_config import DecoderConfig
from coca_scale.model.towers import Decoder, ImageTower, TextTower

FeaturesReady = Callable[[Tensor], None]
Checkpointing = Literal["none", "selective", "full"]


class Encoded(NamedTuple):
    """What the towers make of a micro-batch, for the losses and the decoder.

    Attributes:
        features: packed unit features [B, 2, embed_dim] (image, text).
        text_ND: of every token.
        image_tokens: [B, S, D]; None in a CLIP.
    """

    features: Tensor
    text_ND: Tensor
    image_tokens: Tensor | None


class CoCa(nn.Module):
    """Contrastive captioner (Yu et al. 2022); without a decoder, a CLIP (Radford et al. 2021).

    The logit scale lives in `LogitScale`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.multimodal_cfg
        self.image = make_image_tower(config)
        self.text = make_text_tower(config)
        self.decoder: Decoder | None = None
        self.caption_head: CaptionHead | None = None
        if decoder is not None:
            self.decoder = make_decoder(config, decoder, self.text)
            self.caption_head = CaptionHead(decoder.width, decoder.vocab_size)

    def blocks(self) -> dict[str, Recomputable]:
        """What can be recomputed as a whole, by name: blocks, and towers of other libraries."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Recomputable)}

    def caption_parameters(self) -> list[nn.Parameter]:
        """Those that only the caption loss trains."""
        parts = (self.decoder, self.caption_head)
        own = [p for part in parts if part is not None for p in part.parameters()]
        modern = [m for m in self.text.modules() if isinstance(m, ModernBlock)]
        return own + [p for block in modern for p in block.cross_parameters()]

    def set_activation_checkpointing(
        self, mode: Checkpointing, whole: Collection[str] = ()
    ) -> None:
        """What the backward pass computes again instead of finding it in memory.

        Args:
            mode: none: nothing; selective: norms and activation functions; full: every block.
            whole: names of blocks that are recomputed as a whole anyway.
        """
        for module in self.modules():
            if isinstance(module, SelectiveRecompute):
                module.selective = mode == "selective"
        for name, block in self.blocks().items():
            block.recompute = mode == "full" or name in whole
            if block.recompute:
                for part in block.modules():
                    if isinstance(part, SelectiveRecompute):
                        part.selective = False

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, embed_dim], of unit length by default."""
        features = self.image(images)[0]
        return unit(features) if normalize else features

    def encode_text(self, tokens_BT: Tensor, normalize: bool = True) -> Tensor:
        """Token ids [B, T] → features [B, embed_dim], of unit length by default."""
        features = self.text(self.text.pack(tokens_BT))[0]
        return unit(features) if normalize else features

    def hidden_states(self, image_tokens_BSD: Tensor, tokens_BT: Tensor) -> Tensor:
        """The decoder's output [B, T, D] at every given token."""
        assert self.decoder is not None, "a CLIP has no decoder"
        captions = self.text.pack(tokens_BT, keep_padding=True)
        text_MD = self.text(captions)[1][captions.read_M]
        hidden_MD = self.decoder(text_MD, captions.decoder, image_tokens_BSD)
        return hidden_MD.unflatten(0, tokens_BT.shape)

    def caption_logits(self, image_tokens_BSD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token that follows each given token."""
        assert self.caption_head is not None, "a CLIP has no caption head"
        return self.caption_head(self.hidden_states(image_tokens_BSD, tokens_BT))

    def new_cache(self, length: int) -> KVCache:
        """An empty cache of captions of up to `length` tokens.

        Raises:
            UserError: as `check_length`.
        """
        check_length(self.config, length)
        assert self.decoder is not None
        return KVCache(length, self.text.cached_layers, self.decoder.cached_layers)

    def next_logits(
        self, tokens_RT: Tensor, cache: KVCache, image_tokens_BSD: Tensor | None = None
    ) -> Tensor:
        """Write on.

        Args:
            tokens_RT: the next tokens of each caption.
            cache: what is kept of those before; afterwards of these, too.
            image_tokens_BSD: with the first tokens, of which there is one row per image.

        Returns:
            Logits [R, V] of the token that follows the last of these.
        """
        assert self.decoder is not None and self.caption_head is not None
        cache.begin(tokens_RT)
        captions = next_tokens(tokens_RT, cache.positions.new_T)
        _, text_ND = self.text(captions, cache)
        hidden_ND = self.decoder(text_ND, captions.decoder, image_tokens_BSD, cache)
        cache.end()
        return self.caption_head(hidden_ND.unflatten(0, tokens_RT.shape)[:, -1])

    def encode(
        self, images: Tensor, captions: PackedCaptions, sample_ids: Tensor | None = None
    ) -> Encoded:
        """Both towers; arguments as of `forward`."""
        # the large tower last: the host is ahead of a GPU when it comes to the decoder, and after
        # the decoder's backward pass it has the image's to get ahead again
        text_embedding, text_ND = self.text(captions)
        image_embedding, image_tokens = self.image(images, sample_ids)
        features = torch.stack([unit(image_embedding), unit(text_embedding)], dim=1)
        return Encoded(features, text_ND, image_tokens)

    def forward(
        self,
        images: Tensor | Encoded,
        captions: PackedCaptions,
        on_features: FeaturesReady | None = None,
        features_only: bool = False,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One training forward pass.

        Args:
            images: normalised images [B, 3, H, W] in the model's dtype, or what `encode` has made
                of them and the captions.
            captions: B captions, laid out by `text.pack`.
            on_features: called with the packed features as soon as both towers are through, so that
                their all-gather runs while the decoder does.
            features_only: stop after the towers.
            sample_ids: int64 [B], for patch dropout; without them no patch is dropped.

        Returns:
            Packed unit features [B, 2, embed_dim] (image, text), and summed losses by name:
            `caption`, over the tokens that count, unless there is no decoder or `features_only`.
        """
        if isinstance(images, Encoded):
            features, text_ND, image_tokens = images
        else:
            read = captions.pooled_only() if features_only else captions
            features, text_ND, image_tokens = self.encode(images, read, sample_ids)
        if features_only:
            return features, {}
        if on_features is not None:
            on_features(features.detach())
        if self.decoder is None or self.caption_head is None:
            return features, {}
        hidden_MD = self.decoder(pick(text_ND, captions.read_M), captions.decoder, image_tokens)
        if captions.counted_K is not None:
            hidden_MD = pick(hidden_MD, captions.counted_K)
        return features, {"caption": self.caption_head(hidden_MD, captions.labels_K)}


def check_length(config: ModelConfig, length: int) -> None:
    """See that a model can write captions of `length` tokens.

    Raises:
        UserError: it has no decoder, or no room for that many tokens.
    """
    if config.multimodal_cfg is None:
        raise UserError("this model is a CLIP: it has no decoder and writes no captions")
    if length > config.context_length:
        raise UserError(
            f"this model's captions have at most {config.context_length} tokens, "
            f"{length} were asked for"
        )


def make_image_tower(config: ModelConfig) -> ImageTower:
    """The image tower that the config describes."""
    vision = config.vision_cfg
    if vision.timm_model_name is None:
        return VisionTransformer(vision, config.embed_dim, config.quick_gelu)
    if vision.attentional_pool:
        return TimmTower(vision, config.embed_dim)
    return TimmClipTower(vision, config.embed_dim)


def make_text_tower(config: ModelConfig) -> TextTower:
    """The text tower that the config describes; always causal where a decoder reads it."""
    if config.text_cfg is None:
        assert config.multimodal_cfg is not None
        return MammutText(config.multimodal_cfg, config.embed_dim, config.quick_gelu)
    text = config.text_cfg
    if text.modern:
        return ModernText(text, config.embed_dim)
    if text.hf_model_name is None:
        return TextTransformer(text, config.embed_dim, config.quick_gelu)
    return HuggingFaceTextTower(text, config.embed_dim, causal=config.multimodal_cfg is not None)


def make_decoder(config: ModelConfig, decoder: DecoderConfig, text: TextTower) -> Decoder:
    """The decoder that the config describes; that of a MaMMUT runs through the text tower."""
    if isinstance(text, MammutText):
        return MammutDecoder(decoder, text, config.vision_cfg.width, config.quick_gelu)
    return (
        ModernDecoder(decoder) if decoder.modern else MultimodalDecoder(decoder, config.quick_gelu)
    )


def unit(x: Tensor) -> Tensor:
    """Scale vectors [*, D] to length 1; computed in fp32 at least, returned in the input dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.normalize(x.to(wide), dim=-1).to(x.dtype)
