"""README and docs: generated parts are current, blocks are of known kinds, the site builds."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from coca_scale.recipe import recipe_from_dict
from coca_scale.recipe.load import schema_json
from coca_scale.recipe.yaml_text import parse_yaml
from tests.browser import opened_browser, quiet_page
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, blocks, commands
from tests.docs.elsewhere import ELSEWHERE, elsewhere

RUNNABLE = ("coca-scale", "deepspeed", "torchrun", "mpirun", "clip_benchmark", "tensorboard")
PLAIN = ("tail", "touch", "python", "bash")


def load_generator() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
README, RECIPES = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "recipes.md"))
QUICK = ("tiny", "cc3m", "small")


def test_keys_and_schema_are_current():
    assert (ROOT / "docs" / "keys.md").read_text() == GENERATOR.keys_page()
    assert (ROOT / "recipes" / "schema.json").read_text() == schema_json()
    assert GENERATOR.scores_table() in RECIPES


def test_the_map_of_the_code_is_current():
    rooms = {p.parent.name for p in (ROOT / "coca_scale").glob("*/__init__.py")}
    assert rooms == set(GENERATOR.ROOMS)
    assert GENERATOR.code_tree() in (ROOT / "docs" / "code.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, marks=() if e.name in QUICK else pytest.mark.docs, id=e.name)
        for e in GENERATOR.ENTRIES
    ],
)
def test_what_the_tables_say_of_a_recipe_is_what_is_planned(entry):
    row = [GENERATOR.Planned.of(entry)]
    for page, table in ((RECIPES, GENERATOR.recipe_table), (README, GENERATOR.short_table)):
        assert table(row).splitlines()[-1] in page.splitlines()


@pytest.mark.docs
def test_the_picture_of_memory_says_what_the_plan_does():
    drawn = (ROOT / "docs" / "memory.svg").read_text()
    for row in GENERATOR.memory_bars().values():
        assert f"{row.plan.total_bytes / 1e9:.1f} GB" in drawn


def test_every_recipe_is_in_the_table():
    assert {e.name for e in GENERATOR.ENTRIES} == {
        p.stem for p in (ROOT / "recipes").glob("*.yaml")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_are_of_a_known_kind(page):
    text = page.read_text()
    assert text.count("```") % 2 == 0
    for block in blocks(page):
        assert block.language in LANGUAGES, block.name
        if block.language == "bash":
            for command in commands(block.text):
                known = command.split()[0] in (*RUNNABLE, *PLAIN) or elsewhere(command)
                assert known, f"{block.name}: {command}"
        elif block.language == "yaml":
            recipe = parse_yaml((ROOT / "recipes" / "tiny.yaml").read_text())
            for section, keys in parse_yaml(block.text).items():
                recipe[section] |= keys
            if recipe["schedule"].get("stages"):
                del recipe["train"]["steps"]
            recipe_from_dict(recipe)
        elif block.language == "json":
            json.loads(block.text)
    assert not re.search(r"^    (coca-scale|deepspeed|sbatch) ", text, re.MULTILINE)


def test_what_is_not_run_is_still_there():
    text = "\n".join(c for page in PAGES for b in blocks(page) for c in commands(b.text))
    for start in ELSEWHERE:
        assert re.search(f"^{start}", text, re.MULTILINE), start


@pytest.mark.slow
def test_search_finds_pages(site, browser):
    with quiet_page(browser) as page:
        page.goto(f"{site[1]}/index.html")
        page.locator(".md-search__input").press_sequentially("preempted")
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
        assert "Surviving a cluster" in page.inner_text(".md-search-result__list")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The built site and its address; a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    handler = partial(SimpleHTTPRequestHandler, directory=str(out))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield out, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_of_the_site_fit_and_ask_no_other_server(site, browser, width):
    folder, address = site
    pages = sorted(p for p in folder.glob("*.html") if p.name != "404.html")
    assert len(pages) == len(PAGES) - 1
    for path in pages:
        with quiet_page(browser, width) as page:
            asked: list[str] = []
            page.on("request", lambda request, seen=asked: seen.append(request.url))
            page.goto(f"{address}/{path.name}")
            assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path.name} is {wide} px too wide at {width}"
            broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
            assert not broken, path.name
