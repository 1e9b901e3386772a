"""Pictures as phones, cameras, scanners and attackers make them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from coca_scale.data.image_headers import MAX_PIECES, has_too_many_pieces
from coca_scale.data.images import (
    MAX_ASPECT,
    MAX_SCANS,
    TrainCrop,
    decode_image,
    eval_pixels,
    train_pixels,
)
from coca_scale.data.inspection import inspect_shards
from coca_scale.data.listing import ListOptions, list_pictures
from coca_scale.data.pack import PackOptions, pack
from coca_scale.data.sample import BadSample
from coca_scale.evaluation.pictures import listed_part, read_pictures
from coca_scale.model import load_model_config
from tests.data.pngs import black_png, chunk

CROPS = (TrainCrop(48, 0.9), TrainCrop(48, 1.0))


def saved(image, form, **options):
    """The bytes of a picture in a format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(size=(300, 200)):
    """Smooth colours, different in every corner."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def tiff(width, height, content, tags):
    """A TIFF of 8-bit grey with the given tags on top, `content` behind its directory."""
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **tags}
    begin = 8 + 2 + 12 * len(entries) + 4
    listed = sorted((tag, begin if value is None else value) for tag, value in entries.items())
    rows = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in listed)
    return b"II*\0" + struct.pack("<LH", 8, len(listed)) + rows + bytes(4) + content


def causes(data):
    """What each way of decoding says of a picture."""
    ways = [
        lambda: decode_image(data, "k"),
        *(lambda c=c: train_pixels(data, "k", c, np.random.default_rng(0)) for c in CROPS),
    ]
    found = set()
    for way in ways:
        try:
            way()
            found.add("good")
        except BadSample as bad:
            found.add(bad.cause)
    return found


def peak_of(action):
    """Bytes by which the resident memory of this process grows at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back

    def read(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    before = read("VmRSS")
    action()
    return read("VmHWM") - before


@pytest.mark.parametrize("size", [(100_000, 2), (2, 100_000), (10 * (MAX_ASPECT + 1), 10)])
def test_a_small_file_of_extreme_shape_is_bad_in_every_way_of_decoding(size):
    assert causes(black_png(*size)) == {"extreme_aspect"}
    with pytest.raises(BadSample, match="extreme_aspect"):
        decode_image(Image.new("L", size), "k")


def test_what_is_left_of_extreme_shapes_costs_little():
    data = black_png(20 * MAX_ASPECT, 20)
    assert peak_of(lambda: eval_pixels(decode_image(data, "k"), 224)) < 2**26


def test_tiles_of_a_size_that_only_libtiff_reads():
    side, begin = 2**14, 8 + 2 + 12 * 10 + 4
    large = zlib.compress(bytes(side**2))
    tiles = {322: begin, 323: begin, 324: begin + 8, 325: len(large)}
    data = bytearray(tiff(64, 64, struct.pack("<q", side) + large, tiles))
    for tag in (322, 323):  # of SLONG8, which Pillow leaves out
        data[data.index(struct.pack("<HH", tag, 4)) + 2] = 17
    assert causes(bytes(data)) == {"broken_image"}


def test_extreme_pictures_are_counted_by_pack_inspect_and_caption(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in (("a", black_png(100_000, 2)), ("b", black_png(64, 48))):
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text("words")
    assert pack(folder, tmp_path / "out", PackOptions()).bad == {"extreme_aspect": 1}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    assert inspect_shards([str(tmp_path / "x.tar")]).causes == {"extreme_aspect": 1}
    part = listed_part(list_pictures(folder, ListOptions()), "pictures")
    bad = Counter()
    assert len(list(read_pictures([part], load_model_config("coca_tiny"), bad))) == 1
    assert bad == {"extreme_aspect": 1}


def test_scaling_down_never_writes_what_cannot_be_read(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo((1000, 12)).save(folder / "a.png")
    photo().save(folder / "b.png")
    for name in "ab":
        (folder / f"{name}.txt").write_text("words")
    assert pack(folder, tmp_path / "out", PackOptions(max_side=64)).bad == {"tiny_image": 1}
    assert inspect_shards([str(tmp_path / "out")]).causes == {}


def test_transparent_and_deep_pictures_take_no_more_than_twice_their_pixels():
    side = 3000
    pixels = side * side
    deep = saved(Image.fromarray(np.full((side, side), 7000, np.uint16)), "PNG", compress_level=1)
    for data, stored in ((black_png(side, side, channels=4), 4), (deep, 2)):
        assert peak_of(lambda data=data: decode_image(data, "k")) < (stored + 4) * pixels + 2**25


def test_tiles_and_metadata_are_not_believed():
    small = zlib.compress(bytes(256))
    tiles = {322: 2**27, 323: 1, 324: None, 325: len(small)}
    assert causes(tiff(16, 16, small, tiles)) == {"huge_image"}
    lying = {**tiles, 274: 6, 322: 2**26}
    assert causes(tiff(2, 256, small, lying)) == {"huge_image"}
    assert causes(tiff(16, 16, small, {**tiles, 322: 16, 323: 16})) == {"good"}
    packed = zlib.compress(bytes(2**24), 9)
    for kind in (b"zTXt", b"iCCP"):
        bomb = black_png(64, 64, chunk(kind, b"k\0\0" + packed))
        assert peak_of(lambda bomb=bomb: causes(bomb)) < 2**24
    animation = [Image.new("P", (32, 32), n) for n in range(3)]
    for form in ("GIF", "WEBP", "PNG"):
        many = saved(photo((32, 32)), form, save_all=True, append_images=animation)
        assert causes(many) == {"good"}
    canvas = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6)
    assert causes(canvas + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;") == {"huge_image"}


def test_a_jpeg_of_endless_scans_is_not_decoded():
    data = saved(Image.new("L", (256, 256), 90), "JPEG", progressive=True)
    first = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    second = data.index(b"\xff\xda", first + 2)
    scan = data[first:second]
    assert causes(data[:second] + 20 * scan + data[second:]) == {"good"}
    assert causes(data[:second] + MAX_SCANS * scan + data[second:]) == {"too_many_scans"}
    plain = saved(Image.new("L", (256, 256), 90), "JPEG")
    begin, end = plain.index(b"\xff\xda"), plain.rindex(b"\xff\xd9")
    again = plain[:end] + MAX_SCANS * plain[begin:end] + plain[end:]
    assert causes(again) == {"too_many_scans"}
    # phones hang films behind their photos
    assert causes(data + MAX_SCANS * scan) == {"good"}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_pictures_stand_upright_as_exif_says(form):
    image = photo()
    options = {"MPO": {"save_all": True, "append_images": [image]}}.get(form, {})
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(image, form, exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        found = decode_image(data, "k")
        assert found.tobytes() == upright.convert("RGB").tobytes()
        # who decodes twice, or opens the file before, sees the same
        for again in (found, Image.open(io.BytesIO(data))):
            assert decode_image(again, "k").tobytes() == found.tobytes()
        for crop in (TrainCrop(32, 0.3), TrainCrop(32, 1.0)):
            one = train_pixels(data, "k", crop, np.random.default_rng(1)).int()
            other = train_pixels(found, "k", crop, np.random.default_rng(1)).int()
            assert (one - other).abs().float().mean() < 1.0  # of 255: reduced decoding


def test_orientation_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = black_png(300, 200, chunk(b"eXIf", exif.tobytes()[6:]))
    assert decode_image(data, "k").size == (200, 300)
    wide = TrainCrop(8, 0.9)
    upright = decode_image(data, "k")
    one, other = (train_pixels(d, "k", wide, np.random.default_rng(0)) for d in (data, upright))
    assert one.equal(other)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_broken_exif_never_makes_a_good_picture_bad(data):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = bytearray(exif.tobytes())
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(6, len(content) - 1))
        content[place] = data.draw(st.sampled_from([0, 1, 8, 127, 255]))
    cut = bytes(content[: data.draw(st.integers(6, len(content)))])
    segment = b"\xff\xe1" + struct.pack(">H", len(cut) + 2) + cut
    plain = saved(photo((40, 24)), "JPEG")
    assert decode_image(plain[:2] + segment + plain[2:], "k").size in ((40, 24), (24, 40))


def test_packing_keeps_orientation_in_the_tag_or_in_the_pixels(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    upright = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save(folder / "a.jpg", quality=95, exif=exif)
    more = {"save_all": True, "append_images": [lying]}
    (folder / "b.jpg").write_bytes(saved(lying, "MPO", quality=95, exif=exif, **more))
    for name in "ab":
        (folder / f"{name}.txt").write_text("words")
    for side in (None, 150):
        out = tmp_path / f"out{side}"
        pack(folder, out, PackOptions(max_side=side))
        with tarfile.open(out / "shard-000000.tar") as tar:
            packed = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
        if side is None:
            assert packed == [(folder / f"{name}.jpg").read_bytes() for name in "ab"]
        expected = upright.resize((150, 100), Image.Resampling.BICUBIC)
        for data in packed:
            found = decode_image(data, "k").resize((150, 100), Image.Resampling.BICUBIC)
            assert np.abs(np.subtract(found, expected, dtype=np.float32)).mean() < 3  # of 255


WHITES = {np.uint16: (255, 65535), np.int32: (255, 65535), np.float32: (1, 255, 65535)}


@pytest.mark.parametrize("kind", WHITES)
def test_deep_grey_is_scaled_by_its_rule_or_bad(kind):
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        if kind is np.float32:
            values = st.floats(width=32) | st.floats(0, 1, width=32) | st.floats(0, 300, width=32)
        else:
            info = np.iinfo(kind)
            values = st.integers(info.min, info.max) | st.integers(0, 255) | st.integers(0, 65535)
        drawn = data.draw(st.lists(values, min_size=6, max_size=6))
        array = np.array(drawn, dtype=kind).reshape(2, 3)
        form = data.draw(st.sampled_from(["PNG", "TIFF"])) if kind is np.uint16 else "TIFF"
        white = next((w for w in WHITES[kind] if array.max() <= w), None)
        good = white is not None and array.min() >= 0  # neither for what is not a number
        encoded = saved(Image.fromarray(array), form)
        assert causes(encoded) == {"good" if good else "unknown_pixels"}
        if good:
            grey = np.asarray(decode_image(encoded, "k"))[..., 0]
            assert np.abs(grey - array.astype(np.float64) * (255 / white)).max() <= 0.51

    check()


def huge_webp(width, height):
    """The head of a lossless WebP, which is all that is looked at before its pixels."""
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + (26).to_bytes(4, "little") + b"\x2f" + bits.to_bytes(4, "little") + bytes(21)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def test_decoders_that_keep_copies_get_half_the_pixels():
    assert causes(huge_webp(16383, 4097)) == {"huge_image"}


def test_other_pixel_types():
    for mode, expected in (("YCbCr", "good"), ("LAB", "unknown_pixels"), ("I;16B", "good")):
        picture = Image.new(mode, (8, 8)) if mode != "YCbCr" else photo((8, 8)).convert(mode)
        assert causes(saved(picture, "TIFF")) == {expected}
    by_way_of = {"La": "LA", "RGBa": "RGBA", "PA": "LA"}
    for mode in ("La", "RGBa", "PA", "HSV", "RGBX", "1"):
        picture = photo((8, 8)).convert(by_way_of.get(mode, "RGB")).convert(mode)
        assert decode_image(picture, "k").mode == "RGB"
    half = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 128)])
    grey, same = (decode_image(i, "k").getpixel((0, 0))[0] for i in (half, half.convert("La")))
    assert abs(grey - same) <= 1


def test_scanners_of_12_bits_and_of_inverted_grey():
    inverted = struct.pack("<4H", 0, 65535, 0, 65535)
    data = tiff(2, 2, inverted, {258: 16, 259: 1, 262: 0, 273: None, 278: 2, 279: 8})
    assert np.asarray(decode_image(data, "k"))[..., 0].tolist() == [[255, 0], [255, 0]]
    twelve = bytes.fromhex("fff000") + bytes.fromhex("800fff")
    data = tiff(2, 2, twelve, {258: 12, 259: 1, 273: None, 278: 2, 279: 6})
    assert np.asarray(decode_image(data, "k"))[..., 0].tolist() == [[255, 0], [128, 255]]
    grey = Image.fromarray(np.array([[500, 65535], [500, 0]], np.uint16))
    data = saved(grey, "PNG", transparency=500)
    assert np.asarray(decode_image(data, "k"))[..., 0].tolist() == [[255, 255], [255, 0]]


def in_pieces(form, count):
    """A picture with `count` pieces of what its format allows any number of."""
    data = saved(photo().convert("P" if form == "GIF" else "RGB"), form.partition(" ")[0])
    gif_begin = 13 + 3 * 256
    pieces, place = {
        "JPEG comments": (b"\xff\xfe\0\3c" * count, 2),
        "JPEG fill": (b"\xff" * count, 2),
        "PNG chunks": (chunk(b"abCd", b"") * count, 33),
        "PNG behind": (chunk(b"abCd", b"") * count, -12),
        "GIF blocks": (b"\x21\xfe" + b"\1c" * count + b"\0", gif_begin),
        "GIF comments": (b"\x21\xfe\1c\0" * count, gif_begin),
        "GIF zeros": (b"\1" * count, gif_begin),
        "PPM comment": (b"#" + b"c" * 7 * count + b"\n", 3),
        "PPM spaces": (b" " * 7 * count, 3),
    }[form]
    return data[:place] + pieces + data[place:]


FORMS = ["JPEG comments", "JPEG fill", "PNG chunks", "PNG behind", "GIF blocks", "GIF comments"]


@pytest.mark.parametrize("form", [*FORMS, "GIF zeros", "PPM comment", "PPM spaces"])
def test_a_file_of_very_many_pieces_is_not_opened(form):
    assert causes(in_pieces(form, 300)) == {"good"}, "a picture as there are"
    assert causes(in_pieces(form, 2 * MAX_PIECES)) == {"too_many_pieces"}


def test_large_pictures_in_usual_pieces_are_opened():
    noise = Image.effect_noise((4000, 3000), 90).convert("RGB")
    data = saved(noise, "PNG", compress_level=0)  # 36 MB
    begin = data.index(b"IDAT") - 4
    pixels = zlib.compress(zlib.decompress(content_of(data, b"IDAT")), 0)
    parts = (pixels[at : at + 2048] for at in range(0, len(pixels), 2048))
    small = data[:begin] + b"".join(chunk(b"IDAT", part) for part in parts) + chunk(b"IEND", b"")
    assert small.count(b"IDAT") > MAX_PIECES and not has_too_many_pieces(small)
    profile = bytes(255 * 65519)
    assert causes(saved(photo(), "JPEG", icc_profile=profile)) == {"good"}
    assert causes(saved(noise.crop((0, 0, 600, 400)), "PPM")) == {"good"}
    bitmap = saved(Image.new("1", (4000, 3000), 1), "PPM")
    assert len(bitmap) > 2**20 and causes(bitmap) == {"good"}


def content_of(png, kind):
    """All chunks of a kind, put together."""
    content, place = b"", 8
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == kind:
            content += png[place + 8 : place + 8 + length]
        place += 12 + length
    return content


@pytest.mark.parametrize("magic", [b"P1", b"P2", b"P3"])
def test_pixels_in_digits_are_few_or_refused(magic):
    white = b"" if magic == b"P1" else b" 1"
    count = 12 * (3 if magic == b"P3" else 1)
    assert causes(magic + b" 4 3" + white + b"\n" + b"1 " * count) == {"good"}
    large = magic + b" 4000 3000" + white + b"\n" + b"1 " * 2**16
    assert causes(large) == {"too_many_pieces"}


@given(st.sampled_from([b"\xff\xd8", b"\x89PNG", b"GIF89a", b"P1 ", b"P6"]), st.binary())
def test_pieces_of_anything_can_be_counted(begin, rest):
    assert not has_too_many_pieces(begin + rest)
