"""Small models of every kind that a config can describe, as files that recipes can name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca_scale.model import CoCa, load_model_config
from coca_scale.model.config import ModelConfig, parse_model_config
from coca_scale.model.weights import LOGIT_SCALE
from coca_scale.openclip.folder import write_folder

WORDS = "a small big red green blue yellow circle square triangle left right of above below the"


def untrained_export(folder: Path) -> Path:
    """The smallest model with random weights, as an OpenCLIP folder."""
    torch.manual_seed(0)
    config = load_model_config("coca_tiny")
    write_folder(weights_of(CoCa(config)), config, folder)
    return folder


def raw_config(name: str, **changes: Any) -> dict[str, Any]:
    """A shipped config as JSON data; `section__key=value` sets a field, None removes it."""
    raw = copy.deepcopy(load_model_config(name).to_dict())
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        node = raw[section] if section else raw
        if value is None:
            node.pop(key, None)
        else:
            node[key] = value
    return raw


def hugging_face_folder(folder: Path, kind: str = "roberta") -> Path:
    """A text model with random weights and its own trained tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([WORDS] * 20, vocab_size=400, special_tokens=special, min_frequency=1)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        kind,
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=40,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def variant(name: str, folder: Path) -> ModelConfig:
    """A small model of kind `name`; a Hugging Face one keeps its files in `folder`."""
    raw = _raw(name, folder)
    return parse_model_config(raw, name)


def config_file(name: str, folder: Path) -> Path:
    """The same as a JSON file."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_raw(name, folder)))
    return path


def weights_of(coca: CoCa) -> dict[str, Tensor]:
    """All weights of a model, with a logit scale."""
    return {**coca.state_dict(), LOGIT_SCALE: torch.tensor([2.5])}


CAPTIONERS = (
    *("coca", "base", "wide", "cascade", "parallel", "correct_mask"),
    *("roberta", "timm_vit", "timm_resnet", "timm_cascade"),
    *("modern", "modern_all", "mammut", "mammut_modern", "mammut_laion"),
)
MODERN = {"text_arch": "modern", "context_length": 24, "vocab_size": 1024, "width": 128}
MODERN |= {"heads": 4, "layers": 2, "eos_id": 2, "bos_id": 1}
MODERN |= {"hf_tokenizer_name": "coca-scale/clip-bpe-1024"}
MODERN_ALL = {"qk_norm": True, "attn_gated": True, "gate_bias": True, "attention_bias": True}
MODERN_ALL |= {"mlp_bias": True, "norm_type": "layernorm", "rope_temperature": 100.0}


def _raw(name: str, folder: Path) -> dict[str, Any]:
    if name == "coca":
        return raw_config("coca_tiny")
    if name == "base":  # no pooler: the decoder reads the patches
        return raw_config("coca_tiny", vision_cfg__attentional_pool=None)
    if name == "wide":  # an image tower of another width than the rest, as in L/14
        return raw_config("coca_tiny", vision_cfg__width=160)
    if name in ("cascade", "parallel"):
        return raw_config("coca_tiny", vision_cfg__attentional_pool=name, vision_cfg__width=160)
    if name in ("modern", "modern_all"):
        raw = raw_config("coca_tiny", vision_cfg__attentional_pool="cascade")
        more = MODERN_ALL if name == "modern_all" else {"attn_gated": True, "qk_norm": True}
        pooling = {"pool_type": "mean"} if name == "modern_all" else {"freeze_pad_embed": False}
        raw["text_cfg"] = {**MODERN, **more, **pooling}
        raw["multimodal_cfg"] = {**MODERN, **more}
        return raw
    if name.startswith("mammut"):
        raw = raw_config("coca_tiny", vision_cfg__attentional_pool=None, vision_cfg__width=160)
        del raw["text_cfg"], raw["custom_text"]
        raw["vision_cfg"] |= {"pool_type": "avg", "final_ln_after_pool": True}
        raw["multimodal_cfg"] |= {"context_length": 24, "layers": 3, "cross_attn_ratio": 2}
        raw["multimodal_cfg"] |= {"hf_tokenizer_name": "coca-scale/clip-bpe-1024"}
        if name == "mammut_modern":
            raw["multimodal_cfg"] |= {**MODERN, "layers": 3, "proj_type": "linear"}
            raw["embed_dim"] = 96
        if name == "mammut_laion":
            raw["vision_cfg"]["pool_type"] = "avg_all"
            raw["multimodal_cfg"] |= {"pool_type": "avg_all", "use_pad_mask": False}
        return raw
    if name == "correct_mask":
        return raw_config("coca_tiny", text_cfg__correct_cls_mask=True)
    if name.startswith("timm"):
        model = {
            "timm_vit": "test_vit",
            "timm_cascade": "test_vit",
            "timm_conv": "test_efficientnet_gn",
            "timm_resnet": "resnet50_gn",
            "timm_bn": "test_resnet",
        }
        raw = raw_config("coca_tiny")
        raw["vision_cfg"] = {"timm_model_name": model[name], "image_size": 48}
        pooling = "cascade" if name == "timm_cascade" else True
        raw["vision_cfg"] |= {"attentional_pool": pooling, "attn_pooler_queries": 9}
        raw["vision_cfg"]["attn_pooler_heads"] = 4
        return raw
    if name == "clip":
        return raw_config("clip_tiny")
    if name == "clip_timm":
        raw = raw_config("clip_tiny")
        raw["vision_cfg"] = {"timm_model_name": "test_vit", "image_size": 160}
        return raw
    assert name in ("roberta", "clip_roberta"), name
    raw = raw_config("coca_tiny" if name == "roberta" else "clip_tiny")
    source = folder / "text_model"
    if not source.is_dir():
        hugging_face_folder(source)
    raw["text_cfg"] = {"hf_model_name": str(source), "hf_proj_type": "linear", "width": 64}
    raw["text_cfg"] |= {"context_length": 24, "hf_tokenizer_name": str(source)}
    if name == "roberta":
        raw["embed_dim"] = 64
        raw["vision_cfg"]["attn_pooler_heads"] = 4
        raw["multimodal_cfg"] = {"context_length": 24, "width": 64, "heads": 4, "layers": 2}
    return raw
