"""Captions from outside, whoever wrote them: clean lines before anything else sees them."""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from coca_scale.data.inspection import inspect_shards
from coca_scale.data.listing import ListOptions, PictureFiles, list_pictures
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, DataError, RawSample
from coca_scale.data.sources import open_source
from coca_scale.data.tokens import make_tokenizer
from coca_scale.evaluation.pictures import open_pictures, read_pictures
from coca_scale.evaluation.zeroshot import class_folders, make_classes
from coca_scale.model import load_model_config
from coca_scale.recipe.data import DataFilters
from tests.conftest import tiny_recipe
from tests.data.shards import encoded
from tests.invoke import output_of
from tests.json_lines import lines_of

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
ESCAPES = "\ud800 a red \x1b[31mcat\x1b[0m\x1b]0;owned\x07\x00\u2028 on\ta\x9b mat "
DATA = tiny_recipe().data
RULES = SampleRules({}, DataFilters())
MODEL = load_model_config("coca_tiny")
TOKENIZER = make_tokenizer(MODEL)
PICTURE = encoded()


def from_json_in_a_shard(text: str, _: Path) -> RawSample:
    return RULES.sample("k", {"jpg": PICTURE, "json": json.dumps({"caption": text}).encode()}, "")


def from_txt_in_a_shard(text: str, _: Path) -> RawSample:
    return RULES.sample("k", {"jpg": PICTURE, "txt": text.encode("utf-8", "replace")}, "")


def from_an_annotation_file(text: str, folder: Path) -> RawSample:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "caption": text}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    listed = list_pictures(folder / "coco.json", ListOptions(images=folder))
    return PictureFiles(listed)[0]


def from_a_side_car(text: str, folder: Path) -> RawSample:
    (folder / "a.txt").write_bytes(text.encode("utf-8", "replace"))
    return PictureFiles(list_pictures(folder, ListOptions()))[0]


def from_a_table(text: str, folder: Path) -> RawSample:
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        safe = text.encode("utf-8", "replace").decode()
        rows.writerows([["filepath", "title"], ["a.jpg", safe]])
    [found] = open_source(str(folder / "t.csv"), DATA, 0).ordered(0, 1)
    if isinstance(found, BadSample):
        raise found
    return found


READERS = (
    from_json_in_a_shard,
    from_txt_in_a_shard,
    from_an_annotation_file,
    from_a_side_car,
    from_a_table,
)


def assert_harmless(text: str) -> None:
    """It can be written, steers no terminal, and stays in its line."""
    text.encode()
    assert not any(c < " " or "\x7f" <= c < "\xa0" for c in text)
    assert len(text.splitlines()) == 1
    assert text == text.strip() != ""


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_whatever_a_reader_finds_is_clean_or_a_bad_sample(read, text):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jpg").write_bytes(PICTURE)
        try:
            sample = read(text, Path(folder))
        except (BadSample, DataError):
            return
    for caption, _ in sample.captions:
        assert_harmless(caption)
        TOKENIZER([caption])


@pytest.mark.parametrize("read", [from_json_in_a_shard, from_an_annotation_file])
def test_what_is_said_stays(read, tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    assert read(ESCAPES, tmp_path).caption == "\ufffd a red cat   on a  mat"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x00\x07", " \u2028\t", "\x1b]0;title\x07 "])
def test_a_caption_of_controls_alone_is_empty(text, tmp_path):
    with pytest.raises(BadSample, match="empty_caption"):
        from_json_in_a_shard(text, tmp_path)


@pytest.mark.parametrize("kind", ["txt", "json"])
@pytest.mark.parametrize(
    ("encoding", "is_text"),
    [("utf-8-sig", True), ("utf-16", True), ("utf-16-le", False), ("cp1252", False)],
)
def test_text_of_shards_is_unicode_in_any_of_its_forms(kind, encoding, is_text):
    words = "a café"
    text = words if kind == "txt" else json.dumps({"caption": words}, ensure_ascii=False)
    files = {"jpg": PICTURE, kind: text.encode(encoding)}
    if is_text:
        assert RULES.sample("k", files, "").caption == words
    else:
        with pytest.raises(BadSample, match="caption_not_utf8"):
            RULES.sample("k", files, "")


def test_a_caption_that_would_take_for_ever_is_cut_in_every_reader(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    for read in READERS:
        assert len(read("x" * 50_000, tmp_path).caption) == 4096


@pytest.mark.parametrize("weights", [{}, {"caption": 1.0}])
def test_of_half_a_million_captions_a_thousand_are_kept(weights):
    many = ["a"] * 500_000
    files = {"txt": "\n".join(many).encode(), "json": json.dumps({"caption": many}).encode()}
    sample = SampleRules(weights, DataFilters()).sample("k", {"jpg": PICTURE, **files}, "")
    assert len(sample.captions) == 1000


@pytest.mark.parametrize("broken", [{"txt": b"caf\xe9"}, {"json": b"{"}, {"json": b"\xff"}, {}])
def test_a_picture_to_be_captioned_needs_no_captions_of_its_own(broken, tmp_path):
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "a", "jpg": PICTURE, **broken})
    [found] = read_pictures(open_pictures([str(tmp_path)], DATA, ListOptions()), MODEL, Counter())
    assert (found.key, found.captions) == ("a", ())
    bad = Counter()
    needed = open_pictures([str(tmp_path)], DATA, ListOptions(), captions_needed=True)
    assert not list(read_pictures(needed, MODEL, bad))
    assert set(bad) < {"caption_not_utf8", "broken_json", "missing_caption"}


def test_names_of_files_that_are_no_text_can_be_written(tmp_path):
    name = b"caf\xe9\x1b[2J.jpg".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(PICTURE)
    sample = PictureFiles(list_pictures(tmp_path, ListOptions(), captions_needed=False))[0]
    assert sample.key == str(tmp_path / "caf\\udce9\\x1b[2J.jpg")


def test_classes_and_templates_are_clean(tmp_path):
    for name in (b"n\xe9e", b"a\x1b[2J_dog"):
        folder = tmp_path / name.decode("utf-8", "surrogateescape")
        folder.mkdir()
        (folder / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "templates.txt").write_bytes("\ufeffa \x1b[1mphoto of {}\r\n\r\n".encode())
    names, _ = class_folders(tmp_path)
    prompts = make_classes(None, str(tmp_path / "templates.txt"), names).prompts()
    assert prompts == ["a photo of a dog", "a photo of n\ufffde"]
    assert TOKENIZER(prompts).shape == (2, 16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 1023), max_size=14))
def test_whatever_a_model_writes_is_a_clean_line(ids):
    text = TOKENIZER.decode([TOKENIZER.start_id, *ids])
    if text:
        assert_harmless(text)


CAPTIONS = ("one red circle", "a dot", "café \u3000 bar", "a drawing of it", "words")


def sources_of(folder: Path) -> dict[str, list[str]]:
    """Four pictures with all captions, in every form that we read; options to read them with."""
    samples = []
    for name in "abcd":
        texts = [f"{text} {name}" for text in CAPTIONS]
        samples.append((name, encoded(size=(16, 16)), texts))
    (folder / "side_cars").mkdir(parents=True)
    with TarWriter(str(folder / "lines.tar")) as writer:
        for name, picture, texts in samples:
            content = "\n".join(texts).encode()
            (folder / "side_cars" / f"{name}.jpg").write_bytes(picture)
            (folder / "side_cars" / f"{name}.txt").write_bytes(content + b"\r\n\r\n")
            writer.write({"__key__": name, "jpg": picture, "txt": content})
    coco = {
        "images": [{"id": name, "file_name": f"{name}.jpg"} for name, _, _ in samples],
        "annotations": [
            {"image_id": name, "caption": text} for name, _, texts in samples for text in texts
        ],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    table = "".join(f"side_cars/{n}.jpg\t{text}\n" for n, _, texts in samples for text in texts)
    (folder / "table.tsv").write_text(f"filepath\ttitle\n{table}", encoding="utf-8")
    images = ["--images", str(folder / "side_cars")]
    options = {"side_cars": [], "coco.json": images, "table.tsv": []}
    for name, more in list(options.items()):
        packed = f"packed_{Path(name).stem}"
        output_of("data", "pack", folder / name, "--out", folder / packed, *more)
        options[packed] = []
    options["lines.tar"] = []
    return {str(folder / name): more for name, more in options.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return sources_of(tmp_path_factory.mktemp("sources"))


def test_every_form_of_the_same_pictures_has_the_same_captions(sources):
    expected = [[f"{text} {name}" for text in CAPTIONS] for name in "abcd"]
    for name, more in sources.items():
        options = ListOptions(images=Path(more[1]) if more else None)
        parts = open_pictures([name], DATA, options, captions_needed=True)
        found = [list(p.captions) for p in read_pictures(parts, MODEL, Counter())]
        assert found == expected, name


def test_the_verbs_find_the_same_in_every_form(trained, sources, tmp_path):
    found = []
    for name, more in sources.items():
        out = tmp_path / "scores.json"
        output_of("eval", "retrieval", trained.folder, name, *more, "--out", out)
        found.append({k: v for k, v in json.loads(out.read_text()).items() if k != "data"})
    assert found == [found[0]] * len(found)
    assert (found[0]["pictures"], found[0]["captions"]) == (4, 20)


def test_references_of_captions_are_all(trained, sources, tmp_path):
    name = next(name for name in sources if name.endswith("packed_coco"))
    out = tmp_path / "captions.jsonl"
    output_of("caption", trained.folder, name, "--out", out, "--method", "greedy")
    assert [line["references"] for line in lines_of(out)] == [
        [f"{text} {name}" for text in CAPTIONS] for name in "abcd"
    ]


def test_inspect_counts_all_captions(sources):
    for name in sources:
        if "packed" in name or name.endswith(".tar"):
            assert inspect_shards([name]).facts()["captions"] == 20, name


def test_training_draws_among_lines_and_takes_the_first_of_what_is_packed(sources):
    for name in sources:
        if name.endswith(".tar"):
            [sample, *_] = open_source(name, DATA, 0).ordered(0, 1)
            assert sample.captions == tuple((f"{text} a", 0.2) for text in CAPTIONS)
        elif "packed" in name:
            [sample, *_] = open_source(name, DATA, 0).ordered(0, 1)
            assert sample.captions == ((f"{CAPTIONS[0]} a", 1.0),)
            data = DATA.model_copy(update={"captions": {"captions": 1.0}})
            [sample, *_] = open_source(name, data, 0).ordered(0, 1)
            assert len(sample.captions) == len(CAPTIONS)


def test_the_first_line_alone_where_others_are_no_captions(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(PICTURE)
    (tmp_path / "in" / "a.txt").write_text("\nA goldfish.\naf.utf8=\u2019n Goudvis.\n")
    for name, more, count in (("all", [], 2), ("first", ["--first-line"], 1)):
        output_of("data", "pack", tmp_path / "in", "--out", tmp_path / name, *more)
        parts = open_pictures([str(tmp_path / name)], DATA, ListOptions())
        [picture] = read_pictures(parts, MODEL, Counter())
        assert picture.captions[0] == "A goldfish."
        assert len(picture.captions) == count


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ('{"captions": ["words", "more"]}', ["words", "more"]),
        ('{"captions": ["other", "words"]}', ["words"]),  # not ours: the .txt is not its first
        ('{"captions": {"words": 1}}', ["words"]),
        ('{"captions": [', ["words"]),
        ("[1]", ["words"]),
    ],
)
def test_what_others_call_captions_does_not_take_the_place_of_the_txt(fields, expected):
    rules = SampleRules({}, DataFilters(), every_caption=True)
    files = {"jpg": PICTURE, "txt": b" words\n", "json": fields.encode()}
    assert [text for text, _ in rules.sample("k", files, "").captions] == expected


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb\n\n", "a\rb", "\n a\n\t\nb", "a\u2028b"])
def test_lines_share_the_weight(text):
    rules = SampleRules({"txt": 3.0}, DataFilters())
    sample = rules.sample("k", {"jpg": PICTURE, "txt": text.encode()}, "")
    assert sample.captions == (("a", 1.5), ("b", 1.5))
