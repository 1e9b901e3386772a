"""Towers that OpenCLIP does not have, against references of their own; leaks; fitting weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import AttentionalPooler
from transformers import AutoConfig, AutoModel, RobertaConfig, RobertaForCausalLM

from coca_scale.errors import UserError
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.model import CoCa
from coca_scale.model.config import parse_model_config
from coca_scale.model.hf_config import CAUSAL_TYPES
from coca_scale.model.image import PooledTower
from coca_scale.model.patch_dropout import drop_patches
from coca_scale.model.text import TextTransformer
from coca_scale.model.timm_tower import has_batch_norm
from coca_scale.model.weights import build_model, fit_weights
from coca_scale.openclip.state_dict import to_openclip
from tests.model.compare import open_clip_model, relative
from tests.variants import CAPTIONERS, hugging_face_folder, raw_config, variant, weights_of


def fresh(config, seed=0):
    torch.manual_seed(seed)
    return CoCa(config).eval()


def random_tokens(config, batch):
    length, vocabulary = config.context_length, config.text.vocab_size
    return torch.randint(5, vocabulary, (batch, length))


def text_tokens(coca, tokens_BT):
    """Features [B, T, D] of every token, as the decoder reads them."""
    captions = coca.text.pack(tokens_BT, keep_padding=True)
    return coca.text(captions)[1][captions.read_M].unflatten(0, tokens_BT.shape)


@pytest.mark.parametrize("kind", CAPTIONERS)
@torch.no_grad()
def test_no_later_token_changes_an_earlier_prediction(kind, tmp_path):
    config = variant(kind, tmp_path)
    coca = fresh(config)
    tokens = random_tokens(config, 3)
    tokens[1, 8:] = config.pad_id  # a short caption
    tokens[2, 4] = config.pad_id  # the id of padding inside a caption
    size = config.vision_cfg.image_size
    _, image_tokens = coca.image(torch.randn(3, 3, size, size))
    before_text, before = text_tokens(coca, tokens), coca.caption_logits(image_tokens, tokens)
    for position in (3, 6, 9):
        for replacement in (7, config.pad_id):
            changed = tokens.clone()
            changed[:, position:] = replacement
            text, logits = text_tokens(coca, changed), coca.caption_logits(image_tokens, changed)
            assert torch.allclose(text[:, :position], before_text[:, :position], atol=1e-6)
            assert torch.allclose(logits[:, :position], before[:, :position], atol=1e-5)
            assert not torch.allclose(logits[0, position:], before[0, position:], atol=1e-3)


class Untouched(dict):
    """Parameters of a module, none of which may be looked at."""

    def __getitem__(self, name):
        raise AssertionError(f"{name} was looked at")


@pytest.mark.parametrize("kind", [*CAPTIONERS, "clip_roberta"])
def test_captions_are_laid_out_without_a_look_at_parameters(kind, tmp_path):
    """Under ZeRO-3 a look gathers them from all ranks, whatever these do in their main threads."""
    config = variant(kind, tmp_path)
    coca = fresh(config)
    for module in coca.modules():
        module._parameters = Untouched(module._parameters)
    with pytest.raises(AssertionError, match="weight was looked at"):
        coca.text(coca.text.pack(random_tokens(config, 3)))


@torch.no_grad()
def test_the_leak_test_finds_openclips_own_leak(tmp_path):
    """The text tower of a CLIP is bidirectional, as OpenCLIP builds it under its CoCa too."""
    config = variant("clip_roberta", tmp_path)
    coca = fresh(config)
    tokens = random_tokens(config, 2)
    changed = tokens.clone()
    changed[:, 9:] = 7
    assert not torch.allclose(
        text_tokens(coca, tokens)[:, :9], text_tokens(coca, changed)[:, :9], atol=1e-3
    )


@pytest.mark.parametrize("kind", CAUSAL_TYPES)
@torch.no_grad()
def test_every_accepted_hugging_face_type_is_causal(kind, tmp_path):
    folder = hugging_face_folder(tmp_path, kind)
    text = {"hf_model_name": str(folder), "context_length": 16}
    decoder = {"width": 64, "heads": 4, "layers": 1, "context_length": 16}
    raw = raw_config("coca_tiny", embed_dim=64, text_cfg=text, multimodal_cfg=decoder)
    config = parse_model_config(raw, kind)
    assert config.text.hf_config["model_type"] == kind
    coca = fresh(config)
    tokens = random_tokens(config, 2)
    changed = tokens.clone()
    changed[:, 7:] = 9
    assert torch.allclose(
        text_tokens(coca, tokens)[:, :7], text_tokens(coca, changed)[:, :7], atol=1e-6
    )
    assert (config.pad_id, config.multimodal_cfg.vocab_size) == (1, config.text.vocab_size)


@torch.no_grad()
def test_roberta_captioner_equals_transformers_and_openclips_decoder(tmp_path):
    config = variant("roberta", tmp_path)
    coca = fresh(config)
    reference = RobertaForCausalLM(
        RobertaConfig(**{**config.text.hf_config, "is_decoder": True})
    ).eval()
    missing, unexpected = reference.roberta.load_state_dict(
        coca.text.transformer.state_dict(), strict=False
    )
    assert not unexpected and not [name for name in missing if "position_ids" not in name]
    tokens = random_tokens(config, 3)
    tokens[1, 9:] = config.pad_id
    real = tokens != config.pad_id
    hidden = reference.roberta(tokens, attention_mask=real.long()).last_hidden_state
    pooled = coca.encode_text(tokens, normalize=False)
    assert relative(text_tokens(coca, tokens)[real], hidden[real]) <= 1e-5
    mean = torch.stack([row[keep].mean(0) for row, keep in zip(hidden, real, strict=True)])
    assert relative(pooled, mean @ coca.text.proj.weight.T) <= 1e-5

    theirs = to_openclip({n: t for n, t in coca.state_dict().items() if n.startswith(("d", "c"))})
    decoder_config = config.multimodal_cfg
    decoder = open_clip.transformer.MultimodalTransformer(
        width=64,
        layers=decoder_config.layers,
        heads=decoder_config.heads,
        context_length=config.context_length,
        output_dim=decoder_config.vocab_size,
    ).eval()
    decoder.load_state_dict({n.removeprefix("text_decoder."): t for n, t in theirs.items()})
    _, image_tokens = coca.image(torch.randn(3, 3, 48, 48))
    expected = decoder(image_tokens, hidden)
    assert relative(coca.caption_logits(image_tokens, tokens)[real], expected[real]) <= 1e-5


def openclip_pooler(ours, queries, heads):
    width, context = ours.attn.q.in_features, ours.attn.kv.in_features
    pooler = AttentionalPooler(width, context, heads, queries).eval()
    names = {f"image.pooler.{name}": tensor for name, tensor in ours.state_dict().items()}
    theirs = {n.removeprefix("visual.attn_pool."): t for n, t in to_openclip(names).items()}
    pooler.load_state_dict(theirs)
    return pooler


@pytest.mark.parametrize("kind", ["timm_vit", "timm_resnet"])
@torch.no_grad()
def test_timm_tower_equals_timm_under_openclips_pooler(kind, tmp_path):
    config = variant(kind, tmp_path)
    tower = fresh(config).image
    name = config.vision_cfg.timm_model_name
    options = {"img_size": 48} if kind == "timm_vit" else {}
    trunk = timm.create_model(name, num_classes=0, **options).eval()
    trunk.load_state_dict(tower.trunk.state_dict())
    images = torch.randn(2, 3, 48, 48)
    features = trunk.forward_features(images)
    if kind == "timm_resnet":
        features = features.flatten(2).transpose(1, 2)
        side = math.isqrt(features.shape[1])
        position = timm.layers.build_sincos2d_pos_embed([side, side], features.shape[2])
        norm = tower.norm_map
        features = torch.nn.functional.layer_norm(features, norm.weight.shape, norm.weight)
        features = features + position
    pooled = tower.norm_post(openclip_pooler(tower.pooler, 9, 4)(features))
    embedding, tokens = tower(images)
    assert relative(tokens, pooled[:, 1:]) <= 1e-5
    assert relative(embedding, pooled[:, 0] @ tower.projection) <= 1e-5


@pytest.mark.parametrize("kind", ["cascade", "parallel", "timm_cascade"])
@torch.no_grad()
def test_two_poolers_as_in_the_paper(kind, tmp_path):
    """As CoCa2 has them: the norm first, no projection behind the contrastive one."""
    config = variant(kind, tmp_path)
    tower = fresh(config).image
    x = torch.randn(2, 37, tower.norm_post.weight.shape[0])
    embedding, tokens = PooledTower.pool(tower, x)
    generative = openclip_pooler(tower.pooler, config.vision_cfg.attn_pooler_queries, 4)
    contrastive = openclip_pooler(tower.contrastive_pooler, 1, 4)
    x = tower.norm_post(x)
    expected = generative(x)
    assert relative(tokens, expected) <= 1e-5
    read = contrastive(x if kind == "parallel" else expected)
    assert relative(embedding, read[:, 0]) <= 1e-5


@torch.no_grad()
def test_batch_norm_keeps_its_statistics(tmp_path):
    coca = fresh(variant("timm_bn", tmp_path)).train()
    assert has_batch_norm(coca)
    statistics = {n: b.clone() for n, b in coca.named_buffers() if "running" in n}
    alone = coca.image(torch.ones(1, 3, 48, 48))[0]
    together = coca.image(torch.cat([torch.ones(1, 3, 48, 48), torch.randn(3, 3, 48, 48)]))[0][:1]
    assert torch.allclose(alone, together, atol=1e-5)
    after = dict(coca.named_buffers())
    assert statistics and all(torch.equal(after[n], b) for n, b in statistics.items())


def test_patch_dropout_is_a_function_of_the_sample():
    patches = torch.arange(64.0).view(1, 64, 1).expand(512, -1, -1)
    ids = torch.arange(512) + (3 << 40)
    kept = drop_patches(patches, ids, 0.75)[:, :, 0]
    assert kept.shape == (512, 16)
    assert torch.equal(kept[100:200], drop_patches(patches[:100], ids[100:200], 0.75)[:, :, 0])
    assert all(len(set(row)) == 16 for row in kept.tolist())
    assert len({tuple(sorted(row)) for row in kept.tolist()}) == 512
    share = torch.bincount(kept.flatten().long(), minlength=64) / 512
    assert share.min() > 0.25 - 0.1 and share.max() < 0.25 + 0.1  # 5 standard deviations


@torch.no_grad()
def test_patches_are_dropped_in_training_only(tmp_path):
    config = variant("coca", tmp_path).resized(patch_dropout=0.5)
    coca = fresh(config)
    images, tokens = torch.randn(2, 3, 48, 48), random_tokens(config, 2)
    captions = coca.text.pack(tokens)
    full = coca(images, captions, features_only=True)[0]
    ids = torch.tensor([5, 6])
    dropped = coca(images, captions, features_only=True, sample_ids=ids)[0]
    assert torch.equal(full[:, 1], dropped[:, 1])
    assert not torch.allclose(full[:, 0], dropped[:, 0], atol=1e-3)


@torch.no_grad()
def test_image_positions_are_resized_as_openclip_does(tmp_path):
    small = variant("base", tmp_path)
    large = small.resized(image_size=80)
    theirs = open_clip_model(small, tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    reference = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=80).eval()
    from coca_scale.openclip.folder import read_folder

    config, read_weights = read_folder(tmp_path)
    weights = read_weights()
    fitted, notes = fit_weights(weights, config.resized(image_size=80))
    assert notes == ["image.position_embedding: (37, 128) made (101, 128)"]
    images = torch.randn(2, 3, 80, 80)
    ours = build_model(large, fitted).coca.encode_image(images)
    assert relative(ours, reference.encode_image(images)) <= 1e-5


@pytest.mark.parametrize("kind", ["coca", "clip"])
@torch.no_grad()
def test_longer_captions_leave_short_ones_as_they_were(kind, tmp_path):
    config = variant(kind, tmp_path)
    coca = fresh(config)
    longer = config.resized(context_length=24)
    fitted, _ = fit_weights(weights_of(coca), longer)
    grown = build_model(longer, fitted).coca
    tokens = random_tokens(config, 2)
    tokens[:, 6] = 2
    tokens[:, 7:] = 0
    padded = torch.nn.functional.pad(tokens, (0, 8))
    assert torch.allclose(
        text_tokens(grown, padded)[:, :7], text_tokens(coca, tokens)[:, :7], atol=1e-6
    )
    features, expected = (m.encode_text(t, False) for m, t in ((grown, padded), (coca, tokens)))
    assert torch.allclose(features, expected, atol=1e-5)
    back, _ = fit_weights(fitted, config)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights_of(coca).items())


@torch.no_grad()
def test_new_tokens_leave_the_logits_of_old_ones(tmp_path):
    raw = raw_config("coca_tiny", text_cfg__vocab_size=1100, multimodal_cfg__vocab_size=1100)
    config, larger = variant("coca", tmp_path), parse_model_config(raw, "larger")
    coca = fresh(config)
    fitted, notes = fit_weights(weights_of(coca), larger)
    assert len(notes) == 2
    grown = build_model(larger, fitted).coca
    _, image_tokens = coca.image(torch.randn(2, 3, 48, 48))
    tokens = random_tokens(config, 2)
    before, after = (m.caption_logits(image_tokens, tokens) for m in (coca, grown))
    assert torch.allclose(after[:, :, :1024], before, atol=1e-6)
    assert torch.allclose(after[:, :, 1024:], before.mean(2, keepdim=True), atol=1e-5)


@torch.no_grad()
def test_timm_positions_are_resized(tmp_path):
    config = variant("timm_vit", tmp_path)
    coca = fresh(config)
    larger = config.resized(image_size=80)
    fitted, notes = fit_weights(weights_of(coca), larger)
    assert notes == ["image.trunk.pos_embed: (1, 10, 64) made (1, 26, 64)"]
    assert build_model(larger, fitted).coca.encode_image(torch.randn(1, 3, 80, 80)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coca", "roberta"])
def test_random_captions_cannot_be_learned_by_copying(kind, tmp_path):
    """Words drawn afresh at every step: a model that saw its label would reach zero, ours cannot
    get below the entropy of the words."""
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    coca = CoCa(config)
    optimizer = torch.optim.AdamW(coca.parameters(), lr=2e-3)
    words, size = 16, config.vision_cfg.image_size
    images = torch.zeros(32, 3, size, size)
    losses = []
    for _ in range(100):
        tokens = torch.randint(5, 5 + words, (32, 12))
        loss = coca(images, coca.text.pack(tokens))[1]["caption"]
        optimizer.zero_grad()
        (loss / (32 * 11)).backward()
        optimizer.step()
        losses.append(float(loss.detach()) / (32 * 11))
    settled = sum(losses[-20:]) / 20
    assert math.log(words) - 0.02 < settled < math.log(words) + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coca", "base", "roberta", "timm_vit"])
def test_one_batch_is_learned_by_heart_and_reproduced(kind, tmp_path):
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    coca = CoCa(config)
    optimizer = torch.optim.AdamW(coca.parameters(), lr=2e-3)
    size, length = config.vision_cfg.image_size, config.context_length
    images = torch.randn(8, 3, size, size)
    start, end = 3, 4
    tokens = torch.full((8, length), config.pad_id)
    for row in range(8):
        words = 3 + row
        tokens[row, : words + 2] = torch.tensor([start, *torch.randint(5, 300, (words,)), end])
    for _ in range(150):
        loss = coca(images, coca.text.pack(tokens))[1]["caption"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(coca.parameters(), 1.0)
        optimizer.step()
    special = SimpleNamespace(start_id=start, end_id=end, pad_id=config.pad_id)
    greedy = GenerationOptions("greedy", min_seq_len=0)
    assert torch.equal(generate(coca.eval(), images, special, greedy).tokens_BNL[:, 0], tokens)


def test_a_clip_writes_no_captions(tmp_path):
    coca = fresh(variant("clip", tmp_path))
    with pytest.raises(UserError, match="no decoder"):
        coca.new_cache(10)


def test_captions_longer_than_a_hugging_face_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="more than the 38 positions"):
        fresh(variant("roberta", tmp_path).resized(context_length=60))
    assert isinstance(fresh(variant("coca", tmp_path)).text, TextTransformer)


def test_hugging_face_weights_are_the_models_own(tmp_path):
    from coca_scale.model.tower_weights import load_tower_weights

    config = variant("roberta", tmp_path)
    coca = fresh(config, seed=5)
    folder = config.text.hf_model_name
    published = AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    notes = load_tower_weights(coca)
    assert notes == [f"text tower starts from the weights of {folder}"]
    own = coca.text.transformer.state_dict()
    assert own and all(torch.equal(own[name], published[name]) for name in own)
    assert AutoConfig.from_pretrained(folder).pad_token_id == config.pad_id
