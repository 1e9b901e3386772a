"""On a GPU: `make test-gpu`. The engine's curves, every kind of attention, resuming to the bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.losses.matmul import wide_matmul
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.fp8 import scaled_linear
from coca_scale.model.image import normalize_pixels
from coca_scale.model.layers import CrossAttention, SelfAttention
from coca_scale.model.preprocess import OPENAI
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.json_lines import curve
from tests.ranks import on_ranks, quiet, train_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
BACKENDS = {
    "default": None,
    "own": None,
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def test_wide_products_keep_fp32_sums():
    a, b = (torch.randn(n, 768, device="cuda").bfloat16() for n in (64, 100))
    assert relative(wide_matmul(a, b.T, torch.float32), a.double() @ b.double().T) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 300])
def test_the_contrastive_loss_is_as_exact_as_fp32_allows(dtype, chunk_rows):
    features = F.normalize(torch.randn(5000, 2, 256, device="cuda"), dim=-1).to(dtype)
    log_scale = torch.tensor([4.6], device="cuda")
    exact = contrastive_loss(FeatureGather(features.double(), None), log_scale.double(), None)
    found = contrastive_loss(FeatureGather(features, None), log_scale, None, chunk_rows)
    pairs = zip(dataclasses.astuple(found), dataclasses.astuple(exact), strict=True)
    errors = [relative(ours, theirs) for ours, theirs in pairs]
    print(f"loss, gradients of features and scale off by {errors}")
    assert max(errors) < 4e-6


@pytest.fixture(scope="module")
def exact():
    """A model of full size in float64 on the CPU, its inputs and what comes out."""
    torch.manual_seed(0)
    config = load_model_config("coca_ViT-B-32")
    model = CoCa(config).double().train()
    context, vocabulary = config.context_length, config.text.vocab_size
    images = torch.randint(0, 256, (6, 3, 224, 224), dtype=torch.uint8)
    tokens = torch.zeros(6, context, dtype=torch.long)
    for row, length in enumerate((2, 3, 9, 20, 33, context)):
        tokens[row, :length] = torch.randint(1, vocabulary - 2, (length,))
        tokens[row, 0], tokens[row, length - 1] = vocabulary - 2, vocabulary - 1
    return model, images, tokens, outcome(model, images, tokens)


def outcome(model, images, tokens):
    """Features, caption loss, and all gradients of one step."""
    weight = next(model.parameters())
    model.zero_grad()
    captions = model.text.pack(tokens).to(weight.device)
    pixels = normalize_pixels(images.to(weight.device), weight.dtype, OPENAI)
    features, sums = model(pixels, captions)
    scale = torch.tensor([2.0], device=weight.device)
    made = contrastive_loss(FeatureGather(features.detach(), None), scale, None)
    surrogate = (features.to(made.grad_features.dtype) * made.grad_features).sum()
    (surrogate + sums["caption"] / 100).backward()
    gradients = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])
    return features, sums["caption"], gradients


CASES = [  # cuDNN's attention takes no fp32, and one kind is enough for compiled layers
    *((torch.float32, backend, "none") for backend in ("default", "flash", "math")),
    *((torch.bfloat16, backend, "none") for backend in BACKENDS),
    *((dtype, "default", "blocks") for dtype in (torch.float32, torch.bfloat16)),
    *((torch.bfloat16, "own", compiled) for compiled in ("none", "blocks")),
    (torch.float16, "own", "none"),
]


@pytest.mark.parametrize(("dtype", "backend", "compiled"), CASES)
def test_a_model_computes_what_it_computes_in_float64(monkeypatch, exact, dtype, backend, compiled):
    from coca_scale.engine.compiling import compile_layers
    from coca_scale.engine.config import layers
    from coca_scale.model import attention_kernel

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patch embedding
    reference, images, tokens, expected = exact
    model = copy.deepcopy(reference).to("cuda", dtype)
    model.set_activation_checkpointing("selective")
    if backend == "own":
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.kernel = attention_kernel.short_attention
            if isinstance(module, SelfAttention | CrossAttention):
                module.varlen = True
    if compiled == "blocks":
        compile_layers(layers(model), layers(model.image))
    chosen = BACKENDS[backend]
    with sdpa_kernel(chosen) if chosen else contextlib.nullcontext():
        found = outcome(model, images, tokens)
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    print(f"features, caption loss, gradients off by {errors}")
    assert max(errors) < (2e-5 if dtype == torch.float32 else 6e-2)


def curve_on_rank(_rank, _ranks, layouts):
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        return [_curve(world, changes) for changes in layouts]


def _curve(world, changes):
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    recipe = tiny_recipe(**{"optim__lr": 1e-4, "train__global_batch": BATCH, **changes})
    torch.manual_seed(0)
    model = CoCa(load_model_config("coca_tiny"))
    engine = TrainEngine(model, LogitScale(), recipe, BatchSplit.from_recipe(recipe, 1), world)
    losses, left_out = [], 0
    for step in range(8):
        images, tokens = batch_of(step)
        result = engine.step(images, engine.lay_out(tokens), 1e-4).result()
        while recipe.engine.precision == "fp16" and not result.applied and left_out < MOST_LEFT_OUT:
            left_out += 1  # the loss scale falls, and nothing else has changed
            again = engine.step(images, engine.lay_out(tokens), 1e-4).result()
            assert again.losses == result.losses
            result = again
        assert result.applied
        losses.append(result.loss)
    engine.close()
    return losses, left_out


def waits_on_rank(_rank, _ranks, changes):
    """Steps of an engine while torch raises where the host waits for the device."""
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    with quiet():
        recipe = tiny_recipe(**{"train__global_batch": BATCH, **changes})
        model, split = CoCa(load_model_config("coca_tiny")), BatchSplit.from_recipe(recipe, 1)
        engine = TrainEngine(model, LogitScale(), recipe, split, start_world())
        images, tokens = batch_of(0)
        images = images.pin_memory()
        for _ in range(3):
            engine.step(images, engine.lay_out(tokens), 1e-4).result()
        torch.cuda.set_sync_debug_mode("error")
        flights = [engine.step(images, engine.lay_out(tokens), 1e-4) for _ in range(3)]
        torch.cuda.set_sync_debug_mode("default")
        applied = [flight.result().applied for flight in flights]
        engine.close()
    return applied


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_the_host_waits_for_nothing_in_a_step(micro_batch, compiled):
    changes = {"train__micro_batch": micro_batch, "engine__compile": compiled}
    found = on_ranks(waits_on_rank, 1, {"engine__precision": "bf16", **changes})
    assert found == [[True] * 3]


def clocked_on_rank(_rank, _ranks, changes):
    """Seconds in layers of a step, of one with more work in them, and of one that is not timed."""
    from coca_scale.engine.compute_clock import ComputeClock, equal_layers
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    with quiet():
        recipe, world = tiny_recipe(**{"train__global_batch": BATCH, **changes}), start_world()
        model, split = CoCa(load_model_config("coca_tiny")), BatchSplit.from_recipe(recipe, 1)
        engine = TrainEngine(model, LogitScale(), recipe, split, world)
        clock = ComputeClock(equal_layers(engine.module, recipe.engine.zero_stage), world.device)
        images, tokens = batch_of(0)
        images = images.pin_memory()

        def seconds(wanted=True):
            torch.cuda.set_sync_debug_mode("error")
            with clock.timing(wanted) as spans:
                flight = engine.step(images, engine.lay_out(tokens), 1e-4)
            torch.cuda.set_sync_debug_mode("default")
            flight.result()  # the step is through, and so is what was timed in it
            return spans.seconds()

        for _ in range(3):
            engine.step(images, engine.lay_out(tokens), 1e-4).result()
        found = [seconds()]
        for block in engine.module.image.blocks:
            block.register_forward_hook(more_work, prepend=True)
        seconds()
        found += [seconds(), seconds(wanted=False)]
        engine.close()
    return found


def more_work(*_):
    """Many times what a tiny block has."""
    x = torch.ones(4096, 4096, device="cuda")
    for _ in range(10):
        x = x @ x / 4096


@pytest.mark.parametrize("compiled", ["none", "blocks"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_device_that_computes_longer_is_timed_and_the_host_does_not_wait(stage, compiled):
    changes = {"train__micro_batch": 4, "engine__zero_stage": stage, "engine__compile": compiled}
    ((plain, more, untimed),) = on_ranks(
        clocked_on_rank, 1, {"engine__precision": "bf16", **changes}
    )
    print(f"ZeRO-{stage}, {compiled}: {plain:.4f} s, with more work {more:.4f} s")
    assert plain > 0
    assert more > 2 * plain
    assert untimed is None


HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.skipif(not HAS_FP8, reason="this GPU has no FP8")
def test_fp8_products_are_those_of_float64_but_for_three_bits():
    x, grad = (torch.randn(1003, width, device="cuda").bfloat16() for width in (1408, 6144))
    weight = torch.nn.Parameter(torch.randn(6144, 1408, device="cuda").bfloat16() / 40)
    bias = torch.zeros(6144, device="cuda").bfloat16()
    x.requires_grad_()
    y = scaled_linear(x, weight, bias)
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], grad)
    wide = [t.detach().double() for t in (x, grad, weight)]
    exact = (wide[0] @ wide[2].T, wide[1] @ wide[2], wide[1].T @ wide[0])
    errors = [relative(*pair) for pair in zip((y, grad_x, grad_weight), exact, strict=True)]
    print(f"output, gradients of input and weight off by {errors}")
    assert 0.01 < errors[0] < 0.06
    assert 0.01 < errors[1] < 0.06
    assert errors[2] < 1e-2


@pytest.mark.skipif(not HAS_FP8, reason="this GPU has no FP8")
@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_fp8_learns_as_bf16_and_the_host_does_not_wait(compiled):
    bf16 = {"engine__precision": "bf16", "engine__compile": compiled, "train__micro_batch": 16}
    fp8 = {**bf16, "engine__fp8": True}
    (((expected, _), (found, _)),) = on_ranks(curve_on_rank, 1, [bf16, fp8])
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f"fp8, {compiled}: off by {worst:.1e}")
    assert 0 < worst < BOUNDS["bf16"]
    assert on_ranks(waits_on_rank, 1, fp8) == [[True] * 3]


PLAIN = {"engine__zero_stage": 0, "train__micro_batch": 16}
LAYOUTS = {
    "none": {
        "ZeRO-3": {"engine__zero_stage": 3, "train__micro_batch": 16},
        "ZeRO-2": {"engine__zero_stage": 2, "train__micro_batch": 16},
        "accumulated": {"train__micro_batch": 4},
        "torch's kernels": {
            "train__micro_batch": 16,
            "loss__caption_kernel": "torch",
            "engine__attention_kernel": "torch",
        },
        "full": {"train__micro_batch": 8, "engine__activation_checkpointing": "full"},
    },
    "blocks": {
        "compiled": {"engine__activation_checkpointing": "none", "train__micro_batch": 16},
        "compiled, accumulated": {"train__micro_batch": 4},
    },
}
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-3}
MOST_LEFT_OUT = 8  # of fp16, whose loss scale begins at 2^16 and halves with each but the first


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("compiled", list(LAYOUTS))
def test_all_layouts_give_the_same_curve(compiled, precision):
    common = {"engine__precision": precision, "engine__compile": compiled}
    chosen = {name: {**common, **changes} for name, changes in LAYOUTS[compiled].items()}
    (((plain, _), *found),) = on_ranks(curve_on_rank, 1, [PLAIN, *chosen.values()])
    worst = {}
    for name, (losses, left_out) in zip(chosen, found, strict=True):
        worst[name] = max(abs(a - b) / b for a, b in zip(losses, plain, strict=True))
        print(f"{precision}, {name}: off by {worst[name]:.1e}, {left_out} steps left out")
    assert max(worst.values()) < BOUNDS[precision], worst


@pytest.mark.parametrize(
    ("precision", "compiled"), [("bf16", "none"), ("fp16", "none"), ("bf16", "blocks")]
)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, precision, compiled):
    def recipe(folder, steps):
        return tiny_recipe(
            run__dir=str(folder),
            train__steps=steps,
            engine__precision=precision,
            engine__compile=compiled,
            schedule__name="constant",
        )

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    on_ranks(train_all, 1, [recipe(straight, 12)])
    on_ranks(train_all, 1, [recipe(stopped, 7)])
    on_ranks(train_all, 1, [recipe(stopped, 12)])
    assert curve(straight, 12) == curve(stopped, 12)
