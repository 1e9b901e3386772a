"""Our CoCa is OpenCLIP's, parameter for parameter."""

import open_clip
import pytest
import torch

from coca_scale.model import CoCa, load_model_config
from coca_scale.model.weights import LOGIT_SCALE, build_model
from coca_scale.openclip.folder import read_folder, write_folder
from coca_scale.openclip.names import from_openclip, to_openclip

PARAMETERS = {"coca_ViT-B-32": (253_560_065, 629), "coca_ViT-L-14": (638_450_177, 773)}


def reference_model(name):
    """OpenCLIP's own model, with the parts initialised that it leaves as they come."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.05)
    for parameter in model.parameters():
        if parameter.ndim == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # biases, so that their order matters
    return model


def uneven_tokens(batch, length, vocabulary):
    tokens = torch.zeros(batch, length, dtype=torch.long)
    for row, words in enumerate(torch.linspace(3, length, batch).int().tolist()):
        tokens[row, :words] = torch.randint(1, vocabulary, (words,))
    tokens[-1, 4] = 0  # id 0 is also "!", and is masked wherever it stands
    return tokens


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", PARAMETERS)
@torch.no_grad()
def test_outputs_and_names_equal_openclip(name):
    theirs = reference_model(name)
    config = load_model_config(name)
    state = theirs.state_dict()
    ours = from_openclip(state)
    assert (sum(t.numel() for t in ours.values()), len(state)) == PARAMETERS[name]
    back = to_openclip(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)

    coca = build_model(config, ours).coca
    size = config.vision_cfg.image_size
    images = torch.randn(3, 3, size, size)
    tokens = uneven_tokens(3, config.context_length, config.text_cfg.vocab_size)
    expected = theirs(images, tokens)
    _, image_tokens = coca.image(images)
    real = tokens[:, 1:] != 0
    assert relative(coca.encode_image(images), expected["image_features"]) <= 1e-5
    assert relative(coca.encode_text(tokens), expected["text_features"]) <= 1e-5
    logits = coca.caption_logits(image_tokens, tokens)[:, :-1]
    assert relative(logits[real], expected["logits"][real]) <= 1e-5


@torch.no_grad()
def test_export_loads_in_openclip_and_comes_back_bit_exact(tmp_path):
    config = load_model_config("coca_tiny")
    torch.manual_seed(0)
    weights = {**CoCa(config).state_dict(), LOGIT_SCALE: torch.tensor([2.5])}
    write_folder(weights, config, tmp_path)
    loaded = open_clip.create_model(f"local-dir:{tmp_path}")
    returned = from_openclip(loaded.state_dict())
    read_config, read = read_folder(tmp_path)
    assert read_config == config
    for copy in (returned, read):
        assert copy.keys() == weights.keys()
        assert all(torch.equal(copy[name], weights[name]) for name in weights)
    plain = torch.load(tmp_path / "open_clip_pytorch_model.bin", weights_only=True)
    assert plain["logit_scale"].shape == ()


def test_every_parameter_is_initialised():
    torch.manual_seed(0)
    first = CoCa(load_model_config("coca_tiny"))
    torch.manual_seed(0)
    again = CoCa(load_model_config("coca_tiny"))
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b), name
        assert a.ndim > 0
        constant = name.endswith(".bias") or "norm" in name
        assert constant or 0 < a.std() < 1.1, name


@torch.no_grad()
def test_later_tokens_and_other_images_do_not_leak():
    torch.manual_seed(0)
    config = load_model_config("coca_tiny")
    coca = CoCa(config).eval()
    tokens = torch.randint(1, 1024, (2, config.context_length))
    _, image_tokens = coca.image(torch.randn(2, 3, 48, 48))
    before = coca.caption_logits(image_tokens, tokens)
    changed = tokens.clone()
    changed[:, 9:] = 7
    after = coca.caption_logits(image_tokens, changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    coca = CoCa(load_model_config("coca_tiny"))
    images, tokens = torch.randn(2, 3, 48, 48), torch.randint(1, 1024, (2, 16))
    gradients = []
    for enabled in (False, True):
        coca.set_activation_checkpointing(enabled)
        coca.zero_grad()
        features, loss = coca(images, tokens)
        (features.square().sum() * features[0, 0, 0] + loss).backward()
        gradients.append([p.grad.clone() for p in coca.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unsupported_config_fields_are_named(tmp_path):
    import json

    raw = load_model_config("coca_tiny").to_dict()
    raw["vision_cfg"]["qk_norm"] = True
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"vision_cfg\.qk_norm: not supported"):
        load_model_config(str(path))
    with pytest.raises(ValueError, match="did you mean coca_ViT-L-14"):
        load_model_config("coca_ViT-L14")
