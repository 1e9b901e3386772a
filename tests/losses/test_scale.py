"""The contrastive loss at full size: bytes on a rank and over the wire, counted on meta tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from coca_scale.losses import FeatureGather, contrastive_loss, sigmoid_loss
from coca_scale.planning.counting import LiveBytes

WIDTH, KEPT = 768, 262_144


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("ranks", "batch", "dtype", "bound"),
    [
        (8, 65_536, torch.bfloat16, 0.4e9),
        (8, 65_536, torch.float32, 0.7e9),
        (512, 1_048_576, torch.bfloat16, 1.0e9),  # all features alone are 3.2 GB
    ],
)
def test_memory_and_traffic_of_a_large_batch(kind, ranks, batch, dtype, bound, monkeypatch):
    sent = []

    class Work:
        def wait(self):
            pass

    def all_gather(out, x, **_):
        sent.append(x)
        assert out.numel() == ranks * x.numel()
        return Work()

    monkeypatch.setattr(dist, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: sent.append(x))
    dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
    local = batch // ranks
    try:
        with LiveBytes() as live:
            features = torch.empty(local, 2, WIDTH, dtype=dtype, device="meta")
            gather = FeatureGather(features, dist.group.WORLD, KEPT)
            log_scale = torch.empty((), device="meta")
            if kind == "softmax":
                result = contrastive_loss(gather, log_scale, dist.group.WORLD)
            else:
                result = sigmoid_loss(gather, log_scale, log_scale, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert result.grad_features.shape == features.shape
    print(f"{batch} on {ranks} ranks, {dtype}: at most {live.peak / 1e9:.3f} GB alive")
    assert min(batch, KEPT) * 2 * WIDTH * dtype.itemsize < live.peak <= bound
    # a ring all-gather sends a rank's share to each of the others
    *moved, scale = sent
    scalars = [x.shape for x in moved if x.ndim == 2]
    moved = [x for x in moved if x.ndim == 3]
    times = 2 if kind == "softmax" and batch > KEPT else 1
    assert sum(x.numel() for x in moved) == times * 2 * local * WIDTH
    assert {x.dtype for x in moved} == {dtype}
    assert scalars == ([(local, 3)] if kind == "softmax" else [])
    assert scale.numel() == (1 if kind == "softmax" else 3)
