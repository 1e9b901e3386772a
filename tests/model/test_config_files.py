"""Configs and tokenizers from outside: what is no model is a sentence, at once."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coca_scale.data.tokens import make_tokenizer, prompt_ids
from coca_scale.errors import UserError
from coca_scale.model import CoCa, LogitScale, load_model_config
from coca_scale.model.config import parse_model_config
from coca_scale.model.weights import load_coca
from coca_scale.openclip.folder import CONFIG_FILE, OWN_CONFIG_FILE, read_folder
from tests.variants import hugging_face_folder, raw_config, weights_of

SHORT = st.text(max_size=6)
SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | SHORT
ODD = [2**63, 10**400, 1e300, -1, 0, [], {}, "12", "\ud800", "../../etc", "hf-hub:a/b", "9" * 999]
JSON = st.sampled_from(ODD) | st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=3),
    max_leaves=5,
)
QUICK = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
HF = {
    "model_type": "bert",
    "hidden_size": 64,
    "vocab_size": 300,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def places(node, so_far=()):
    """All places in nested data."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*so_far, key)
        if isinstance(node[key], (dict, list)):
            yield from places(node[key], (*so_far, key))


def changed(node, place, value):
    node = copy.deepcopy(node)
    inner = node
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return node


def with_text_model():
    text = {"hf_model_name": "x", "hf_config": HF, "context_length": 16}
    decoder = {"width": 64, "heads": 4, "layers": 1, "context_length": 16}
    return raw_config("coca_tiny", embed_dim=64, text_cfg=text, multimodal_cfg=decoder)


@QUICK
@given(st.data())
def test_any_value_anywhere_in_a_config_is_a_model_or_a_sentence(tmp_path, data):
    models = [raw_config("coca_tiny"), raw_config("clip_tiny"), with_text_model()]
    raw = data.draw(st.sampled_from(models))
    place = data.draw(st.sampled_from(list(places(raw))))
    raw = changed(raw, place, data.draw(JSON))
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": raw}))
    with pytest.raises(UserError):  # there are no weights beside it
        read_folder(tmp_path)
    try:
        config = parse_model_config(raw, "x")
        if place[-1] not in ("layers", "num_hidden_layers"):  # hundreds take seconds
            with torch.device("meta"):
                CoCa(config)
    except UserError as error:
        assert str(error)


@QUICK
@given(JSON | st.binary(max_size=40) | st.sampled_from(["[" * 100_000, '{"a":' * 100_000]))
def test_whatever_is_no_config_is_a_sentence(tmp_path, content):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    data = content.encode() if isinstance(content, str) and len(content) > 99 else data
    for name in (CONFIG_FILE, OWN_CONFIG_FILE, "config.json"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=OWN_CONFIG_FILE):
        read_folder(tmp_path)
    text = {"hf_model_name": str(tmp_path), "context_length": 16}
    with pytest.raises(UserError):
        parse_model_config(raw_config("clip_tiny", text_cfg=text), "x")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("vision_cfg", "layers"), 10**9),
        (("text_cfg", "layers"), 513),
        (("multimodal_cfg", "layers"), 10**7),
        (("vision_cfg", "width"), 2**40),
        (("vision_cfg", "image_size"), 10**9),
        (("vision_cfg", "mlp_ratio"), 1e300),
        (("text_cfg", "mlp_ratio"), float("inf")),
        (("text_cfg", "context_length"), 10**9),
        (("text_cfg", "vocab_size"), 10**12),
        (("text_cfg", "pad_id"), 1024),
        (("embed_dim",), 2**62),
        (("vision_cfg", "attn_pooler_heads"), 7),
    ],
)
def test_sizes_that_nobody_builds(place, value):
    with pytest.raises(UserError, match=place[-1] if place[-1] != "attn_pooler_heads" else "heads"):
        parse_model_config(changed(raw_config("coca_tiny"), place, value), "x")


def test_a_picture_has_so_many_patches():
    raw = raw_config("coca_tiny", vision_cfg__image_size=8192, vision_cfg__patch_size=1)
    with pytest.raises(UserError, match="more than 65536 of them"):
        parse_model_config(raw, "x")


def test_a_config_larger_than_its_weights_takes_no_memory():
    """10^13 weights by the config, of which the file has none: as many layers as may be."""
    weights = weights_of(CoCa(load_model_config("coca_tiny")))
    text = {"hf_model_name": "x", "context_length": 16}
    text["hf_config"] = {**HF, "hidden_size": 65536, "num_hidden_layers": 100}
    large = [
        raw_config("coca_tiny", vision_cfg__width=65536, vision_cfg__layers=100),
        raw_config("clip_tiny", text_cfg=text),
    ]
    for raw in large:
        with pytest.raises(UserError, match="another architecture"):
            load_coca(parse_model_config(raw, "x"), LogitScale(), weights)


def test_only_sizes_are_taken_of_a_text_model(tmp_path):
    """Not what fetches and runs code, nor how weights are loaded."""
    more = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "evil/kernel"}
    more |= {"_attn_implementation": "evil/kernel", "dtype": "float16", "quantization_config": {}}
    (tmp_path / "config.json").write_text(json.dumps({**HF, **more}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    text = {"hf_model_name": str(tmp_path), "context_length": 16}
    config = parse_model_config(raw_config("clip_tiny", text_cfg=text), "x")
    assert config.text_cfg.hf_config == HF
    assert {p.dtype for p in CoCa(config).parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(load_model_config("coca_tiny")).save(folder)
    return folder


@QUICK
@given(st.data())
def test_any_value_anywhere_in_a_tokenizer_is_a_tokenizer_or_a_sentence(
    tokenizer_folder, tmp_path, data
):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / name).read_text())
    few = [place for place in places(raw) if place[:2] != ("model", "vocab") and len(place) < 5]
    few = [place for place in few if place[:2] != ("model", "merges") or len(place) == 2]
    place = data.draw(st.sampled_from(few))
    (tmp_path / name).write_text(json.dumps(changed(raw, place, data.draw(JSON))))
    config = load_model_config("coca_tiny")
    try:
        tokenizer = make_tokenizer(config, tmp_path)
        ids = prompt_ids(tokenizer, "a red circle")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert max(ids) < config.text_cfg.vocab_size


@pytest.mark.parametrize("content", ["", "{}", "\0\0", "[" * 200_000, "[1]", '{"version": 1e999}'])
def test_whatever_is_no_tokenizer_is_a_sentence(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        make_tokenizer(load_model_config("coca_tiny"), tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("digits", [5, 9, 10, 5000])
def test_no_prefix_of_clips_tokenizer_is_that_long(digits):
    raw = raw_config("coca_tiny", text_cfg__hf_tokenizer_name="coca-scale/clip-bpe-" + "9" * digits)
    with pytest.raises(UserError):
        make_tokenizer(parse_model_config(raw, "x"))


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(tmp_path):
    """transformers asks on the terminal where nobody says no."""
    folder = tmp_path / "evil"
    folder.mkdir()
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    config = {"tokenizer_class": "Evil", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Tokenizer: pass\n")
    code = (
        "import sys\n"
        "from coca_scale.data.tokens import make_tokenizer\n"
        "from coca_scale.errors import UserError\n"
        "from coca_scale.model.config import parse_model_config\n"
        "from tests.variants import raw_config\n"
        "raw = raw_config('coca_tiny', text_cfg__hf_tokenizer_name=sys.argv[1])\n"
        "try: make_tokenizer(parse_model_config(raw, 'x'))\n"
        "except UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    yes = subprocess.run(command, input="y\n", capture_output=True, text=True, check=True)
    assert "brings code of its own, which is never run" in yes.stdout
    assert "[y/N]" not in yes.stdout + yes.stderr
    assert not marker.exists()


def test_a_tokenizer_with_code_and_without_need_of_it_is_used(tmp_path):
    folder = hugging_face_folder(tmp_path)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    file.write_text(json.dumps(config))
    text = {"hf_model_name": str(folder), "context_length": 16}
    config = parse_model_config(raw_config("clip_tiny", text_cfg=text), "x")
    assert make_tokenizer(config)("a red circle").shape == (1, 16)
