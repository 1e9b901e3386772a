"""What can be compiled; that it computes the same is in test_equivalence.py."""

from __future__ import annotations

import pytest

from coca_scale.engine.config import require_compilable
from coca_scale.errors import UserError
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.freeze import freeze
from tests.conftest import tiny_recipe


def require(name="coca_tiny", **changes):
    recipe = tiny_recipe(engine__compile="blocks", **changes)
    model = CoCa(load_model_config(name))
    freeze(model, recipe.model, recipe.loss)
    require_compilable(model, recipe.engine)


@pytest.mark.parametrize("locked", [{"model__lock_text": True}, {"loss__contrastive_weight": 0.0}])
def test_compiled_blocks_that_are_not_gathered_whole_are_refused(locked):
    with pytest.raises(UserError, match="needs every weight to train"):
        require(**locked)
    require(**locked, engine__zero_stage=2)
    require()


def test_a_clip_without_captions_to_learn_can_be_compiled():
    require("clip_tiny", loss__caption_weight=0.0)
