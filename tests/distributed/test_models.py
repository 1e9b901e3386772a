"""Every kind of model trains under ZeRO-3 on two ranks, resumes, captions and exports."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest

from coca_scale.engine.checkpoint import find_checkpoint
from coca_scale.inference.load import load_model
from coca_scale.openclip.folder import openclip_obstacle, verify_folder, what_reads
from tests.conftest import tiny_recipe
from tests.json_lines import curve
from tests.ranks import on_ranks, train_all
from tests.variants import config_file

KINDS = (
    *("base", "wide", "sigmoid", "roberta", "timm_vit", "timm_conv", "clip", "clip_roberta"),
    *("cascade", "modern", "mammut", "mammut_modern"),
)
FAMILY = ("cascade", "modern", "mammut", "mammut_modern")
ACCUMULATED = ("base", "modern", "mammut", "mammut_modern")
STEPS = 8


def recipe_of(kind, folder, **changes):
    return tiny_recipe(
        **{"run__dir": str(folder / kind), **changes},
        model__name=str(folder / f"{kind}.json"),
        model__patch_dropout=0.25 if kind == "wide" else None,
        data__val="synthetic://shapes?split=val&count=8&size=48",
        optim__lr=3e-3,
        optim__ema_decay=0.9 if kind == "wide" else None,
        loss__contrastive="sigmoid" if kind == "sigmoid" else "softmax",
        loss__caption_weight=0.0 if kind.startswith("clip") else 2.0,
        train__steps=STEPS,
        train__global_batch=16,
        train__micro_batch=4 if kind in ACCUMULATED else 8,
        checkpoint__every_steps=4,
        engine__activation_checkpointing="full" if kind != "base" else "none",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All kinds, trained once whole and once again from the middle."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        path = config_file("coca" if kind == "sigmoid" else kind, folder)
        path.rename(folder / f"{kind}.json")
    recipes = [recipe_of(kind, folder) for kind in KINDS]
    on_ranks(train_all, 2, recipes)
    whole = {kind: curve(folder / kind, STEPS) for kind in KINDS}
    for kind in KINDS:
        shutil.rmtree(find_checkpoint(folder / kind / "checkpoints"))
    for kind in FAMILY:
        shutil.copytree(folder / kind, folder / f"{kind}_alone")
    on_ranks(train_all, 2, recipes)
    alone = [{"run__dir": str(folder / f"{kind}_alone")} for kind in FAMILY]
    on_ranks(
        train_all,
        1,
        [recipe_of(kind, folder, **own) for kind, own in zip(FAMILY, alone, strict=True)],
    )
    return folder, whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_learns_resumes_captions_and_exports(trained, kind):
    folder, whole = trained
    run = folder / kind
    assert curve(run, STEPS) == whole[kind], "a resumed run differs"
    first, last = whole[kind][0][0], min(loss for loss, _, _ in whole[kind][-3:])
    assert last < first

    loaded = load_model(str(run))
    exported = load_model(str(run / "export"))
    assert all(loaded.weights[name].equal(exported.weights[name]) for name in loaded.weights)
    if not kind.startswith("clip"):
        from coca_scale.data.sources import open_source
        from coca_scale.recipe.data import DataSection

        source = open_source(
            "synthetic://shapes?count=3&size=48", DataSection(train="synthetic://shapes"), 0
        )
        pictures = [sample.image for sample in source.ordered(0, 1)]
        captions = loaded.caption(pictures)
        assert len(captions) == 3
        assert captions == exported.caption(pictures)
    obstacle = openclip_obstacle(loaded.config)
    expected = kind in ("roberta", "timm_vit", "timm_conv")
    assert (obstacle is not None) == expected
    names = {path.name for path in (run / "export").iterdir()}
    if expected:
        assert "coca_scale_config.json" in names
        assert not any(name.startswith("open_clip") for name in names)
    elif what_reads(loaded.config) is None:
        assert verify_folder(run / "export", exported.model).largest < 1e-4
    else:  # tests/model/test_parity.py, benchmarks/openclip_main.py
        assert kind in FAMILY
        assert "open_clip_model.safetensors" in names
    assert (exported.config.init_logit_bias is not None) == (kind == "sigmoid")
    if kind == "sigmoid":
        theirs = open_clip.create_model(f"local-dir:{run / 'export'}")
        assert theirs.logit_bias.item() == exported.model.logit_scale.bias.item() != -10
        values = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert values[-1]["logit_bias"] == theirs.logit_bias.item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY)
def test_another_number_of_ranks_goes_on(trained, kind):
    folder, whole = trained
    for found, expected in zip(curve(folder / f"{kind}_alone", STEPS), whole[kind], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
