"""A caption to match and a caption to write: what is drawn, and that it is of the sample alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from coca_scale.data.images import TrainCrop
from coca_scale.data.lengths import balanced_order
from coca_scale.data.loader import Draws, TrainLoader, decode_sample
from coca_scale.data.rules import SampleRules, sentences_of
from coca_scale.data.sample import BadSample, DataError, RawSample
from coca_scale.data.sources import open_source
from coca_scale.model import load_model_config
from coca_scale.recipe import load_recipe, recipe_from_dict
from coca_scale.recipe.data import DataFilters
from coca_scale.training.validation import HeldPictures, ToWrite
from tests.conftest import tiny_recipe
from tests.data.loading import Echo, loader
from tests.data.shards import encoded

LONG = "A red cat. It sleeps on version 3.5 of a mat! Is it old? yes"
FILES = {"jpg": encoded(), "txt": b"a cat", "json": json.dumps({"long": LONG}).encode()}
TWO = {"data__contrastive_captions": {"txt": 1.0}, "data__caption_captions": {"long": 1.0}}
SENTENCES = {"txt": 0.5, "long:sentences": 0.5}


def sample_of(files=FILES, **data):
    captions, targets = tiny_recipe(**data).data.caption_weights
    return SampleRules(captions, DataFilters(), targets=targets).sample("k", files, "s.tar")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (LONG, ["A red cat.", "It sleeps on version 3.5 of a mat!", "Is it old?", "yes"]),
        ("no end", ["no end"]),
        ("one.\ntwo?!  three...\n", ["one.", "two?!", "three..."]),
        ("", [""]),
    ],
)
def test_sentences_end_where_a_space_follows(text, sentences):
    assert sentences_of(text) == sentences


def test_each_loss_has_captions_of_its_own():
    assert sample_of().targets is None
    two = sample_of(**TWO)
    assert (two.captions, two.targets) == ((("a cat", 1.0),), ((LONG, 1.0),))
    one = sample_of(data__captions={"long": 1.0}, data__contrastive_captions={"txt": 1.0})
    assert one == two
    both = sample_of(data__contrastive_captions=SENTENCES)
    assert both.targets == (("a cat", 1.0),)
    assert dict(both.captions) == {"a cat": 0.5, **dict.fromkeys(sentences_of(LONG), 0.125)}
    for files, cause in (({"json": b"{}"}, "missing"), ({"json": b'{"long": " "}'}, "empty")):
        with pytest.raises(BadSample, match=f"{cause}_caption"):
            sample_of({**FILES, **files}, **TWO)


def test_captions_are_drawn_apart():
    sample = RawSample("k", encoded(), (("a", 1.0), ("b", 3.0)), targets=(("a", 1.0), ("c", 1.0)))
    rng, crop = np.random.default_rng(0), TrainCrop(8, 1.0)
    draws = Draws(parallel=0.25)
    found = [decode_sample(sample, Echo(), crop, rng, draws) for _ in range(4000)]
    shares = Counter((found.tokens, found.target, found.parallel) for found in found)
    expected = {
        (first, second, parallel): one * 0.5 * share
        for first, one in (("a", 0.25), ("b", 0.75))
        for second in ("a", "c")
        for parallel, share in ((True, 0.25), (False, 0.75))
    }
    assert {key: n / 4000 for key, n in shares.items()} == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "tokens", "target"),
    [
        ({}, "a cat", LONG),
        ({"loss__contrastive_weight": 0.0}, LONG, None),
        ({"loss__caption_weight": 0.0, "loss__caption_parallel": 1.0}, "a cat", None),
    ],
)
def test_a_loss_without_weight_has_no_caption(weights, tokens, target):
    draws, rng = Draws.of(tiny_recipe(**weights)), np.random.default_rng(0)
    found = decode_sample(sample_of(**TWO), Echo(), TrainCrop(8, 1.0), rng, draws)
    assert (found.tokens, found.target) == (tokens, target)
    assert not found.parallel


DRAWINGS = "synthetic://shapes?count=144&size=32"
DRAWN = {
    "data__contrastive_captions": SENTENCES,
    "data__caption_captions": {"long": 0.5, "txt": 0.5},
    "loss__caption_parallel": 0.3,
}


def batches(count, ranks=1, **changes):
    """All ranks' batches of every step: tokens, what is written, which of it in parallel."""
    streams = [iter(loader(DRAWINGS, rank, ranks, **changes)) for rank in range(ranks)]
    steps = []
    for _ in range(count):
        found = [next(stream) for stream in streams]
        parts = [(b.images, b.tokens, b.targets.tokens_BT, b.targets.parallel_B) for b in found]
        steps.append([torch.cat(part) for part in zip(*parts, strict=True)])
    states = {lane: at for batch in found for lane, at in batch.lanes.items()}
    return steps, [list(states[lane]) for lane in sorted(states)]


def test_what_is_drawn_is_of_the_sample_alone():
    whole, _ = batches(9, **DRAWN)
    first, states = batches(4, ranks=2, workers=2, **DRAWN)
    rest, _ = batches(5, ranks=4, saved=states, **DRAWN)
    for found, expected in zip(first + rest, whole, strict=True):
        assert all(map(torch.equal, found, expected))
    tokens, written, parallel = (torch.cat([step[part] for step in whole]) for part in (1, 2, 3))
    assert 0.15 < parallel.double().mean() < 0.45
    assert 0.1 < (tokens != written).any(1).double().mean() < 0.9
    # in every epoch anew
    assert len({tuple(step[3].tolist()) for step in batches(36, **DRAWN)[0]}) > 30


def test_pictures_and_captions_to_match_are_those_of_one_caption():
    """Drawn before what is new, from the same numbers."""
    apart = dict(itertools.islice(DRAWN.items(), 2))
    one = iter(loader(DRAWINGS, 0, 1, data__captions=SENTENCES))
    two = iter(loader(DRAWINGS, 0, 1, **apart))
    for first, second in itertools.islice(zip(one, two, strict=False), 4):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.tokens, second.tokens)
        assert first.targets is None
        assert second.targets.parallel_B is None


def test_a_share_is_arranged_by_what_both_losses_read():
    dataset = loader(DRAWINGS, 0, 1, **DRAWN)._loader.dataset
    plain, seen = next(iter(TrainLoader(dataset, 0))), []

    def arrange(lengths):
        seen.append(lengths)
        return balanced_order(lengths, 3)

    found = next(iter(TrainLoader(dataset, 0, arrange)))
    order = found.share_indices
    assert torch.equal(found.tokens, plain.tokens[order])
    assert torch.equal(found.targets.tokens_BT, plain.targets.tokens_BT[order])
    assert torch.equal(found.targets.parallel_B, plain.targets.parallel_B[order])
    rows = zip(plain.tokens, plain.targets.tokens_BT, plain.targets.parallel_B, strict=True)
    lengths = [int((t != 0).sum() + (p or not t.equal(w)) * (w != 0).sum()) for t, w, p in rows]
    assert seen[0].tolist() == lengths


def test_validation_matches_the_one_and_scores_the_other():
    config = load_model_config("coca_tiny")
    data = tiny_recipe(data__train=DRAWINGS, **TWO).data
    pictures = HeldPictures(open_source(data.train, data, 0), 5)
    found = list(pictures.entries(config, 0, 1, True))
    to_write = list(ToWrite(pictures).entries(config, 0, 1, True))
    assert len(found) == len(to_write) == ToWrite(pictures).count == 5
    for picture, other in zip(found, to_write, strict=True):
        assert picture.targets == other.captions
        assert other.captions[0].startswith(f"{picture.captions[0]}. it is at the ")
        assert picture.pixels is other.pixels


def test_where_there_is_one_text_two_cannot_be_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("filepath,title\na.jpg,words\n")
    for train, message in (
        (DRAWINGS, "drawings have the captions txt and long, not 'recaption'"),
        (str(tmp_path / "t.csv"), "a table has one column of captions"),
    ):
        data = tiny_recipe(data__train=train, data__caption_captions={"recaption": 1.0}).data
        with pytest.raises(DataError, match=message):
            open_source(data.train, data, 0)


def test_names_of_sentences_are_written_as_they_are(tmp_path):
    recipe = tiny_recipe(data__contrastive_captions={"long:sentences": 1.0}).model_dump()
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    for text in ("{long:sentences: 0.5, txt: 0.5}", "{'long:sentences': 0.5, txt: 0.5}"):
        found = load_recipe(tmp_path / "r.yaml", [f"data.contrastive_captions={text}"])
        assert found.data.contrastive_captions == {"long:sentences": 0.5, "txt": 0.5}
    assert recipe_from_dict(recipe).data.contrastive_captions == {"long:sentences": 1.0}
