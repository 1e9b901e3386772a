"""Fast decoding gives the picture that full decoding gives."""

from __future__ import annotations

import io
import itertools
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from coca_scale.data.images import TrainCrop, decode_image, train_pixels
from coca_scale.data.prefetch import Prefetcher
from coca_scale.data.sample import BadSample, DataError
from coca_scale.model.packing import pack_captions, real_lengths
from tests.data.loading import loader
from tests.data.shards import write_shards


def photo(size, **options):
    """Smooth colour with detail, as JPEG."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(512, 512), (1023, 517), (2000, 300), (230, 900), (100, 90)])
def test_reduced_decoding_crops_the_same_part(size):
    data = photo(size)
    crop = TrainCrop(64, 0.3)
    whole = decode_image(data, "k")
    for seed in range(5):
        fast = train_pixels(data, "k", crop, np.random.default_rng(seed)).int()
        slow = train_pixels(whole, "k", crop, np.random.default_rng(seed)).int()
        assert fast.shape == (3, 64, 64)
        assert (fast - slow).abs().float().mean() < 1.0  # of 255
        assert (fast - slow).abs().max() < 16


def test_decoding_is_never_below_the_size_of_the_crop(monkeypatch):
    scales = []
    draft = JpegImageFile.draft

    def spy(self, mode, size):
        before = self.size
        result = draft(self, mode, size)
        scales.append((before, self.size))
        return result

    monkeypatch.setattr(JpegImageFile, "draft", spy)
    train_pixels(photo((512, 512)), "k", TrainCrop(224, 0.9), np.random.default_rng(0))
    train_pixels(photo((440, 440)), "k", TrainCrop(224, 0.9), np.random.default_rng(0))
    train_pixels(photo((4000, 3000)), "k", TrainCrop(224, 0.9), np.random.default_rng(0))
    assert scales[0] == ((512, 512), (256, 256))
    assert scales[1] == ((440, 440), (440, 440))
    assert scales[2] == ((4000, 3000), (500, 375))


def test_grey_and_cmyk_jpegs_and_broken_ones():
    for mode in ("L", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (300, 300), 128 if mode == "L" else (0, 255, 255, 0)).save(buffer, "JPEG")
        crop = TrainCrop(32, 0.9)
        fast = train_pixels(buffer.getvalue(), "k", crop, np.random.default_rng(0))
        slow = train_pixels(
            decode_image(buffer.getvalue(), "k"), "k", crop, np.random.default_rng(0)
        )
        assert (fast.int() - slow.int()).abs().max() <= 1
    data = photo((600, 600))
    for cut in (100, len(data) // 2, len(data) - 400):
        for use in (decode_image, lambda d, k: train_pixels(d, k, crop, np.random.default_rng(0))):
            with pytest.raises(BadSample, match="broken_image"):
                use(data[:cut], "k")


def test_formats_that_start_programs_are_not_opened():
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30)).save(buffer, "EPS")
    with pytest.raises(BadSample, match="broken_image"):
        decode_image(buffer.getvalue(), "k")


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_prefetched_batches_reach_the_device_as_they_are(kind):
    train = "synthetic://shapes?count=144&size=32"
    batches = iter(loader(train, 0, 1, workers=2))
    device = torch.device(kind)
    with closing(Prefetcher(batches, partial(_lay_out, device=device), device)) as ahead:
        for expected in itertools.islice(loader(train, 0, 1), 15):
            batch = next(ahead)
            share, captions = batch.share, batch.captions
            assert share.images.device.type == captions[0].tokens_N.device.type == kind
            assert torch.equal(share.images.cpu(), expected.images)
            assert torch.equal(share.tokens, expected.tokens)
            assert (share.keys, share.lanes) == (expected.keys, expected.lanes)
            laid_out = _lay_out(expected.tokens)
            assert len(captions) == len(laid_out) == 2
            for found, wanted in zip(captions, laid_out, strict=True):
                assert torch.equal(found.tokens_N.cpu(), wanted.tokens_N)
                assert torch.equal(found.labels_K.cpu(), wanted.labels_K)
                assert found.text.longest == wanted.text.longest


def _lay_out(tokens, targets=None, device="cpu"):
    """In micro-batches of half a share."""
    lengths = real_lengths(tokens, 0)
    return [
        pack_captions(part, rows, rows - 1, None, None, 0).to(torch.device(device))
        for part, rows in zip(tokens.chunk(2), lengths.chunk(2), strict=True)
    ]


def test_what_a_loader_raises_arrives_behind_the_prefetch(tmp_path):
    train = write_shards(tmp_path, [3])
    (tmp_path / "000.tar").write_bytes(b"")
    batches = iter(loader(train, 0, 1, lanes=1))
    ahead = Prefetcher(batches, _lay_out, torch.device("cpu"))
    with closing(ahead), pytest.raises(DataError, match="1 × empty_shard"):
        next(ahead)
