"""The demo page, as a browser shows it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image

from coca_scale.data.synthetic import Shapes
from tests.browser import opened_browser, quiet_page


@pytest.fixture(scope="module")
def address(trained):
    """`coca-scale demo` on a free port, ended with ctrl-c."""
    command = [sys.executable, "-m", "coca_scale", "demo", str(trained.folder), "--port", "0"]
    command += ["--upload-megabytes", "0.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line
    yield line.split()[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) in (0, 130, -signal.SIGINT)


def post(address, data, query="", host=None):
    request = urllib.request.Request(f"{address}/api/describe{query}", data=data, method="POST")
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def png(index=3, size=64):
    buffer = io.BytesIO()
    Shapes(10, size, "val")[index].image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_picture_is_chosen_and_described(address, tmp_path):
    picture, text = tmp_path / "picture.png", tmp_path / "text.png"
    picture.write_bytes(png())
    text.write_text("no picture")
    with opened_browser() as browser:
        page = browser.new_page(viewport={"width": 380, "height": 800})
        page.goto(address)
        page.set_input_files("#file", str(picture))
        page.wait_for_selector("#captions li")
        assert page.locator("#captions li").count() == 3
        assert page.locator("#captions li").first.inner_text().startswith("a ")
        assert page.locator("#drop img").is_visible()
        page.fill("#labels", "a small red circle\na large blue star\n\n<b>bold</b>")
        page.wait_for_selector("#scores .row")
        shares = page.locator("#scores .row .score").all_inner_texts()
        assert len(shares) == 3
        assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=0.2)
        assert page.locator("#scores b").count() == 0, "labels are text, not HTML"
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        page.set_input_files("#file", str(text))
        page.wait_for_selector("#status.bad")
        assert "broken image" in page.inner_text("#status")
        page.close()
        with quiet_page(browser) as wide:
            wide.goto(address)
            assert wide.title().endswith("coca-scale demo")


def test_captions_and_labels_as_json(address):
    query = "?label=a+small+red+circle&label=a+large+blue+star"
    status, found = post(address, png(), query)
    assert status == 200
    scores = [caption["score"] for caption in found["captions"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert sum(label["probability"] for label in found["labels"]) == pytest.approx(1, abs=1e-3)


def test_what_is_too_much_or_no_picture_is_refused(address):
    assert post(address, b"x" * 600_000)[0] == 413
    assert "cannot be used" in post(address, b"no picture")[1]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert "huge image" in post(address, bomb.getvalue())[1]
    assert post(address, png(), "?" + "&".join(f"label={n}" for n in range(101)))[0] == 413
    assert post(address, png(), host="evil.example")[0] == 400
    assert post(address, png(), host="localhost")[0] == 200
