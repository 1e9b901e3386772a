"""Distillation against float64 autograd and open_clip's own loss, on 1, 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss

from coca_scale.losses import FeatureGather, distill_loss, feature_loss
from tests.ranks import on_ranks

BATCH, WIDTH, TEACHERS_WIDTH = 24, 16, 20
TEACHER_LOG_SCALE = 3.1


def inputs(dtype, teachers_width=TEACHERS_WIDTH):
    """Features of student and teacher, and the student's log scale."""
    generator = torch.Generator().manual_seed(3)
    found = [
        F.normalize(torch.randn(BATCH, 2, width, generator=generator).double(), dim=-1).to(dtype)
        for width in (WIDTH, teachers_width)
    ]
    return *found, torch.tensor([2.7], dtype=torch.float64)


def reference():
    """Loss and gradients by open_clip's loss on the whole batch."""
    student, teacher, log_scale = inputs(torch.float64)
    student.requires_grad_()
    log_scale.requires_grad_()
    scale = torch.tensor(TEACHER_LOG_SCALE, dtype=torch.float64).exp()
    _, loss = DistillClipLoss()(*student.unbind(1), log_scale.exp(), *teacher.unbind(1), scale)
    loss.backward()
    return loss.detach(), student.grad, log_scale.grad


def on_rank(rank, ranks, dtype):
    dist.init_process_group("gloo")
    student, teacher, log_scale = inputs(dtype)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    group, found = dist.new_group(), []
    for resident in (None, 20):  # 20 of 24: in pieces if there is anything to gather
        gather = FeatureGather(student[rows], group, resident, teacher[rows])
        about = (log_scale, TEACHER_LOG_SCALE, dist.group.WORLD)
        result = distill_loss(gather, *about, chunk_rows=5)
        found.append((result.loss, result.grad_features, result.grad_log_scale))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_it_is_open_clips_loss_of_the_whole_batch(ranks, dtype, bound):
    loss, grad_features, grad_scale = reference()
    for results in zip(*on_ranks(on_rank, ranks, dtype), strict=True):
        for found_loss, _, found_scale in results:
            assert abs(found_loss - loss) <= bound * loss
            assert abs(found_scale - grad_scale) <= bound * grad_scale.abs()
        found = torch.cat([result[1] for result in results])
        assert (found - grad_features).norm() <= bound * grad_features.norm()


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, _, log_scale = inputs(torch.float64)
    found = distill_loss(FeatureGather(student, None, None, student), log_scale, 2.7, None)
    assert found.grad_features.norm() < 1e-15 and found.grad_log_scale.abs() < 1e-15


def test_bf16_features_keep_wide_products():
    student, teacher, log_scale = inputs(torch.bfloat16)
    about = (log_scale, TEACHER_LOG_SCALE, None)
    exact = distill_loss(FeatureGather(student.double(), None, None, teacher), *about)
    found = distill_loss(FeatureGather(student, None, None, teacher), *about)
    assert found.grad_features.dtype == torch.float32
    assert abs(found.loss - exact.loss) <= 1e-6 * exact.loss
    error = found.grad_features - exact.grad_features
    assert error.norm() <= 1e-5 * exact.grad_features.norm()


def features_on_rank(rank, ranks):
    dist.init_process_group("gloo")
    student, teacher, _ = inputs(torch.float64, WIDTH)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    gather = FeatureGather(student[rows], dist.new_group(), None, teacher[rows])
    found = feature_loss(gather, dist.group.WORLD)
    return found.loss, found.grad_features


@pytest.mark.parametrize("ranks", [1, 2])
def test_features_are_drawn_to_the_teachers(ranks):
    student, teacher, _ = inputs(torch.float64, WIDTH)
    raw = (3 * student).requires_grad_()
    loss = (F.normalize(raw, dim=-1) - teacher).square().sum(-1).mean() / 2
    loss.backward()
    results = on_ranks(features_on_rank, ranks)
    found = torch.cat([grad for _, grad in results])
    again = (3 * student).requires_grad_()
    (F.normalize(again, dim=-1) * found).sum().backward()
    assert all(torch.allclose(value, loss, rtol=1e-12) for value, _ in results)
    assert torch.allclose(again.grad, raw.grad, rtol=1e-11, atol=1e-14)
