"""Annotation files of others: an entry that is wrong costs itself alone."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coca_scale.data.listing import ListOptions, PictureFiles, list_pictures
from coca_scale.data.sample import BadSample, DataError
from coca_scale.errors import UserError

many = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
IMAGES = [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)]
CAPTIONS = [{"image_id": n, "caption": f"caption {n}"} for n in range(3)]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


def listed(tmp_path, content, captions_needed=True, **options):
    path = tmp_path / "list.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return list_pictures(path, ListOptions(images=tmp_path, **options), captions_needed)


def named(listing):
    return {picture.path.name: list(picture.captions) for picture in listing.pictures}


def causes(listing):
    return dict(Counter(skipped.cause for skipped in listing.skipped))


@pytest.mark.parametrize(
    ("images", "annotations", "expected"),
    [
        ([], [{"image_id": 0, "caption": None}], {"missing_caption": 1}),
        ([], [{"image_id": 0, "caption": 7}], {"broken_entry": 1}),
        ([], [{"image_id": 0, "bbox": [0, 0, 1, 1], "category_id": 1}], {"missing_caption": 1}),
        ([], [{"image_id": 9, "caption": "orphan"}], {"missing_image": 1}),
        ([], [{"image_id": [0], "caption": "a"}, None, 3, "x", []], {"broken_entry": 5}),
        ([{"id": 3, "file_name": None}, {"id": 4}, None, []], [], {"broken_entry": 4}),
        ([{"id": 3, "file_name": ""}, {"id": True, "file_name": "a.jpg"}], [], {"broken_entry": 2}),
        ([{"id": 3, "file_name": "/etc/passwd"}], [], {"unsafe_name": 1}),
        ([{"id": 3, "file_name": "a/../../b.jpg"}], [], {"unsafe_name": 1}),
        ([{"id": 0, "file_name": "other.jpg"}], [], {"duplicate_key": 1}),
    ],
)
def test_a_bad_entry_of_coco_costs_itself_alone(tmp_path, images, annotations, expected):
    content = {"images": IMAGES + images, "annotations": annotations + CAPTIONS}
    listing = listed(tmp_path, content)
    assert named(listing) == {f"{n}.jpg": [f"caption {n}"] for n in range(3)}
    assert causes(listing) == expected
    text = f"\ufeff{json.dumps(content)}"
    assert causes(listed(tmp_path, text.encode("utf-16-le"))) == expected


def test_ids_that_changed_their_type_still_meet(tmp_path):
    captions = [
        {"image_id": "0", "caption": "a"},
        {"image_id": 1.0, "caption": "b"},
        {"image_id": 2, "caption": "c"},
    ]
    assert named(listed(tmp_path, {"images": IMAGES, "annotations": captions})) == {
        "0.jpg": ["a"],
        "1.jpg": ["b"],
        "2.jpg": ["c"],
    }


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"filename": "a.jpg", "sentences": [{"raw": None}, {"raw": "x"}]}, {"missing_caption": 1}),
        ({"filename": "a.jpg", "sentences": [{"raw": 3}, 4, {"raw": "x"}]}, {"broken_entry": 2}),
        ({"filename": "a.jpg", "sentences": {"raw": "x"}}, {"broken_entry": 1}),
        ({"filename": 3, "sentences": []}, {"broken_entry": 1}),
        ({"filename": "a.jpg", "filepath": "../..", "sentences": []}, {"unsafe_name": 1}),
        ({"filename": "/a.jpg", "filepath": "val", "sentences": []}, {"unsafe_name": 1}),
        ({"filename": "a.jpg"}, {}),
        (None, {"broken_entry": 1}),
    ],
)
def test_a_bad_entry_of_karpathy_costs_itself_alone(tmp_path, image, expected):
    good = {"filename": "g.jpg", "filepath": "val", "split": "test", "sentences": [{"raw": "good"}]}
    listing = listed(tmp_path, {"images": [image, good]})
    assert named(listing)["g.jpg"] == ["good"]
    assert causes(listing) == expected


def test_pictures_need_no_captions_to_be_captioned(tmp_path):
    only = {"images": IMAGES, "categories": []}
    half = {"images": IMAGES, "annotations": [{"image_id": 1, "caption": None}, CAPTIONS[2]]}
    for content in (only, half):
        listing = listed(tmp_path, content, captions_needed=False)
        assert sorted(named(listing)) == ["0.jpg", "1.jpg", "2.jpg"]
        assert not listing.skipped
    with pytest.raises(DataError, match="3 pictures and no captions, which are needed"):
        listed(tmp_path, only)
    listing = listed(tmp_path, half)
    assert named(listing) == {"2.jpg": ["caption 2"], "0.jpg": []}
    assert causes(listing) == {"missing_caption": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"null",
        b'"annotations"',
        b"[]",
        b"{}",
        b'{"images": {"a": 1}}',
        b"\xff",
        b"",
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path, content):
    with pytest.raises(UserError, match=r"list\.json: "):
        listed(tmp_path, content)
    with (tmp_path / "giant.json").open("wb") as giant:
        giant.truncate(2**40)
    with pytest.raises(DataError, match="over 2 GiB"):
        list_pictures(tmp_path / "giant.json", ListOptions(images=tmp_path))
    with pytest.raises(UserError, match="neither COCO's"):
        listed(tmp_path, {"images": IMAGES, "annotations": {"0": "a"}})


@many
@given(content=json_values | st.binary(max_size=30))
def test_no_json_is_more_than_a_users_error(tmp_path, content):
    for whole in (content, {"images": content}, {"images": IMAGES, "annotations": content}):
        if isinstance(whole, bytes) or not isinstance(content, bytes):
            try:
                listed(tmp_path, whole)
            except UserError as error:
                assert "list.json" in str(error)


@many
@given(junk=st.lists(json_values, max_size=4), place=st.integers(0, 3))
def test_good_entries_come_back_whatever_lies_between_them(tmp_path, junk, place):
    captions = [*CAPTIONS[:place], *junk, *CAPTIONS[place:]]
    images = [*IMAGES[:place], *junk, *IMAGES[place:]]
    listing = listed(tmp_path, {"images": images, "annotations": captions})
    assert named(listing) == {f"{n}.jpg": [f"caption {n}"] for n in range(3)}
    assert len(listing.skipped) == 2 * len(junk)


def test_what_was_left_out_is_counted_by_whoever_reads_a_list(tmp_path):
    listing = listed(tmp_path, {"images": [*IMAGES, None], "annotations": CAPTIONS})
    files = PictureFiles(listing)
    assert len(files) == 4
    with pytest.raises(BadSample, match="broken_entry"):
        files[3]
