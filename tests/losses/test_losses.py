"""Both losses against a single-process float64 reference, on 1, 2 and 4 ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from coca_scale.losses import (
    FeatureGather,
    chunked_cross_entropy,
    contrastive,
    contrastive_loss,
    matmul,
)
from tests.ranks import on_ranks

BATCH, WIDTH, WORDS = 24, 16, 37


def contrastive_inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    features = F.normalize(torch.randn(BATCH, 2, WIDTH, generator=generator).double(), dim=-1)
    return features.to(dtype), torch.tensor([2.7], dtype=torch.float64)


def reference_contrastive():
    features, log_scale = contrastive_inputs(torch.float64)
    features.requires_grad_()
    log_scale.requires_grad_()
    logits = log_scale.exp() * features[:, 0] @ features[:, 1].T
    labels = torch.arange(BATCH)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return loss.detach(), features.grad, log_scale.grad


def contrastive_on_rank(rank, ranks, dtype):
    dist.init_process_group("gloo")
    features, log_scale = contrastive_inputs(dtype)
    mine = features[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
    results = []
    for resident in (None, 20):  # 20 of 24: in pieces if there is anything to gather
        gather = FeatureGather(mine, dist.new_group(), resident)
        result = contrastive_loss(gather, log_scale, dist.group.WORLD, chunk_rows=5)
        results.append((result.loss, result.grad_features, result.grad_log_scale))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_contrastive_equals_reference(ranks, dtype, bound):
    loss, grad_features, grad_scale = reference_contrastive()
    for results in zip(*on_ranks(contrastive_on_rank, ranks, dtype), strict=True):
        for found_loss, _, found_scale in results:
            assert abs(found_loss - loss) <= bound * loss
            assert abs(found_scale - grad_scale) <= bound * grad_scale.abs()
        found = torch.cat([result[1] for result in results])
        assert (found - grad_features).norm() <= bound * grad_features.norm()


@pytest.mark.parametrize(("rows", "columns"), [(None, 8192), (24, 7), (7, 24), (5, 5), (1, 1)])
def test_tiles_change_nothing(monkeypatch, rows, columns):
    monkeypatch.setattr(contrastive, "KEY_ROWS", columns)
    features, log_scale = contrastive_inputs(torch.float64)
    found = contrastive_loss(FeatureGather(features, None), log_scale, None, rows)
    for ours, exact in zip(dataclasses.astuple(found), reference_contrastive(), strict=True):
        assert (ours - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("queries", [1, 1536, 8192, 98_304, 2**24])
def test_a_tile_of_a_gpu_has_its_size(queries):
    rows, columns = contrastive.tile_of(None, torch.empty(queries, 2, 8, device="meta"))
    assert rows <= queries
    assert contrastive.GPU_TILE - rows < rows * columns <= contrastive.GPU_TILE


# what a GPU does, multiplied in fp32: two pieces have twice the 8 bits of bf16 or the 11 of fp16
@pytest.mark.parametrize(
    ("dtype", "of_element", "of_gradient"),
    [(torch.bfloat16, 2**-17, 3e-6), (torch.float16, 2**-22, 1e-6)],
)
def test_two_pieces_of_half_precision_are_enough(monkeypatch, dtype, of_element, of_gradient):
    weights = torch.cat([torch.rand(500), torch.rand(500) / 16384, 2 - torch.rand(500) / 500])
    (first, rest), factor = matmul.split(weights, dtype)
    assert first.dtype == rest.dtype == dtype
    error = (first.double() + rest.double()) / factor - weights
    assert (error.abs() <= of_element * weights + 2**-39).all()
    assert (first.double() / factor - weights).abs().max() > 100 * error.abs().max()

    generator = torch.Generator().manual_seed(5)
    features = F.normalize(torch.randn(400, 2, 64, generator=generator), dim=-1).to(dtype)
    log_scale = torch.tensor([4.6])
    exact = contrastive_loss(FeatureGather(features.double(), None), log_scale.double(), None)
    monkeypatch.setattr(contrastive, "add_matmul_", matmul.add_in_pieces_)
    found = contrastive_loss(FeatureGather(features, None), log_scale, None)
    error = found.grad_features - exact.grad_features
    assert error.norm() <= of_gradient * exact.grad_features.norm()
    assert abs(found.grad_log_scale - exact.grad_log_scale) <= 1e-5 * exact.grad_log_scale.abs()


def caption_inputs(dtype):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(40, WIDTH, generator=generator).double()
    weight = torch.randn(WORDS, WIDTH, generator=generator).double()
    labels = torch.randint(1, WORDS, (40,), generator=generator)
    labels[torch.rand(40, generator=generator) < 0.6] = 0
    labels[:10] = 0  # the first of four ranks has no real token at all
    return hidden.to(dtype), weight.to(dtype), labels


def reference_caption(label_smoothing=0.0, z_loss=0.0):
    hidden, weight, labels = caption_inputs(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.T
    loss = F.cross_entropy(
        logits, labels, ignore_index=0, reduction="sum", label_smoothing=label_smoothing
    )
    loss = loss + z_loss * logits.logsumexp(1)[labels != 0].square().sum()
    (loss / (labels != 0).sum()).backward()
    return loss.detach() / (labels != 0).sum(), hidden.grad, weight.grad


def caption_on_rank(rank, ranks, dtype):
    dist.init_process_group("gloo")
    hidden, weight, labels = caption_inputs(dtype)
    count = (labels != 0).sum()
    rows = slice(rank * 40 // ranks, (rank + 1) * 40 // ranks)
    hidden, labels = hidden[rows].requires_grad_(), labels[rows]
    weight.requires_grad_()
    kept = labels != 0
    loss = chunked_cross_entropy(hidden[kept], weight, labels[kept], chunk_rows=3) / count
    loss.backward()
    dist.all_reduce(weight.grad)
    total = loss.detach()
    dist.all_reduce(total)
    return total, hidden.grad, weight.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_caption_equals_reference(ranks, dtype, bound):
    loss, grad_hidden, grad_weight = reference_caption()
    results = on_ranks(caption_on_rank, ranks, dtype)
    for total, _, weight in results:
        assert abs(total - loss) <= bound * loss
        assert (weight - grad_weight).norm() <= bound * grad_weight.norm()
    found = torch.cat([result[1] for result in results])
    assert (found - grad_hidden).norm() <= bound * grad_hidden.norm()


@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_label_smoothing_and_z_loss(smoothing, z):
    loss, grad_hidden, grad_weight = reference_caption(smoothing, z)
    hidden, weight, labels = caption_inputs(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    kept = labels != 0
    total = chunked_cross_entropy(
        hidden[kept], weight, labels[kept], chunk_rows=7, label_smoothing=smoothing, z_loss=z
    )
    (total / (labels != 0).sum()).backward()
    assert torch.allclose(total / (labels != 0).sum(), loss, rtol=1e-12)
    assert torch.allclose(hidden.grad, grad_hidden, rtol=1e-11, atol=1e-14)
    assert torch.allclose(weight.grad, grad_weight, rtol=1e-11, atol=1e-14)


def test_bf16_inputs_keep_fp32_logits():
    hidden, weight, labels = caption_inputs(torch.bfloat16)
    kept = labels != 0
    total = chunked_cross_entropy(hidden[kept], weight, labels[kept], chunk_rows=8)
    exact = F.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=0, reduction="sum"
    )
    assert total.dtype == torch.float32
    assert abs(total - exact) <= 1e-5 * exact
