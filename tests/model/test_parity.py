"""Our models are OpenCLIP's, parameter for parameter and output for output."""

import re
from importlib.metadata import version
from types import SimpleNamespace

import open_clip
import pytest
import torch

from coca_scale.data.tokens import TOKENIZER_CONFIG
from coca_scale.errors import UserError
from coca_scale.inference.export import export
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.load import load_model
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.config import parse_model_config
from coca_scale.model.weights import build_model, fit_weights
from coca_scale.openclip.folder import (
    is_model_folder,
    read_folder,
    to_openclip_config,
    verify_folder,
    what_reads,
    write_folder,
)
from coca_scale.openclip.state_dict import from_openclip, to_openclip
from tests.model.compare import open_clip_model, relative
from tests.variants import raw_config, untrained_export, variant, weights_of

PARAMETERS = {
    "coca_ViT-B-32": (253_560_065, 629),
    "coca_ViT-L-14": (638_450_177, 773),
    "coca_base": (440_337_409, 618),
    "ViT-B-32": (151_277_313, 302),
}


def uneven_tokens(batch, length, vocabulary, end=None):
    tokens = torch.zeros(batch, length, dtype=torch.long)
    for row, words in enumerate(torch.linspace(5, length, batch).int().tolist()):
        tokens[row, :words] = torch.randint(3, vocabulary - 1, (words,))
        tokens[row, words - 1] = end if end is not None else vocabulary - 1
    tokens[-1, 4] = 0  # id 0 is also "!", and is masked wherever it stands
    return tokens


def reference_greedy(theirs, images, start, end, length):
    """OpenCLIP's forward, asked for one more token again and again: its `generate` cannot run with
    transformers 5."""
    encoded = theirs(images)
    tokens = torch.full((len(images), length), theirs.pad_id)
    tokens[:, 0] = start
    ended = torch.zeros(len(images), dtype=torch.bool)
    for position in range(1, length):
        logits = theirs(
            images,
            tokens[:, :position],
            image_latent=encoded["image_features"],
            image_embs=encoded["image_embs"],
            output_labels=False,
        )["logits"][:, -1]
        choice = logits.argmax(-1)
        tokens[:, position] = torch.where(ended, theirs.pad_id, choice)
        ended |= choice == end
    return tokens


@torch.no_grad()
def assert_same(theirs, config, ours, captions=3):
    coca = build_model(config, ours).coca
    size, text = config.vision_cfg.image_size, config.text
    images = torch.randn(captions, 3, size, size)
    end = text.eos_id if text.pool_type == "eos" else None
    tokens = uneven_tokens(captions, config.context_length, text.vocab_size, end)
    for normalize in (True, False):
        for kind, given in (("image", images), ("text", tokens)):
            mine = getattr(coca, f"encode_{kind}")(given, normalize)
            other = getattr(theirs, f"encode_{kind}")(given, normalize=normalize)
            assert relative(mine, other) <= 1e-5, kind
    if coca.decoder is None:
        return
    _, image_tokens = coca.image(images)
    real = tokens[:, 1:] != 0
    logits = coca.caption_logits(image_tokens, tokens)[:, :-1]
    assert relative(logits[real], theirs(images, tokens)["logits"][real]) <= 1e-5


@torch.no_grad()
def assert_same_captions(theirs, config, ours):
    """A whole batch of greedy captions, of the config's context length."""
    fitted, _ = fit_weights(ours, config)
    coca = build_model(config, fitted).coca
    size, length = config.vision_cfg.image_size, config.context_length
    images = torch.randn(4, 3, size, size)
    special = SimpleNamespace(start_id=1, end_id=2, pad_id=theirs.pad_id)
    options = GenerationOptions("greedy", min_seq_len=0)
    written = generate(coca, images, special, options).tokens_BNL[:, 0]
    assert torch.equal(written, reference_greedy(theirs, images, 1, 2, length))
    assert len({tuple(row) for row in written.tolist()}) > 1, "all captions are the same"


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configs_equal_openclip(name, tmp_path):
    config = load_model_config(name)
    assert to_openclip_config(config) == open_clip.get_model_config(name)
    theirs = open_clip_model(config, tmp_path)
    state = theirs.state_dict()
    ours = from_openclip(state)
    assert (sum(t.numel() for t in ours.values()), len(state)) == PARAMETERS[name]
    back = to_openclip(ours, flat_text="coca" not in name)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert_same(theirs, config, ours)
    if config.multimodal_cfg is not None and "L-14" not in name:  # slow, and built like B-32
        assert_same_captions(theirs, config.resized(context_length=7), ours)


@pytest.mark.parametrize("kind", ["coca", "base", "wide", "clip", "clip_timm", "clip_roberta"])
def test_small_variants_equal_openclip(kind, tmp_path):
    config = variant(kind, tmp_path)
    theirs = open_clip_model(config, tmp_path)
    ours = from_openclip(theirs.state_dict())
    assert_same(theirs, config, ours, captions=4)
    if config.multimodal_cfg is not None:
        assert_same_captions(theirs, config, ours)


@torch.no_grad()
def test_correct_cls_mask_equals_openclips(tmp_path):
    """open_clip 3.3 has the corrected mask in its tower, but no way to ask for it."""
    legacy, corrected = variant("coca", tmp_path), variant("correct_mask", tmp_path)
    theirs = open_clip_model(legacy, tmp_path)
    ours = from_openclip(theirs.state_dict())
    tokens = uneven_tokens(4, legacy.context_length, 1024)
    before = theirs.encode_text(tokens)
    theirs.text.correct_cls_mask = True
    after = theirs.encode_text(tokens)
    assert relative(build_model(legacy, ours).coca.encode_text(tokens), before) <= 1e-5
    assert relative(build_model(corrected, ours).coca.encode_text(tokens), after) <= 1e-5
    assert relative(after, before) > 1e-2


@torch.no_grad()
def test_export_loads_in_openclip_and_comes_back_bit_exact(tmp_path):
    config = load_model_config("coca_tiny")
    torch.manual_seed(0)
    weights = weights_of(CoCa(config))
    assert write_folder(weights, config, tmp_path) is None
    loaded = open_clip.create_model(f"local-dir:{tmp_path}")
    returned = from_openclip(loaded.state_dict())
    read_config, read_weights = read_folder(tmp_path)
    read = read_weights()
    assert read_config == config
    for copy in (returned, read):
        assert copy.keys() == weights.keys()
        assert all(torch.equal(copy[name], weights[name]) for name in weights)
    plain = torch.load(tmp_path / "open_clip_pytorch_model.bin", weights_only=True)
    assert plain["logit_scale"].shape == ()


NEWER = ("cascade", "parallel", "correct_mask", "timm_cascade", "modern", "modern_all")
MAMMUTS = ("mammut", "mammut_modern", "mammut_laion")


@pytest.mark.parametrize("kind", (*NEWER, *MAMMUTS))
def test_what_a_later_openclip_reads_is_written_for_it_and_refused_here(kind, tmp_path):
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    weights = weights_of(CoCa(config))
    assert write_folder(weights, config, tmp_path) is None
    installed = version("open_clip_torch")
    newer = f"open_clip 4.2 and later read it, {installed} is installed here"
    assert what_reads(config) == newer
    with pytest.raises(UserError, match=re.escape(newer)):
        verify_folder(tmp_path, build_model(config, weights))
    with pytest.raises((TypeError, RuntimeError, KeyError)):
        open_clip.create_model(f"local-dir:{tmp_path}")
    read_config, read_weights = read_folder(tmp_path)
    read = read_weights()
    assert to_openclip_config(read_config) == to_openclip_config(config)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["roberta", "timm_vit"])
def test_what_openclip_cannot_compute_is_not_written_for_it(kind, tmp_path):
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    weights = weights_of(CoCa(config))
    out = tmp_path / "export"
    reason = write_folder(weights, config, out)
    assert reason
    with pytest.raises(FileNotFoundError, match="config file missing"):
        open_clip.create_model(f"local-dir:{out}")
    read_config, read_weights = read_folder(out)
    read = read_weights()
    assert read_config == config
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_exporting_over_another_kind_leaves_one_model(tmp_path):
    torch.manual_seed(0)
    for kind in ("coca", "timm_vit", "coca"):
        config = variant(kind, tmp_path)
        weights = weights_of(CoCa(config))
        write_folder(weights, config, tmp_path)
        assert read_folder(tmp_path)[0] == config


def test_an_export_that_is_cut_short_is_no_model(tmp_path):
    loaded = load_model(str(untrained_export(tmp_path / "untrained")))
    out = tmp_path / "out"
    (out / TOKENIZER_CONFIG).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        export(loaded, out)
    assert not is_model_folder(out)
    (out / TOKENIZER_CONFIG).rmdir()
    export(loaded, out)
    assert is_model_folder(out)


def test_every_parameter_is_initialised(tmp_path):
    for kind in ("coca", "base", "cascade", "clip", "modern_all", *MAMMUTS):
        config = variant(kind, tmp_path)
        torch.manual_seed(0)
        first = CoCa(config)
        torch.manual_seed(0)
        again = CoCa(config)
        for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
            assert a.isfinite().all() and torch.equal(a, b), name
            assert a.ndim > 0
            constant = name.endswith(".bias") or "norm" in name
            assert constant or 0 < a.std() < 1.1, name


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    kinds = ("coca", "base", "cascade", "roberta", "timm_vit", "modern_all", *MAMMUTS)
    for kind in kinds:
        torch.manual_seed(0)
        config = variant(kind, tmp_path)
        coca = CoCa(config)
        images, tokens = torch.randn(2, 3, 48, 48), torch.randint(3, 64, (2, 16))
        gradients = []
        captions = coca.text.pack(tokens)
        for mode in ("none", "selective", "full"):
            coca.set_activation_checkpointing(mode)
            coca.zero_grad()
            features, sums = coca(images, captions)
            (features.square().sum() * features[0, 0, 0] + sums["caption"]).backward()
            gradients.append([p.grad.clone() for p in coca.parameters()])
        for other in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True)), kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg__qk_norm": True}, r"vision_cfg\.qk_norm: not supported"),
        ({"vision_cfg__layers": [3, 4, 6, 3]}, "name a ResNet of timm instead"),
        ({"text_cfg__vocab_size": 2000}, "vocab_size 2000 and multimodal_cfg.vocab_size 1024"),
        ({"text_cfg__embed_cls": False}, "needs embed_cls: true"),
        ({"multimodal_cfg": None}, "belong to a CoCa"),
        ({"vision_cfg": {"timm_model_name": "test_vit"}}, "needs vision_cfg.attentional_pool"),
        ({"text_cfg": {"hf_model_name": "/nowhere"}}, "neither a folder nor in the local cache"),
    ],
)
def test_faults_of_a_config_are_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse_model_config(raw_config("coca_tiny", **changes), "odd")
    with pytest.raises(UserError, match="did you mean coca_ViT-L-14"):
        load_model_config("coca_ViT-L14")
