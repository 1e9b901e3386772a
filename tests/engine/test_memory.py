"""No step ever allocates a [tokens, vocabulary] or a [B, B] tensor."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model import CoCa, load_model_config

BATCH, CHUNK = 48, 8


class Sizes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def run_step(chunk_rows):
    config = load_model_config("coca_tiny")
    torch.manual_seed(0)
    coca = CoCa(config)
    coca.caption_head.chunk_rows = chunk_rows
    images = torch.randn(BATCH, 3, 48, 48)
    tokens = torch.randint(1, config.text.vocab_size, (BATCH, config.context_length))
    saved: set[tuple[int, ...]] = set()

    def pack(tensor):
        saved.add(tuple(tensor.shape))
        return tensor

    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features, sums = coca(images, coca.text.pack(tokens))
        gather = FeatureGather(features.detach(), None)
        result = contrastive_loss(gather, torch.tensor([2.0]), None, chunk_rows)
        ((features * result.grad_features).sum() + sums["caption"]).backward()
    return config, sizes.shapes, saved


def too_large(shapes, config):
    """Shapes with more rows of logits or similarities than a chunk may have."""
    vocabulary = config.text.vocab_size
    weight = (vocabulary, config.multimodal_cfg.width)
    logits = {
        s for s in shapes if len(s) >= 2 and vocabulary in s and s not in (weight, weight[::-1])
    }
    large = {s for s in logits if torch.Size(s).numel() > CHUNK * vocabulary}
    return large | {s for s in shapes if s == (BATCH, BATCH)}


def test_step_makes_only_chunks():
    config, made, saved = run_step(CHUNK)
    assert too_large(made, config) == set()
    assert too_large(saved, config) == set()
    assert not any(len(s) == 2 and s[-1] == config.text.vocab_size and s[0] <= CHUNK for s in saved)
    assert (CHUNK, config.text.vocab_size) in made  # the check does see the chunks


def test_the_check_can_fail():
    config, made, _ = run_step(BATCH * 16)
    assert (BATCH, BATCH) in too_large(made, config)
    assert len(too_large(made, config)) > 1
