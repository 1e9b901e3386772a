"""Linear layers in FP8: against float64, and as curves beside bf16's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coca_scale.engine.config import apply_settings, require_fp8
from coca_scale.errors import UserError
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.fp8 import scaled_linear
from coca_scale.model.image import normalize_pixels
from coca_scale.model.recompute import Linear
from coca_scale.recipe.load import RecipeError
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.json_lines import curve
from tests.ranks import on_ranks, quiet, train_all

FP8 = {"engine__precision": "bf16", "engine__fp8": True}


def relative(a, b):
    """‖a − b‖ / ‖b‖ of each row."""
    return (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)


def with_gradients(function, x, weight, bias, grad):
    x = x.detach().requires_grad_()
    parameters = [torch.nn.Parameter(p.detach().to(x.dtype)) for p in (weight, bias)]
    y = function(x, *parameters)
    return y, *torch.autograd.grad(y, [x, *parameters], grad.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 11, 64), (1, 64)])
def test_products_are_those_of_float64_but_for_three_bits(dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape).to(dtype), (torch.randn(96, 64) / 8).to(dtype)
    bias, grad = torch.randn(96).to(dtype), torch.randn(*shape[:-1], 96).to(dtype)
    found = with_gradients(scaled_linear, x, weight, bias, grad)
    exact = with_gradients(F.linear, x.double(), weight, bias, grad)
    output, grad_x, grad_weight, grad_bias = map(relative, found, exact)
    assert 0.01 < output.max() < 0.06  # it is FP8
    assert 0.01 < grad_x.max() < 0.06
    assert grad_weight.max() < 1e-2
    assert grad_bias < 1e-2


def test_every_row_of_activations_and_gradients_has_its_scale():
    torch.manual_seed(0)
    sizes = 10.0 ** torch.arange(-24, 24, 4).float()[:, None]
    x, grad = torch.randn(12, 64).mul(sizes).bfloat16(), torch.randn(12, 32).mul(sizes).bfloat16()
    weight, bias = torch.randn(32, 64).mul(1e-6).bfloat16(), torch.zeros(32).bfloat16()
    found = with_gradients(scaled_linear, x, weight, bias, grad)[:2]
    exact = with_gradients(F.linear, x.double(), weight, bias, grad)[:2]
    for ours, expected in zip(found, exact, strict=True):
        assert relative(ours, expected).max() < 0.06


def test_nothing_comes_of_nothing():
    weight, bias = torch.nn.Parameter(torch.randn(32, 64)), torch.randn(32)
    assert scaled_linear(torch.zeros(4, 64), weight, bias).equal(bias.expand(4, 32))
    assert scaled_linear(torch.zeros(0, 64), weight, bias).shape == (0, 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x, weight = torch.randn(4, 64), torch.nn.Parameter(torch.randn(32, 64))
    bias = torch.zeros(32)
    x[1, 3] = bad
    assert scaled_linear(x, weight, bias).isfinite().all(1).tolist() == [True, False, True, True]
    weight.data[2, 5] = bad
    assert not scaled_linear(torch.randn(4, 64), weight, bias)[:, 2].isfinite().any()


def tiny(**changes):
    torch.manual_seed(0)
    model = CoCa(load_model_config("coca_tiny"))
    apply_settings(model, tiny_recipe(**{**FP8, **changes}))
    return model.bfloat16()


def test_blocks_are_in_fp8_while_they_train_and_only_then():
    model, plain = tiny(), tiny(engine__fp8=False)
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    chosen = {name for name in linears if model.get_submodule(name).fp8}
    assert {"pooler" in name for name in linears - chosen} == {True}
    assert len(chosen) == 4 * (4 + 2 + 2) + 5 * 2  # blocks, cross-attending blocks
    images, tokens = batch_of(0)
    pixels = normalize_pixels(images, torch.bfloat16, model.config.preprocess_cfg)
    captions = model.text.pack(tokens)
    with torch.no_grad():
        assert model.eval()(pixels, captions)[0].equal(plain.eval()(pixels, captions)[0])
        assert not model.train()(pixels, captions)[0].equal(plain(pixels, captions)[0])


def test_where_fp8_cannot_be_it_is_refused(monkeypatch):
    for precision in ("fp16", "fp32"):
        with pytest.raises(RecipeError, match="fp8 needs precision bf16"):
            tiny_recipe(engine__precision=precision, engine__fp8=True)
    model, engine, gpu = tiny(), tiny_recipe(**FP8).engine, torch.device("cuda")
    require_fp8(model, engine, torch.device("cpu"))
    with pytest.raises(UserError, match="no transformer block of this model"):
        require_fp8(model.caption_head, engine, torch.device("cpu"))
    # no card here is asked
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match=r"8\.9.*A100-SXM4-80GB has 8\.0; set engine\.fp8=false"):
        require_fp8(model, engine, gpu)
    require_fp8(model, tiny_recipe(engine__precision="bf16").engine, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    require_fp8(model, engine, gpu)


LET_GO = {"zero_optimization": {"stage3_max_reuse_distance": 0}}
FULL = {"engine__activation_checkpointing": "full"}
LAYOUTS = {  # with a number of steps
    "bf16": (30, {"engine__zero_stage": 3, "engine__precision": "bf16"}),
    "ZeRO-3": (30, {"engine__zero_stage": 3, "engine__deepspeed": LET_GO, **FP8}),
    "ZeRO-3, full": (4, {"engine__zero_stage": 3, "engine__deepspeed": LET_GO, **FULL, **FP8}),
    "ZeRO-2": (10, {"engine__zero_stage": 2, **FP8}),
}


def curves_on_rank(rank, ranks):
    """Contrastive and caption loss of every step, by layout; three batches again and again."""
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    curves = {}
    with quiet():
        world = start_world()
        for name, (steps, layout) in LAYOUTS.items():
            recipe = tiny_recipe(**layout)
            torch.manual_seed(0)
            model, plan = CoCa(load_model_config("coca_tiny")), BatchSplit.from_recipe(recipe, 2)
            engine = TrainEngine(model, LogitScale(), recipe, plan, world)
            found = []
            for step in range(steps):
                images, tokens = batch_of(step % 3)
                flight = engine.step(images[rows], engine.lay_out(tokens[rows]), 1e-3)
                found.append(list(flight.result().losses.values()))
            engine.close()
            curves[name] = torch.tensor(found)
    return curves


@pytest.mark.slow
def test_fp8_learns_what_bf16_learns():
    """Two losses fall from 3.5 and 7.4 nats to 0.01 and 0.3; where they fall fastest, FP8 lags."""
    curves = on_ranks(curves_on_rank, 2)[0]
    bf16, fp8 = curves["bf16"], curves["ZeRO-3"]
    gaps = (fp8 - bf16).abs()
    print(f"largest gaps {gaps.amax(0)}, of the first steps {gaps[:3].amax(0)}")
    print(f"means of the last six: {bf16[-6:].mean(0)} in bf16, {fp8[-6:].mean(0)} in FP8")
    assert 1e-4 < gaps[0].max() < 3e-2
    assert (gaps.amax(0) < torch.tensor([0.5, 0.25])).all()
    assert (bf16[-6:].mean(0) < torch.tensor([0.02, 0.5])).all()  # there was something to learn
    assert (fp8[-6:].mean(0) < torch.tensor([0.02, 0.5])).all()
    assert curves["ZeRO-3, full"].equal(fp8[:4])
    stages = ((curves["ZeRO-2"] - fp8[:10]).abs() / fp8[:10]).amax(1)
    print(f"stage 2 is off stage 3 by {stages[:3].max():.1e}, then {stages.max():.1e}")
    assert stages[:3].max() < 1e-5  # they round sums of gradients in another order
    assert stages.max() < 3e-2


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    def recipe(name, steps):
        common = {"run__dir": str(tmp_path / name), "schedule__name": "constant"}
        return tiny_recipe(train__steps=steps, train__micro_batch=4, **common, **FP8)

    on_ranks(train_all, 2, [recipe("straight", 4), recipe("stopped", 2), recipe("stopped", 4)])
    assert curve(tmp_path / "stopped", 4) == curve(tmp_path / "straight", 4)
