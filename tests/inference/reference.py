"""open_clip's search without a cache: its model, driven by transformers as its main branch does it.

The released open_clip 3.3 cannot generate with transformers 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class _Config:
    is_encoder_decoder = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def get_text_config(self, **_: Any) -> _Config:
        return self


class Uncached(nn.Module, GenerationMixin):
    """A model that transformers' `generate` runs on every token so far at every step."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.config = _Config(vocab_size)  # type: ignore[assignment]
        self.generation_config = GenerationConfig()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "image_tokens": kwargs["image_tokens"]}

    def forward(self, input_ids: Tensor, image_tokens: Tensor, **_: Any) -> CausalLMOutputWithPast:
        _, text = self.model._encode_text(input_ids)
        return CausalLMOutputWithPast(logits=self.model.text_decoder(image_tokens, text))


@torch.no_grad()
def search(
    model: nn.Module, images: Tensor, prompt: Tensor, end_id: int, pad_id: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Beam search with open_clip's model.

    Returns:
        Tokens [B·num_return_sequences, T], and the scores of the sequences.
    """
    _, image_tokens = model._encode_image(images)
    vocab_size = int(model.text_decoder.text_projection.shape[1])
    config = GenerationConfig(
        eos_token_id=end_id,
        pad_token_id=pad_id,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    found = Uncached(model, vocab_size).generate(
        prompt, generation_config=config, image_tokens=image_tokens
    )
    return found.sequences, found.sequences_scores
