"""Captions without their padding give what captions with it give, and no byte more than needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coca_scale.model import CoCa
from coca_scale.model.layers import QuickGELU
from coca_scale.model.recompute import SelectiveRecompute
from tests.model.captions import uneven_captions
from tests.variants import CAPTIONERS, variant


@pytest.mark.parametrize("kind", (*CAPTIONERS, "clip", "clip_roberta"))
def test_leaving_padding_out_changes_neither_loss_nor_gradient(kind, tmp_path):
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    coca = CoCa(config).double()
    size = config.vision_cfg.image_size
    images = torch.randn(6, 3, size, size, dtype=torch.float64)
    tokens = uneven_captions(config)
    weights = torch.randn(6, 2, config.embed_dim, dtype=torch.float64)

    def gradients(features, caption_sum):
        coca.zero_grad()
        ((features * weights).sum() + caption_sum).backward()
        return {n: p.grad.clone() for n, p in coca.named_parameters() if p.grad is not None}

    packed = coca.text.pack(tokens)
    features, sums = coca(images, packed)
    found = gradients(features, sums.get("caption", 0.0))

    image, image_tokens = coca.image(images)
    padded = coca.text.pack(tokens, keep_padding=True)
    assert len(packed.read_M) < len(padded.read_M)
    if kind != "mammut_laion":  # to which padding is a part of the caption
        assert len(packed.tokens_N) < len(padded.tokens_N)
    text = coca.text(padded)[0]
    expected = torch.stack([F.normalize(image, dim=-1), F.normalize(text, dim=-1)], 1)
    expected_sum = torch.zeros(())
    if coca.decoder is not None:
        logits = coca.caption_logits(image_tokens, tokens)[:, :-1]
        expected_sum = F.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], ignore_index=config.pad_id, reduction="sum"
        )
        assert sums["caption"].item() == pytest.approx(expected_sum.item(), rel=1e-12)
    assert torch.allclose(features, expected, rtol=0, atol=1e-12)
    reference = gradients(expected, expected_sum)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-11), name


def test_rows_are_those_of_real_tokens(tmp_path):
    config = variant("coca", tmp_path)
    tokens = torch.tensor([[8, 9, 7, 0, 0, 0], [8, 0, 9, 9, 9, 7]])
    legacy = CoCa(config).text.pack(tokens)
    # three tokens, one pad that OpenCLIP's mask shows, CLS; six tokens and CLS
    assert legacy.tokens_N.tolist() == [8, 9, 7, 0, 0, 8, 0, 9, 9, 9, 7, 0]
    assert legacy.positions_N.tolist() == [0, 1, 2, 3, 6, 0, 1, 2, 3, 4, 5, 6]
    assert legacy.pooled_B.tolist() == [4, 11]
    assert legacy.read_M.tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert legacy.labels_K.tolist() == [9, 7, 9, 9, 9, 7]  # the pad id inside is not learnt
    assert legacy.counted_K.tolist() == [0, 1, 3, 4, 5, 6]
    corrected = CoCa(variant("correct_mask", tmp_path)).text.pack(tokens)
    assert corrected.tokens_N.tolist() == [8, 9, 7, 0, 8, 0, 9, 9, 9, 7, 0]


def kept_bytes(coca, images, captions):
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in coca.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        coca(images, captions)
    return sum(kept.values())


def test_what_is_computed_again_is_not_kept(tmp_path):
    """Its hooks hide what is inside from those here, which is weights alone."""
    config = variant("coca", tmp_path)
    coca = CoCa(config)
    assert sum(isinstance(m, SelectiveRecompute) for m in coca.modules()) > 10
    images = torch.randn(4, 3, 48, 48)
    captions = coca.text.pack(uneven_captions(config)[:4])
    coca.set_activation_checkpointing("none")
    everything = kept_bytes(coca, images, captions)
    coca.set_activation_checkpointing("selective")
    assert kept_bytes(coca, images, captions) < 0.7 * everything


def test_quick_gelu_has_its_gradient():
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), (x,))
