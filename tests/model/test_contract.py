"""Every tower offers what `model/towers.py` asks for."""

from __future__ import annotations

import pytest
import torch

from coca_scale.model import CoCa
from coca_scale.model.kv_cache import KVCache
from tests.variants import CAPTIONERS, variant

KINDS = (*CAPTIONERS, "clip", "clip_timm", "clip_roberta")


@pytest.mark.parametrize("kind", KINDS)
def test_layer_groups_have_every_parameter_once(kind, tmp_path):
    coca = CoCa(variant(kind, tmp_path))
    parts = [coca.image, coca.text, *([coca.decoder] if coca.decoder is not None else [])]
    for part in parts:
        groups = part.layer_groups()
        grouped = [parameter for group in groups for parameter in group]
        assert len(grouped) == len(set(map(id, grouped)))
        assert {id(p) for p in grouped} == {id(p) for p in part.parameters()}
        assert len(groups) > 1 or kind == "mammut_modern"
    for tower in (coca.image, coca.text):
        own = {id(p) for p in tower.parameters()}
        mine = tower.contrastive_parameters()
        assert all(id(p) in own for p in mine)
        # without a projection there is nothing of the text tower that captions do not train
        assert mine or (tower is coca.text and kind in ("mammut", "mammut_laion"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shapes_are_those_of_the_contract(kind, tmp_path):
    config = variant(kind, tmp_path)
    coca = CoCa(config).eval()
    size, length = config.vision_cfg.image_size, config.context_length
    embedding, image_tokens = coca.image(torch.randn(2, 3, size, size), torch.arange(2))
    assert embedding.shape == (2, config.embed_dim)
    tokens = torch.randint(5, config.text.vocab_size, (2, length))
    captions = coca.text.pack(tokens)
    embedding, text_ND = coca.text(captions)
    assert embedding.shape == (2, config.embed_dim)
    assert len(text_ND) == len(captions.tokens_N)
    if coca.decoder is None:
        return
    mammut = config.text_cfg is None  # whose decoder makes them its own
    width = config.vision_cfg.width if mammut else config.multimodal_cfg.width
    assert image_tokens.shape[0] == 2 and image_tokens.shape[2] == width
    hidden = coca.decoder(text_ND[captions.read_M], captions.decoder, image_tokens)
    assert hidden.shape == (len(captions.read_M), config.multimodal_cfg.width)
    cache = coca.new_cache(length)
    assert isinstance(cache, KVCache)
    assert len(cache.text) == coca.text.cached_layers
    assert len(cache.decoder) == len(cache.image) == coca.decoder.cached_layers
