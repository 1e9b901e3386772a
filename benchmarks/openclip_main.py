"""Every family of models against a checkout of OpenCLIP's main: outputs, losses, captions, exports.

    git clone https://github.com/mlfoundations/open_clip
    python benchmarks/openclip_main.py open_clip [--only coca2 mammut2] [--out FILE]

For each small model OpenCLIP's own classes get random weights, norms and biases included. They are
imported here and both compute the same pictures and captions in fp64: features, caption logits and
both losses. Then the model is exported and has to come back bit by bit, to load there strictly and
to give the same outputs and captions, greedy and by beam search. The table has the largest
differences; the exit status is 1 if one is above the limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coca_scale.errors import UserError
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model.weights import Model, build_model
from coca_scale.openclip.folder import CONFIG_FILE, SAFETENSORS_FILE, read_folder, write_folder

LIMIT = 1e-5
SAME_BITS = "same bits"
LAIONS_KEYS, LAIONS_CONFIG = "mammut, LAION's keys", "mammut, LAION's config"
CONTEXT, VOCABULARY = 12, 96
PAD, START, END = 0, 94, 95
Raw = dict[str, Any]

_SIZES: Raw = {"width": 32, "heads": 4, "layers": 3, "vocab_size": VOCABULARY}
_TEXT: Raw = {**_SIZES, "context_length": CONTEXT}
_CLASSIC: Raw = {**_TEXT, "embed_cls": True, "output_tokens": True}
_MODERN: Raw = {
    **_TEXT,
    "text_arch": "modern",
    "pos_embed": "rope",
    "mlp_type": "swiglu",
    "norm_type": "rmsnorm",
    "norm_eps": 1e-6,
    "attn_gated": True,
}
_MODERN_TEXT: Raw = {
    **_MODERN,
    "pool_type": "eos",
    "bos_id": START,
    "eos_id": END,
    "attention_mode": "causal",
    "freeze_pad_embed": False,
    "output_tokens": True,
}
_VIT: Raw = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2}
_POOLER: Raw = {"attn_pooler_queries": 7, "attn_pooler_heads": 4, "output_tokens": True}
_TIMM: Raw = {"timm_pool": "avg", "timm_proj": "linear", **_POOLER}
_NAFLEX: Raw = {
    "timm_model_name": "naflexvit_base_patch16_gap",
    "timm_model_kwargs": {"patch_size": 8, "pre_norm": True, "pos_embed_grid_size": [4, 4]}
    | {"embed_dim": 48, "depth": 2, "num_heads": 4},
    "image_size": 32,
}
_RELPOS: Raw = {"timm_model_name": "test_vit_relpos", "image_size": 160}
_CLASS_TOKEN: Raw = {"timm_model_name": "test_vit", "image_size": 160}
_MAMMUT_TEXT: Raw = {**_TEXT, "cross_attn_ratio": 2}
_MAMMUT_VIT: Raw = {**_VIT, "output_tokens": True, "pool_type": "avg", "final_ln_after_pool": True}


def _coca(pooling: Any, text: Raw, decoder: Raw | None = None, **vision: Any) -> Raw:
    tower = {**_VIT, **_POOLER, **vision}
    if "timm_model_name" in vision:
        tower = {**_TIMM, **vision}
    if pooling:
        tower["attentional_pool"] = pooling
    return {
        "embed_dim": 32,
        "vision_cfg": tower,
        "text_cfg": text,
        "multimodal_cfg": _TEXT if decoder is None else decoder,
        "custom_text": True,
    }


def _modern_coca(pooling: str = "cascade", **changes: Any) -> Raw:
    """Changes are of both parts, as in OpenCLIP's configs."""
    return _coca(pooling, {**_MODERN_TEXT, **changes}, {**_MODERN, **changes})


def _mammut(decoder: Raw, **changes: Any) -> Raw:
    decoder = {**decoder, "cross_attn_ratio": 2, **changes}
    return {"embed_dim": 32, "vision_cfg": _MAMMUT_VIT, "multimodal_cfg": decoder}


_RIGHT = {**_CLASSIC, "correct_cls_mask": True}
CASES: dict[str, Raw] = {
    "coca": _coca(True, _CLASSIC),
    "coca, same widths": _coca(True, _CLASSIC, width=32),
    "coca, no pooler": _coca(False, _CLASSIC, width=32),
    "coca, QuickGELU": {**_coca(True, _CLASSIC), "quick_gelu": True},
    "coca, right mask": _coca(True, _RIGHT),
    "coca2 cascade": _coca("cascade", _RIGHT),
    "coca2 cascade, same widths": _coca("cascade", _RIGHT, width=32),
    "coca2 cascade, legacy mask": _coca("cascade", _CLASSIC),
    "coca2 parallel": _coca("parallel", _RIGHT),
    "coca2 parallel, same widths": _coca("parallel", _RIGHT, width=32),
    "coca2 cascade, timm": _coca("cascade", _RIGHT, **_RELPOS),
    "coca2 parallel, timm": _coca("parallel", _RIGHT, **_RELPOS),
    "coca2, timm with class token": _coca("cascade", _RIGHT, **_CLASS_TOKEN),
    "coca2 parallel, naflex": _coca("parallel", _RIGHT, **_NAFLEX),
    "modern coca2": _modern_coca(),
    "modern coca2, ungated": _modern_coca(attn_gated=False),
    "modern coca2, QK-norm": _modern_coca("parallel", qk_norm=True),
    "modern coca2, biases": _modern_coca(attention_bias=True, mlp_bias=True),
    "modern coca2, gate bias": _modern_coca(gate_bias=True),
    "modern coca2, LayerNorm": _modern_coca(norm_type="layernorm"),
    "modern coca2, GELU": _modern_coca(mlp_type="mlp"),
    "modern coca2, squared ReLU": _modern_coca(mlp_type="relu2"),
    "modern coca2, sandwich": _modern_coca(norm_placement="sandwich"),
    "modern coca2, layer scale": _modern_coca(ls_init_value=0.1),
    "modern coca2, value residual": _modern_coca(value_residual=True),
    "modern coca2, pre-norm": _modern_coca(pre_norm=True),
    "modern coca2, registers": _modern_coca(reg_tokens=2),
    "modern coca2, no rotation": _modern_coca(pos_embed="none"),
    "modern coca2, pooled by query": _coca(
        "cascade", {**_MODERN_TEXT, "pool_type": "map"}, _MODERN
    ),
    "modern coca2, mean pooling": _coca(
        "parallel", {**_MODERN_TEXT, "pool_type": "mean"}, _MODERN, width=32
    ),
    "modern coca2, classic decoder": _coca("cascade", _MODERN_TEXT, _TEXT),
    "mammut2": _mammut(_TEXT),
    "mammut2, every layer": _mammut(_TEXT, cross_attn_ratio=1),
    "mammut2, all averaged": _mammut(_TEXT, pool_type="avg_all", use_pad_mask=False),
    "mammut2, projected": _mammut(_TEXT, proj_type="linear"),
    "mammut2, naflex": {**_mammut(_TEXT), "vision_cfg": {**_TIMM, **_NAFLEX}},
    "modern mammut2": _mammut(_MODERN, bos_id=START, eos_id=END),
    "modern mammut2, QK-norm": _mammut(_MODERN, bos_id=START, eos_id=END, qk_norm=True),
    "modern mammut2, tied": _mammut(_MODERN, bos_id=START, eos_id=END, tie_lm_head=True),
    # what LAION's MaMMUTs are, as OpenCLIP's config says it, and as their own does
    LAIONS_KEYS: {
        "embed_dim": 32,
        "vision_cfg": {**_MAMMUT_VIT, "pool_type": "avg_all"},
        "multimodal_cfg": {**_MAMMUT_TEXT, "pool_type": "avg_all", "use_pad_mask": False},
    },
    LAIONS_CONFIG: {
        "embed_dim": 32,
        "vision_cfg": {**_MAMMUT_VIT, "pool_type": "avg_all"},
        "text_cfg": {**_MAMMUT_TEXT, "does_full_decoding": True, "output_tokens": True},
        "custom_text": True,
    },
}


def _built(name: str, folder: Path) -> nn.Module:
    """OpenCLIP's model with random weights, which lie in `folder` as people have them."""
    import open_clip

    folder.mkdir()
    config = {"model_cfg": CASES[name], "preprocess_cfg": {}}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    theirs: nn.Module = open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, pretrained_image=False
    )
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            around = 1.0 if parameter.ndim == 1 and key.endswith("weight") else 0.0
            if key != "logit_scale":
                parameter.normal_(around, 0.2)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    if name in (LAIONS_KEYS, LAIONS_CONFIG):
        weights["text.text_projection"] = weights.pop("text.lm_head")
    save_file(weights, folder / SAFETENSORS_FILE)
    return theirs.eval().double()


def _batch(size: int) -> tuple[Tensor, Tensor]:
    """Pictures and captions: of uneven lengths, one that was cut, one with PAD's word ("!")."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, START, (6, CONTEXT), generator=generator)
    tokens[:, 0] = START
    for row, length in enumerate((CONTEXT, 3, 7, CONTEXT - 1, 9)):
        tokens[row, length - 1] = END
        tokens[row, length:] = PAD
    tokens[4, 4] = PAD
    images = torch.randn(6, 3, size, size, generator=generator, dtype=torch.float64)
    return images, tokens


def _their_outputs(theirs: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    from open_clip.task import CoCaTask

    task = CoCaTask(theirs, caption_loss_weight=1.0, clip_loss_weight=1.0, verbose=False)
    losses, _ = task.training_forward({"image": images, "text": tokens})
    out = theirs(images, tokens)
    return {
        "image": out["image_features"],
        "text": out["text_features"],
        "logits": out["logits"][:, : CONTEXT - 1][tokens[:, 1:] != PAD],
        "contrastive": losses["contrastive_loss"],
        "caption": losses["caption_loss"],
    }


def _our_outputs(ours: Model, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    coca = ours.coca
    captions = coca.text.pack(tokens)
    features, losses = coca(images, captions)
    _, image_tokens = coca.image(images)
    assert image_tokens is not None
    logits = coca.caption_logits(image_tokens, tokens)[:, : CONTEXT - 1]
    gather = FeatureGather(features, None)
    return {
        "image": coca.encode_image(images),
        "text": coca.encode_text(tokens),
        "logits": logits[tokens[:, 1:] != PAD],
        "contrastive": contrastive_loss(gather, ours.logit_scale.log_scale, None).loss,
        "caption": losses["caption"] / len(captions.labels_K),
    }


def _their_captions(theirs: Any, images: Tensor, beams: int) -> list[list[int]]:
    written: Tensor = theirs.generate(
        images,
        seq_len=CONTEXT - 2,
        num_beams=beams,
        num_beam_groups=1,
        sot_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return [_until_end(row) for row in written.tolist()]


def _our_captions(ours: Model, images: Tensor, beams: int) -> list[list[int]]:
    special = SimpleNamespace(start_id=START, end_id=END, pad_id=PAD)
    kind = "greedy" if beams == 1 else "beam_search"
    options = GenerationOptions(kind, seq_len=CONTEXT - 2, num_beams=beams)
    return [
        _until_end(row[0])
        for row in generate(ours.coca, images, special, options).tokens_BNL.tolist()
    ]


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def _largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((a[name].double() - b[name].double()).abs().max()) for name in a}


def _bits(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    """Whether two files hold the same, in words."""
    names = sorted(theirs.keys() ^ ours.keys())
    if names:
        return f"{len(names)} other keys ({names[0]}, …)"
    changed = [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])]
    return f"{len(changed)} other tensors ({changed[0]}, …)" if changed else SAME_BITS


@torch.no_grad()
def compare(name: str, folder: Path) -> dict[str, Any]:
    """One model, there and back.

    Returns:
        `differences` of outputs by name, `back` the largest one of the export in OpenCLIP,
        `bits` and `captions` in words; or `not supported`, the reason.
    """
    import open_clip

    torch.manual_seed(0)
    row: dict[str, Any] = {"model": name}
    theirs = _built(name, folder / "theirs")
    images, tokens = _batch(CASES[name]["vision_cfg"]["image_size"])
    expected = _their_outputs(theirs, images, tokens)
    try:
        config, read = read_folder(folder / "theirs")
        weights = read()
        ours = build_model(config, weights)
    except UserError as error:
        said = str(error).replace(f"{folder}/theirs/{CONFIG_FILE}: ", "").splitlines()
        return {
            **row,
            "not supported": said[0] + (f" (and {len(said) - 1} more)" if said[1:] else ""),
        }
    ours.coca.double()
    found = _our_outputs(ours, images, tokens)
    row["differences"] = _largest(found, expected)
    obstacle = write_folder(read(), config, folder / "ours")
    if obstacle is not None:
        return {**row, "not exported": obstacle}
    exported = load_file(folder / "ours" / SAFETENSORS_FILE)
    row["bits"] = _bits({n: t.float() for n, t in theirs.state_dict().items()}, exported)
    again = open_clip.create_model(f"local-dir:{folder / 'ours'}").eval().double()
    row["back"] = max(_largest(found, _their_outputs(again, images, tokens)).values())
    same = total = 0
    for beams in (1, 6):
        pairs = zip(
            _our_captions(ours, images, beams), _their_captions(again, images, beams), strict=True
        )
        equal = [a == b for a, b in pairs]
        same, total = same + sum(equal), total + len(equal)
    row["captions"] = f"{same}/{total}"
    return row


def _good(row: dict[str, Any]) -> bool:
    """Nothing differs, as far as it was computed at all."""
    if "not supported" in row:
        return True
    largest = max(*row["differences"].values(), row.get("back", 0.0))
    same, _, total = row.get("captions", "0/0").partition("/")
    return bool(largest <= LIMIT and same == total and row.get("bits", SAME_BITS) == SAME_BITS)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    outputs = ("image", "text", "logits", "contrastive", "caption")
    heads = "".join(f"{head:>13}" for head in (*outputs, "export there"))
    print(f"{'':<31}{heads}  captions  export")
    for row in rows:
        line = f"{row['model']:<31}"
        if "not supported" in row:
            line += f"  not supported: {row['not supported']}"
        if "differences" in row:
            line += "".join(f"{row['differences'][output]:13.0e}" for output in outputs)
        if "not exported" in row:
            line += f"  not exported: {row['not exported']}"
        elif "back" in row:
            line += f"{row['back']:13.0e}  {row['captions']:>8}  {row['bits']}"
        print(line if _good(row) else f"{line}  ← differs")


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of OpenCLIP's main")
    parser.add_argument("--only", nargs="+", default=[""], help="models whose name begins so")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(options.checkout.resolve() / "src"))
    import open_clip

    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"OpenCLIP {open_clip.__version__} in {Path(open_clip.__file__).parents[2]}")
    rows = []
    for name in CASES:
        if name.startswith(tuple(options.only)):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(name, Path(folder)))
    show(rows)
    missing = sum("not supported" in row for row in rows)
    print(f"{sum(map(_good, rows)) - missing} agree, {missing} not supported, of {len(rows)}")
    if options.out is not None:
        facts = {"open_clip": open_clip.__version__, "torch": torch.__version__}
        facts["date"] = time.strftime("%Y-%m-%d")
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0 if all(map(_good, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
