"""The contrastive loss at full size: bytes on a rank and over the wire, counted on meta tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.planning.counting import LiveBytes

RANKS, BATCH, WIDTH = 8, 65536, 768


@pytest.fixture
def group():
    dist.init_process_group("fake", rank=3, world_size=RANKS, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.4e9), (torch.float32, 0.7e9)])
def test_memory_and_traffic_of_a_large_batch(group, dtype, bound, monkeypatch):
    sent = []

    def all_gather(out, x, **_):
        sent.append(x)
        assert out.numel() == RANKS * x.numel()

    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *a, **k: all_gather(*a, **k))
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: sent.append(x))
    local = BATCH // RANKS
    with LiveBytes() as live:
        features = torch.empty(local, 2, WIDTH, dtype=dtype, device="meta")
        gather = FeatureGather(features, group)
        gather._work = None
        log_scale = torch.empty((), device="meta")
        result = contrastive_loss(gather, log_scale, group, chunk_rows=512)
    assert result.grad_features.shape == features.shape
    print(f"{dtype}: at most {live.peak / 1e9:.3f} GB alive")
    assert BATCH * 2 * WIDTH * dtype.itemsize < live.peak <= bound
    # a ring all-gather sends a rank's share to each of the others
    moved, scalars, scale = sent
    assert moved.numel() * (RANKS - 1) == 2 * (RANKS - 1) * local * WIDTH
    assert moved.dtype == dtype
    assert scalars.shape == (local, 3)
    assert scale.numel() == 1
