"""Two captions per picture, and captions predicted in parallel: what plain passes give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coca_scale.model import CoCa
from coca_scale.model.targets import Targets
from tests.model.captions import texts_of, uneven_captions
from tests.variants import CAPTIONERS, variant


def inputs_of(targets, pad_id):
    """One caption after the other."""
    rows = targets.tokens_BT.clone()
    for row, parallel in zip(rows, targets.parallel_B, strict=True):
        real = max((n + 1 for n, token in enumerate(row) if token != pad_id), default=0)
        row[:real] = torch.where(parallel, row[0].clone(), row[:real])
    return rows


def plain(coca, images, tokens, targets, weights):
    """A pass for each loss, with all padding; the caption loss in logits of all tokens."""
    config = coca.config
    image, image_tokens = coca.image(images)
    text = coca.text(coca.text.pack(tokens, keep_padding=True))[0]
    features = torch.stack([F.normalize(image, dim=-1), F.normalize(text, dim=-1)], 1)
    inputs = inputs_of(targets, config.pad_id)
    logits = coca.caption_logits(image_tokens, inputs)[:, :-1].transpose(1, 2)
    labels = targets.tokens_BT[:, 1:]
    total = F.cross_entropy(logits, labels, ignore_index=config.pad_id, reduction="sum")
    return features, total, gradients(coca, (features * weights).sum() + total)


def gradients(coca, loss):
    coca.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in coca.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", CAPTIONERS)
def test_one_pass_gives_the_losses_and_gradients_of_two(kind, padding, tmp_path):
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    coca, size = CoCa(config).double(), config.vision_cfg.image_size
    images = torch.randn(6, 3, size, size, dtype=torch.float64)
    weights = torch.randn(6, 2, config.embed_dim, dtype=torch.float64)
    tokens, targets = texts_of(config)
    expected, expected_sum, reference = plain(coca, images, tokens, targets, weights)

    captions = coca.text.pack(tokens, padding, targets)
    features, sums = coca(images, captions)
    found = gradients(coca, (features * weights).sum() + sums["caption"])
    assert sums["caption"].item() == pytest.approx(expected_sum.item(), rel=1e-12)
    assert torch.allclose(features, expected, rtol=0, atol=1e-12)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-11), name
    with torch.no_grad():
        alone = coca(images, captions, features_only=True)[0]
    assert torch.allclose(alone, expected, rtol=0, atol=1e-12)


def test_rows_are_those_of_real_tokens_and_of_each_caption_once(tmp_path):
    coca = CoCa(variant("coca", tmp_path))
    tokens = torch.tensor([[8, 9, 7, 0, 0, 0], [8, 0, 9, 9, 9, 7], [8, 5, 7, 0, 0, 0]])
    written = torch.tensor([[8, 6, 5, 7, 0, 0], [8, 0, 9, 9, 9, 7], [8, 6, 7, 0, 0, 0]])
    first = coca.text.pack(tokens)
    captions = coca.text.pack(tokens, targets=Targets(written))
    pooled = captions.pooled_only()
    for found, alone in (
        (pooled.tokens_N, first.tokens_N),
        (pooled.text.starts, first.text.starts),
    ):
        assert torch.equal(found, alone)
    rows = len(first.tokens_N)
    assert captions.pooled.rows == rows
    assert torch.equal(captions.pooled_B, first.pooled_B)
    # of the others neither the end nor a CLS row, and nothing of the second, which has its rows
    assert captions.tokens_N[rows:].tolist() == [8, 6, 5, 8, 6]
    assert captions.positions_N[rows:].tolist() == [0, 1, 2, 0, 1]
    assert captions.text.starts.tolist() == [0, 5, 12, 17, 20, 22]
    assert captions.read_M.tolist() == [17, 18, 19, 5, 6, 7, 8, 9, 20, 21]
    assert captions.labels_K.tolist() == [6, 5, 7, 9, 9, 9, 7, 6, 7]
    assert captions.counted_K.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_caption_for_both_losses_is_laid_out_as_if_there_were_one(tmp_path):
    coca = CoCa(variant("coca", tmp_path))
    tokens = uneven_captions(coca.config)
    found = coca.text.pack(tokens, targets=Targets(tokens.clone(), torch.zeros(6).bool()))
    for name, value in vars(coca.text.pack(tokens)).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, name), value), name
    assert found.pooled is None


def test_what_is_predicted_in_parallel_knows_no_word_before_it(tmp_path):
    """And of its length no more than that it has come so far."""
    config = variant("coca", tmp_path)
    torch.manual_seed(0)
    coca = CoCa(config).double().eval()
    image_tokens = torch.randn(2, 9, config.multimodal_cfg.width, dtype=torch.float64)
    tokens = torch.randint(5, config.text_cfg.vocab_size, (2, config.context_length))
    tokens[:, 0] = 1
    tokens[1, 5:] = config.pad_id

    def hidden(words, parallel):
        captions = coca.text.pack(tokens, targets=Targets(words, torch.tensor([parallel] * 2)))
        rows = coca.text(captions)[1][captions.read_M]
        return coca.decoder(rows, captions.decoder, image_tokens), captions.labels_K

    others = torch.where(tokens != config.pad_id, tokens.flip(0) % 7 + 9, tokens)
    others[:, 0] = 1
    (one, labels), (other, other_labels) = hidden(tokens, True), hidden(others, True)
    assert torch.equal(one, other)
    assert not torch.equal(labels, other_labels)
    assert not torch.allclose(*(hidden(words, False)[0] for words in (tokens, others)))
    longer = hidden(tokens[:1].expand(2, -1).clone(), True)[0]
    assert torch.allclose(longer[-(config.context_length - 1) :][:4], one[-4:], atol=1e-12)


def test_layers_see_no_row_more_than_losses_need(tmp_path):
    config = variant("coca", tmp_path)
    coca, seen = CoCa(config), {"text": [], "decoder": []}
    for name, rows in seen.items():
        linear = getattr(coca, name).blocks[-1].attn.qkv
        linear.register_forward_hook(lambda _, __, out, rows=rows: rows.append(len(out)))
    tokens, targets = texts_of(config)
    captions = coca.text.pack(tokens, targets=targets)
    size = config.vision_cfg.image_size
    images = torch.randn(6, 3, size, size)
    with torch.no_grad():
        coca(images, captions, features_only=True)
        coca(images, captions)
    real = [(row != config.pad_id).nonzero().flatten().tolist() for row in targets.tokens_BT]
    reads = [places[-1] if places else 0 for places in real]
    own = [read for number, read in enumerate(reads) if number != 4]  # which is the same for both
    first = len(coca.text.pack(tokens).tokens_N)
    assert seen == {"text": [first, first + sum(own)], "decoder": [sum(reads)]}
