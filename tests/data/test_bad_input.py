"""Whatever is wrong with data costs one clear line or one counted skip."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset import TarWriter

from coca_scale.data.epoch_shards import expand_shards
from coca_scale.data.images import decode_image, eval_pixels
from coca_scale.data.manifest import shard_counts
from coca_scale.data.pack import PackOptions, pack
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, DataError
from coca_scale.data.shards import read_shard
from coca_scale.data.sources import open_source
from coca_scale.data.storage import StorageOptions
from coca_scale.data.tokens import ClipTokenizer, clip_bpe_prefix, make_tokenizer
from coca_scale.model import load_model_config
from tests.conftest import tiny_recipe
from tests.data.loading import loader
from tests.data.shards import encoded, write_shards

DATA = tiny_recipe().data
RULES = SampleRules({}, DATA.filters)
PICTURE = encoded()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing-*.tar", "matches nothing"),
        ("none.csv", "no such file"),
        ("synthetic://cubes", "cubes is not known"),
        ("synthetic://shapes?n=3", "n is not known"),
        ("synthetic://shapes?count=0", "count is at least 1"),
        (["a.tar", "b.csv"], "do not mix"),
    ],
)
def test_sources_that_name_nothing(spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec, DATA, 0)


def test_missing_shards_are_counted(tmp_path):
    write_shards(tmp_path, [2, 2])
    source = open_source(str(tmp_path / "{000..004}.tar"), DATA, 0)
    with pytest.raises(DataError, match=r"3 of 5 shards are missing, first: .*002\.tar"):
        source.check()


def test_braces_globs_and_lists_expand_in_order(tmp_path):
    write_shards(tmp_path, [1, 1, 1])
    for pattern in ("{000..002}.tar", "00[0-2].tar", ""):
        names = expand_shards(str(tmp_path / pattern), StorageOptions())
        assert [name[-7:] for name in names] == ["000.tar", "001.tar", "002.tar"]
    assert list(expand_shards("pipe:cat {1..2}.tar", StorageOptions())) == [
        "pipe:cat 1.tar",
        "pipe:cat 2.tar",
    ]


def test_table_without_its_columns(tmp_path):
    (tmp_path / "t.csv").write_text("image,text\na.jpg,word\n")
    with pytest.raises(DataError, match=r"no column 'filepath', found image, text"):
        open_source(str(tmp_path / "t.csv"), DATA, 0)
    (tmp_path / "e.csv").write_text("filepath,title\n")
    with pytest.raises(DataError, match="no rows"):
        open_source(str(tmp_path / "e.csv"), DATA, 0)


def test_bad_samples_are_skipped_and_counted_by_cause(tmp_path):
    good = encoded()
    samples = [
        {"jpg": good, "txt": "good one"},
        {"jpg": good[: len(good) // 2], "txt": "truncated"},
        {"jpg": b"no image", "txt": "not an image"},
        {"jpg": good, "txt": "   "},
        {"jpg": good, "txt": b"\xff\xfe\xff"},
        {"jpg": good},
        {"txt": "no picture"},
        {"png": encoded(size=(1, 1), form="PNG"), "txt": "one pixel"},
        {"jpg": good, "json": json.dumps({"caption": "from json"}).encode()},
    ]
    with TarWriter(str(tmp_path / "000.tar")) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:03d}", **sample})
    batch = next(iter(loader(str(tmp_path / "000.tar"), 0, 1, lanes=1)))
    assert set(batch.keys) == {"000", "008"}
    # 12 samples at 2 good ones an epoch
    bad = Counter(skipped.cause for skipped in batch.skipped)
    assert bad["broken_image"] == 2 * bad["empty_caption"] > 0
    assert set(bad) == {
        "broken_image",
        "empty_caption",
        "caption_not_utf8",
        "missing_caption",
        "missing_image",
        "tiny_image",
    }


def read_one(folder, name):
    """What a shard gives whose only sample is called `name`."""
    with tarfile.open(folder / "one.tar", "w") as tar:
        for extension, content in (("jpg", PICTURE), ("txt", b"words")):
            info = tarfile.TarInfo(f"{name}.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return list(read_shard(str(folder / "one.tar"), RULES, StorageOptions()))


SCRIPTS = (
    *("a\u00a0b", "a\u202fb", "a\u3000b", "\U0001f469\u200d\U0001f680", "a\u2028b", "\u200fעברית"),
    *("日本/写真", "ภาพ", "e\u0301", "\ue000", "\U000e0001", "a b", "~a", "-", "C:a", "…"),
)
ANY_NAME = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="./\\"), min_size=1
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_script_makes_a_name(name, tmp_path):
    [sample] = read_one(tmp_path, name)
    assert (sample.key, sample.caption) == (name, "words")


@settings(max_examples=100, deadline=None)
@given(name=ANY_NAME)
def test_any_characters_that_control_nothing_make_a_name(name, tmp_path_factory):
    [sample] = read_one(tmp_path_factory.getbasetemp(), name)
    assert sample.key == name


@pytest.mark.parametrize(
    "name",
    ["/a", "\\a", "../a", "a/../b", "a\\..\\b", "a\nb", "\x1b[2Ja", "a\x7f", "a\x85b", "a\tb"],
)
def test_names_that_leave_the_folder_or_steer_a_terminal_are_unsafe(name, tmp_path):
    [bad] = read_one(tmp_path, name)
    assert bad.cause == "unsafe_name"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["shards", "name", "samples", "0.tar"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(content=JSON | st.binary(max_size=20), name=st.sampled_from(["manifest.json", "sizes.json"]))
def test_sizes_of_shards_are_counts_or_one_sentence(content, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(text)
    try:
        counts = shard_counts([str(folder / "0.tar")], StorageOptions())
    except DataError as error:
        assert str(error).startswith(f"{folder / name}: not a list of shards and their sizes (")
    else:
        assert counts is None or 0 <= counts[0] <= 2**40


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        *(("null", "found None"), ("-1", "greater than or equal to 0"), ("1e300", "integer")),
        *(("1e999", "finite"), ("2.5", "fractional"), ("true", "number"), ("[1]", "integer")),
        *(("9" * 5000, "4300"), ("9" * 400, "less than or equal to"), ("{}", "integer")),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "sizes.json"])
def test_a_count_that_is_none_is_named(samples, reason, name, tmp_path):
    entry = f'{{"name": "0.tar", "samples": {samples}}}'
    whole = f'{{"shards": [{entry}]}}' if name == "manifest.json" else f'{{"0.tar": {samples}}}'
    (tmp_path / name).write_text(whole)
    with pytest.raises(DataError, match=f"sizes .*{reason}.*--write-manifest"):
        shard_counts([str(tmp_path / "0.tar")], StorageOptions())


def test_truncated_and_vanished_shards_end_early_but_do_not_stop(tmp_path):
    write_shards(tmp_path, [6])
    path = tmp_path / "000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    found = list(read_shard(str(path), RULES, StorageOptions()))
    assert isinstance(found[-1], BadSample)
    assert found[-1].cause == "truncated_shard"
    assert 0 < len(found) - 1 < 6
    gone = list(read_shard(str(tmp_path / "gone.tar"), RULES, StorageOptions()))
    assert [bad.cause for bad in gone] == ["missing_shard"]


def test_data_without_a_usable_sample_is_an_error_not_a_hang(tmp_path):
    with TarWriter(str(tmp_path / "000.tar")) as writer:
        writer.write({"__key__": "a", "jpg": b"x", "txt": "broken"})
    with pytest.raises(DataError, match=r"no usable sample \(found 1 × broken_image"):
        next(iter(loader(str(tmp_path / "000.tar"), 0, 1, lanes=1)))


@pytest.mark.parametrize(
    ("mode", "colour", "form", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), "PNG", (255, 255, 255)),  # transparent: white, not hidden red
        ("RGBA", (255, 0, 0, 255), "PNG", (255, 0, 0)),
        ("LA", (0, 0), "PNG", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("L", 80, "PNG", (80, 80, 80)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("P", 0, "PNG", (0, 0, 0)),
    ],
)
def test_every_colour_mode_becomes_rgb(mode, colour, form, expected):
    image = decode_image(encoded(colour, mode, form=form), "k")
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == expected


def test_16_bit_grey_keeps_its_range():
    values = np.full((8, 8), 257 * 100, dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "k").getpixel((0, 0)) == (100, 100, 100)
    assert decode_image(Image.new("I", (4, 4), 200), "k").getpixel((0, 0)) == (200, 200, 200)


def test_huge_images_are_refused_before_they_are_decoded():
    with pytest.raises(BadSample, match="huge_image"):
        decode_image(encoded(0, "1", (12000, 12000), "PNG"), "k")


def test_eval_pixels_equal_open_clip():
    from open_clip import image_transform

    image = Image.effect_noise((90, 61), 60).convert("RGB")
    theirs = image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert torch.equal((theirs * 255).round().byte(), eval_pixels(image, 48))


def test_long_captions_are_cut_and_keep_their_end():
    tokenizer = make_tokenizer(load_model_config("coca_tiny"))
    row = tokenizer(["word " * 40])[0]
    assert row.shape == (16,)
    assert row[-1] == tokenizer.end_id
    clip = ClipTokenizer(10)(["word " * 40])[0]
    assert clip[-1] == 49407


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60) | st.just("a " * 14))
def test_captions_that_do_not_fit_the_context_are_known(caption):
    config = load_model_config("coca_tiny")
    longer = make_tokenizer(config.resized(context_length=400))
    for short, long in (
        (make_tokenizer(config), longer),
        (ClipTokenizer(16), ClipTokenizer(400)),
    ):
        tokens = int((long([caption]) != long.pad_id).sum())
        assert short.cuts(caption) == (tokens > 16)


def test_prefix_tokenizer_equals_open_clip_in_both_of_its_forms(tmp_path):
    import open_clip

    config = load_model_config("coca_tiny").resized(context_length=40)
    captions = ["A small RED circle", "it's 12 cafés, 日本!!", "", "word " * 40]
    ours = make_tokenizer(config)
    ours.save(tmp_path)
    content = {"model_cfg": config.to_dict()}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(captions), ours(captions))
    whole = clip_bpe_prefix(49409)  # all merges: the very tokens of CLIP, at other ids
    clip = open_clip.SimpleTokenizer(context_length=77)
    for caption in captions[:2]:
        expected = [clip.decoder[i] for i in clip([caption])[0].tolist() if i]
        assert whole.encode(caption).tokens == expected
        assert (
            ours.decode(ours([caption])[0].tolist())
            == clip.decode(clip([caption])[0].tolist())
            .split("<end_of_text>")[0]
            .replace("<start_of_text>", "")
            .strip()
        )


def test_pack_folder_table_and_coco(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b", "c"):
        (pictures / f"{name}.jpg").write_bytes(encoded(size=(64, 32)))
        (pictures / f"{name}.txt").write_text(f"caption {name}\nsecond line\n")
    (pictures / "d.png").write_bytes(b"broken")
    (pictures / "d.txt").write_text("broken")
    (tmp_path / "t.csv").write_text(
        "filepath,title\npictures/a.jpg,caption a\npictures/b.jpg,caption b\n"
        "pictures/c.jpg,caption c\npictures/gone.jpg,caption\n"
    )
    coco = {
        "images": [{"id": i, "file_name": f"{n}.jpg"} for i, n in enumerate("abc")],
        "annotations": [{"image_id": i, "caption": f"caption {n}"} for i, n in enumerate("abc")],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    for number, source in enumerate((pictures, tmp_path / "t.csv", tmp_path / "c.json")):
        out = tmp_path / f"out{number}"
        options = PackOptions(images=pictures, shard_samples=2, max_side=16)
        result = pack(source, out, options)
        assert (result.samples, result.shards) == (3, 2)
        opened = open_source(str(out / "*.tar"), DATA, 0)
        assert opened.count() == 3
        samples = list(opened.ordered(0, 1))
        assert [s.caption for s in samples] == ["caption a", "caption b", "caption c"]
        assert decode_image(samples[0].image, "k").size == (16, 8)
    with pytest.raises(DataError, match="holds packed shards already"):
        pack(pictures, tmp_path / "out0", PackOptions())
    with pytest.raises(DataError, match="--images DIR"):
        pack(tmp_path / "c.json", tmp_path / "new", PackOptions())
