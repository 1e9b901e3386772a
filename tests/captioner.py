"""A captioner that has learnt something, here and in open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_scale.data.images import decode_image, eval_pixels
from coca_scale.data.synthetic import Shapes
from coca_scale.data.tokens import Tokenizer, make_tokenizer
from coca_scale.inference.export import export
from coca_scale.inference.load import LoadedModel, load_model
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.image import normalize_pixels
from coca_scale.model.preprocess import OPENAI
from coca_scale.model.weights import build_model


@dataclass(frozen=True)
class Captioner:
    """The same weights in our model and in open_clip's, and 200 pictures of the kind it learnt.

    `folder` holds them as an export.
    """

    folder: Path

    coca: CoCa
    theirs: torch.nn.Module
    tokenizer: Tokenizer
    images: Tensor


def train_captioner(folder: Path) -> None:
    """Export coca_tiny after 60 steps of both losses."""
    torch.manual_seed(0)
    config = load_model_config("coca_tiny")
    coca = CoCa(config)
    tokenizer = make_tokenizer(config)
    images, captions = _drawings(tokenizer, 32 * 40, "train")
    optimizer = torch.optim.AdamW(coca.parameters(), lr=2e-3)
    for step in range(60):
        batch = slice(step % 40 * 32, (step % 40 + 1) * 32)
        features, sums = coca(images[batch], coca.text.pack(captions[batch]))
        similar = 14 * features[:, 0] @ features[:, 1].T
        contrastive = F.cross_entropy(similar, torch.arange(32)) + F.cross_entropy(
            similar.T, torch.arange(32)
        )
        optimizer.zero_grad()
        (contrastive / 2 + 2 * sums["caption"] / 160).backward()
        torch.nn.utils.clip_grad_norm_(coca.parameters(), 1.0)
        optimizer.step()
    weights = {name: tensor.detach() for name, tensor in coca.state_dict().items()}
    weights["logit_scale.log_scale"] = torch.tensor([2.6])
    loaded = LoadedModel(weights, config, build_model(config, weights), tokenizer)
    assert export(loaded, folder) is None


def read_captioner(folder: Path) -> Captioner:
    """The captioner that was exported to `folder`."""
    loaded = load_model(str(folder))
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    pictures, _ = _drawings(loaded.tokenizer, 200, "val")
    return Captioner(folder, loaded.model.coca, theirs, loaded.tokenizer, pictures)


def _drawings(tokenizer: Tokenizer, count: int, split: str) -> tuple[Tensor, Tensor]:
    shapes = Shapes(count, 48, split)
    samples = [shapes[i] for i in range(count)]
    pixels = torch.stack([eval_pixels(decode_image(s.image, s.key), 48) for s in samples])
    tokens = tokenizer([sample.caption for sample in samples])
    return normalize_pixels(pixels, torch.float32, OPENAI), tokens
