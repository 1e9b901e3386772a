"""CoCa: image tower, unimodal text tower, multimodal decoder, caption head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_scale.model.config import ModelConfig
from coca_scale.model.decoder import CaptionHead, MultimodalDecoder
from coca_scale.model.image import ImageTower
from coca_scale.model.text import TextTower

FeaturesReady = Callable[[Tensor], None]


class CoCa(nn.Module):
    """Contrastive captioner (Yu et al. 2022). The logit scale lives in `LogitScale`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.multimodal_cfg
        self.image = ImageTower(config.vision_cfg, config.embed_dim, config.quick_gelu)
        self.text = TextTower(config.text_cfg, config.embed_dim, config.quick_gelu)
        self.decoder = MultimodalDecoder(decoder, config.quick_gelu)
        self.caption_head = CaptionHead(decoder.width, decoder.vocab_size)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute every transformer block in the backward pass, or keep all activations."""
        for tower in (self.image, self.text, self.decoder):
            tower.activation_checkpointing = enabled

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → unit features [B, embed_dim]."""
        return unit(self.image(images)[0])

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] → unit features [B, embed_dim]."""
        return unit(self.text(tokens_BT)[0])

    def caption_logits(self, image_tokens_BSD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token that follows each given token."""
        _, text_BTD = self.text(tokens_BT)
        return self.caption_head(self.decoder(text_BTD, image_tokens_BSD))

    def forward(
        self,
        images: Tensor,
        tokens_BT: Tensor,
        on_features: FeaturesReady | None = None,
        features_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One training forward pass.

        Args:
            images: normalised images [B, 3, H, W] in the model's dtype.
            tokens_BT: token ids [B, T], padded with the config's pad id.
            on_features: called with the packed features as soon as both towers are through, so that
                their all-gather runs while the decoder does.
            features_only: stop after the towers.

        Returns:
            Packed unit features [B, 2, embed_dim] (image, text), and the summed caption loss over
            the tokens that are not padding, None with `features_only`.
        """
        image_embedding, image_tokens = self.image(images)
        text_embedding, text_tokens = self.text(tokens_BT)
        features = torch.stack([unit(image_embedding), unit(text_embedding)], dim=1)
        if features_only:
            return features, None
        if on_features is not None:
            on_features(features.detach())
        hidden = self.decoder(text_tokens[:, :-1], image_tokens)
        loss_sum = self.caption_head(hidden, tokens_BT[:, 1:], self.config.pad_id)
        return features, loss_sum


def unit(x: Tensor) -> Tensor:
    """Scale vectors [*, D] to length 1; computed in fp32 at least, returned in the input dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.normalize(x.to(wide), dim=-1).to(x.dtype)
