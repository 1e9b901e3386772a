"""Start weights of single towers, from the libraries that the towers come from."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from coca_scale.errors import UserError
from coca_scale.model.coca import CoCa
from coca_scale.model.hf_text import transformers_config
from coca_scale.model.timm_tower import has_batch_norm, takes_image_size


def load_tower_weights(coca: CoCa) -> list[str]:
    """Fill timm and Hugging Face towers with their published weights where the config says so.

    Returns:
        A line for every tower that was filled.

    Raises:
        UserError: not in the local cache and not reachable.
    """
    vision, text = coca.config.vision_cfg, coca.config.text
    notes = []
    if vision.timm_model_name is not None and vision.timm_model_pretrained:
        import timm

        name = vision.timm_model_name
        options = {"img_size": vision.image_size} if takes_image_size(name) else {}
        try:
            published = timm.create_model(name, pretrained=True, num_classes=0, **options)
        except (OSError, RuntimeError) as error:
            raise UserError(_missing(name, "timm_model_pretrained")) from error
        _copy(coca.image.get_submodule("trunk"), published.state_dict())
        notes.append(f"image tower starts from timm's weights of {name}")
    if text.hf_model_name is not None and text.hf_model_pretrained:
        from transformers import AutoModel
        from transformers.utils import logging as transformers_logging

        config = transformers_config(text, causal=coca.config.multimodal_cfg is not None)
        config.vocab_size = text.hf_config["vocab_size"] if text.hf_config else text.vocab_size
        transformers_logging.disable_progress_bar()
        try:
            found = AutoModel.from_pretrained(
                text.hf_model_name, config=config, add_pooling_layer=False
            )
        except OSError as error:
            raise UserError(_missing(text.hf_model_name, "hf_model_pretrained")) from error
        if text.vocab_size > config.vocab_size:
            found.resize_token_embeddings(text.vocab_size)
        _copy(coca.text.get_submodule("transformer"), found.state_dict())
        notes.append(f"text tower starts from the weights of {text.hf_model_name}")
    return notes


def require_statistics(coca: CoCa, has_weights: bool) -> None:
    """Refuse BatchNorm that has never seen data.

    Raises:
        UserError: BatchNorm in a model that starts from nothing.
    """
    vision = coca.config.vision_cfg
    if has_batch_norm(coca) and not has_weights:
        raise UserError(
            f"{vision.timm_model_name} has BatchNorm, which runs here with stored statistics "
            "(those of a micro-batch would make the result depend on how a batch is cut); start "
            "from weights (model.pretrained or timm_model_pretrained: true), or take a model "
            "without BatchNorm such as resnet50_gn or convnext_tiny"
        )


def _copy(module: Module, weights: dict[str, Tensor]) -> None:
    """Load all weights of `module`; more, as of a classifier, are left out."""
    own = module.state_dict()
    module.load_state_dict({name: weights[name] for name in own})


def _missing(name: str, key: str) -> str:
    return (
        f"the weights of {name} are not in the local cache and cannot be downloaded; fetch them "
        f"where there is a network, or train this tower from nothing with {key}: false in the "
        "model config or model.pretrained_towers=false"
    )
