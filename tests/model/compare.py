"""OpenCLIP's model of a config, and how far two results lie apart."""

from __future__ import annotations

import json

import open_clip
import torch

from coca_scale.openclip.folder import to_openclip_config


def open_clip_model(config, folder):
    """OpenCLIP's own model of a config, its decoder initialised, which OpenCLIP leaves undone."""
    torch.manual_seed(0)
    content = {"model_cfg": to_openclip_config(config)}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    if config.multimodal_cfg is not None:
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.05)
    for parameter in model.parameters():
        if parameter.ndim == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # biases, so that their order matters
    return model


def relative(a, b):
    """The norm of the difference, relative to that of `b`."""
    return float((a - b).norm() / b.norm())
