"""Text towers from Hugging Face transformers, imported only where a model has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coca_scale.errors import UserError
from coca_scale.model.kv_cache import KVCache
from coca_scale.model.packing import PackedCaptions, pack_captions, real_lengths
from coca_scale.model.recompute import Recomputable
from coca_scale.model.targets import Targets, with_targets
from coca_scale.model.tower_config import TextConfig

NEW_SWITCH = "activation_checkpointing_enable"


class HuggingFaceTextTower(Recomputable):
    """A transformers encoder with mean pooling and a projection.

    In a CoCa its attention is causal, so that no token's features know the words after it: with
    the bidirectional attention that OpenCLIP uses, the decoder reads the caption it has to write.
    Dropout is off, as in every other tower here: a step must not depend on how a batch is cut.
    """

    def __init__(self, config: TextConfig, embed_dim: int, causal: bool) -> None:
        super().__init__()
        from transformers import AutoModel

        assert config.hf_config is not None
        self.pad_id = config.pad_id
        self.transformer = AutoModel.from_config(
            transformers_config(config, causal), add_pooling_layer=False
        )
        width = config.width
        hidden = (width + embed_dim) // 2
        self.proj: nn.Module
        if config.hf_proj_type == "linear":
            self.proj = _projection(width, embed_dim)
        else:
            first, last = _projection(width, hidden), _projection(hidden, embed_dim)
            self.proj = nn.Sequential(first, nn.GELU(), last)

    def _switch(self, enabled: bool) -> None:
        # transformers renamed both in version 5
        kind = "activation" if hasattr(self.transformer, NEW_SWITCH) else "gradient"
        if enabled:
            switch = getattr(self.transformer, f"{kind}_checkpointing_enable")
            switch({"use_reentrant": False})
        else:
            getattr(self.transformer, f"{kind}_checkpointing_disable")()

    @property
    def cached_layers(self) -> int:
        """None: transformers has a cache of its own."""
        return 0

    def pack(
        self, tokens_BT: Tensor, keep_padding: bool = False, targets: Targets | None = None
    ) -> PackedCaptions:
        """Lay out token ids [B, T] for `forward`, all as long as the longest one, and targets."""
        real_B = real_lengths(tokens_BT, self.pad_id)
        reads_B = (real_B - 1).clamp(min=0)
        longest = max(1, int(real_B.max()))
        if keep_padding:
            longest = tokens_BT.shape[1]
            reads_B = torch.full_like(real_B, longest)
        pooled_B = torch.zeros_like(real_B)  # not used: the mean is the embedding
        lengths_B = torch.full_like(real_B, longest)
        first = pack_captions(tokens_BT, lengths_B, reads_B, pooled_B, None, self.pad_id)
        return with_targets(first, tokens_BT, targets, None, self.pad_id, keep_padding)

    def forward(
        self, captions: PackedCaptions, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode captions as `pack` lays them out, or as `next_tokens` does those after `cache`.

        Returns:
            The pooled embedding [B, embed_dim], not normalised, and the features of all rows
            [N, D].
        """
        if cache is not None:
            return self._continue(cache)
        beside_pad_BL = captions.text.pad(captions.tokens_N[:, None] - self.pad_id).squeeze(-1)
        tokens_BL = beside_pad_BL + self.pad_id  # which is where no row belongs, too
        real_BL = (tokens_BL != self.pad_id).long()
        output = self.transformer(input_ids=tokens_BL, attention_mask=real_BL, use_cache=False)
        hidden_BLD = output.last_hidden_state
        pooled = len(captions.pooled_B)
        weights_BL1 = real_BL[:pooled].unsqueeze(-1).to(hidden_BLD.dtype)
        mean = (hidden_BLD[:pooled] * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1)
        return self.proj(mean), captions.text.pack(hidden_BLD)

    def _continue(self, cache: KVCache) -> tuple[Tensor, Tensor]:
        """No embedding, and the features [R·T, D] of the next tokens."""
        if cache.transformers is None:
            from transformers import DynamicCache

            cache.transformers = DynamicCache()
        first = cache.positions.filled
        known_RL = cache.tokens_RL[:, : first + len(cache.positions.new_T)]
        output = self.transformer(
            input_ids=known_RL[:, first:],
            attention_mask=(known_RL != self.pad_id).long(),
            past_key_values=cache.transformers,
            use_cache=True,
        )
        return output.last_hidden_state[:, 0, :0], output.last_hidden_state.flatten(0, 1)

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        return list(self.proj.parameters())

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Embeddings, each layer, projection."""
        model: Any = self.transformer
        parts = [model.embeddings, *model.encoder.layer, self.proj]
        return [list(part.parameters()) for part in parts]


def transformers_config(config: TextConfig, causal: bool) -> Any:
    """The tower's configuration for transformers.

    Raises:
        UserError: captions longer than the model has positions for.
    """
    raw = dict(config.hf_config or {})
    # RoBERTa counts positions from its padding id
    positions = raw["max_position_embeddings"] - (raw["model_type"] != "bert") * (
        raw["pad_token_id"] + 1
    )
    if config.context_length > positions:
        raise UserError(
            f"context_length {config.context_length} is more than the {positions} positions "
            f"of {config.hf_model_name}"
        )
    raw |= {
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_id,
        "is_decoder": causal,
        "add_cross_attention": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    from transformers import AutoConfig

    return AutoConfig.for_model(**raw)


def _projection(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer
