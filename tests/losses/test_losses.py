"""Both losses against a single-process float64 reference, on 1, 2 and 4 ranks."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from coca_scale.losses import (
    FeatureGather,
    chunked_cross_entropy,
    contrastive,
    contrastive_loss,
    matmul,
    sigmoid,
    sigmoid_loss,
)
from tests.ranks import on_ranks

BATCH, WIDTH, WORDS = 24, 16, 37
CONTRASTIVE = ("softmax", "sigmoid")
BIAS = torch.tensor([-3.1], dtype=torch.float64)


def contrastive_inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    features = F.normalize(torch.randn(BATCH, 2, WIDTH, generator=generator).double(), dim=-1)
    return features.to(dtype), torch.tensor([2.7], dtype=torch.float64)


def reference_contrastive(kind):
    """Loss, and gradients of features, log scale and, with a sigmoid, its bias."""
    features, log_scale = contrastive_inputs(torch.float64)
    bias = BIAS.clone().requires_grad_()
    features.requires_grad_()
    log_scale.requires_grad_()
    logits = log_scale.exp() * features[:, 0] @ features[:, 1].T
    if kind == "softmax":
        labels = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    else:
        loss = -F.logsigmoid((2 * torch.eye(BATCH) - 1) * (logits + bias)).sum() / BATCH
    loss.backward()
    grads = [features.grad, log_scale.grad, bias.grad]
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


def compute(kind, gather, log_scale, group, chunk_rows=None):
    if kind == "softmax":
        found = contrastive_loss(gather, log_scale, group, chunk_rows)
    else:
        found = sigmoid_loss(gather, log_scale, BIAS, group, chunk_rows)
    return [value for value in dataclasses.astuple(found) if value is not None]


def contrastive_on_rank(rank, ranks, cases):
    dist.init_process_group("gloo")
    results = []
    for kind, dtype, resident in cases:
        features, log_scale = contrastive_inputs(dtype)
        mine = features[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
        gather = FeatureGather(mine, dist.new_group(), resident)
        results.append(compute(kind, gather, log_scale, dist.group.WORLD, chunk_rows=5))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_contrastive_equals_reference(ranks):
    bounds = {torch.float64: 1e-12, torch.float32: 2e-6}
    # 20 of 24: in pieces if there is anything to gather
    cases = list(itertools.product(CONTRASTIVE, bounds, (None, 20)))
    found = on_ranks(contrastive_on_rank, ranks, cases)
    for (kind, dtype, _), *results in zip(cases, *found, strict=True):
        loss, features, *scalars = reference_contrastive(kind)
        for found_loss, _, *found_scalars in results:
            for ours, exact in zip([found_loss, *found_scalars], [loss, *scalars], strict=True):
                assert abs(ours - exact) <= bounds[dtype] * exact.abs()
        ours = torch.cat([result[1] for result in results])
        assert (ours - features).norm() <= bounds[dtype] * features.norm()


@pytest.mark.parametrize("kind", CONTRASTIVE)
@pytest.mark.parametrize(("rows", "columns"), [(None, 8192), (24, 7), (7, 24), (5, 5), (1, 1)])
def test_tiles_change_nothing(monkeypatch, kind, rows, columns):
    monkeypatch.setattr(contrastive, "KEY_ROWS", columns)
    features, log_scale = contrastive_inputs(torch.float64)
    found = compute(kind, FeatureGather(features, None), log_scale, None, rows)
    for ours, exact in zip(found, reference_contrastive(kind), strict=True):
        assert (ours - exact).norm() <= 1e-12 * exact.norm()


def test_sigmoid_is_that_of_openclip():
    features, log_scale = (x.requires_grad_() for x in contrastive_inputs(torch.float64))
    bias = BIAS.clone().requires_grad_()
    theirs = SigLipLoss()(features[:, 0], features[:, 1], log_scale.exp(), bias)
    theirs.backward()
    ours = compute("sigmoid", FeatureGather(features.detach(), None), log_scale, None)
    expected = [theirs.detach(), features.grad, log_scale.grad, bias.grad]
    for our, their in zip(ours, expected, strict=True):
        assert (our - their).norm() <= 1e-12 * their.norm()


def test_sigmoid_of_pairs_that_are_sure_loses_no_digits():
    """At z = 40 and -60 log(1 + exp) of the one rounds to 40, and of the other to 0, in fp32."""
    features = torch.eye(8).repeat_interleave(2, dim=0).view(8, 2, 8)
    log_scale, bias = torch.tensor([math.log(100.0)]), torch.tensor([-60.0])
    for shift in (0.0, 10.0, 59.0):
        found = sigmoid_loss(FeatureGather(features, None), log_scale, bias + shift, None)
        exact = F.softplus(torch.tensor([-40.0 - shift, -60.0 + shift]).double(), threshold=99)
        assert abs(found.loss - exact[0] - 7 * exact[1]) <= 1e-4 * (exact[0] + exact[1])


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
    for kind, module in zip(CONTRASTIVE, (contrastive, sigmoid), strict=True):
        exact = compute(kind, FeatureGather(features.double(), None), log_scale.double(), None)
        monkeypatch.setattr(module, "add_matmul_", matmul.add_in_pieces_)
        found = compute(kind, FeatureGather(features, None), log_scale, None)
        assert (found[1] - exact[1]).norm() <= of_gradient * exact[1].norm()
        assert abs(found[2] - exact[2]) <= 1e-5 * exact[2].abs()


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
