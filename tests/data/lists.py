"""Lists as people keep them, and what the verbs make of them."""

from __future__ import annotations

import json
from collections import Counter

from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.errors import UserError
from tests.data.shards import encoded
from tests.invoke import output_of

FORMATS = {
    "a.jpg": "JPEG",
    "b.PNG": "PNG",
    "c.bmp": "BMP",
    "d.tif": "TIFF",
    "e.TIFF": "TIFF",
    "f.gif": "GIF",
    "g.jfif": "JPEG",
    "h.webp": "WEBP",
    "i.ppm": "PPM",
}


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def captioned_pictures(folder, names=("0.jpg", "1.jpg", "2.jpg")):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(encoded(form=FORMATS.get(name, "JPEG")))
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return folder


def failure_of(*arguments):
    """The sentence of a command that has to fail as a user's mistake."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    assert "\n" not in str(done.exception)
    return str(done.exception)


def packed(tmp_path, source, *options):
    """What `data pack` says, and the causes in its manifest and its list, which have to agree."""
    out = tmp_path / f"packed-{len(list(tmp_path.iterdir()))}"
    said = output_of("data", "pack", source, "--out", out, "--workers", "1", *options)
    bad = json.loads((out / "manifest.json").read_text())["bad"]
    listed = out / "bad_samples.jsonl"
    lines = listed.read_text().splitlines() if listed.exists() else []
    assert Counter(json.loads(line)["cause"] for line in lines) == bad
    for cause, count in bad.items():
        assert f"{count} × {cause}" in " ".join(said.split())
    return said, bad
