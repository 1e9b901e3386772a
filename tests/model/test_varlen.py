"""Attention over captions as they are packed: on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from coca_scale.engine.config import apply_settings, own_attention
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.layers import Attention, SelfAttention
from coca_scale.planning.costs import count_costs
from coca_scale.recipe import BatchSplit
from tests.conftest import tiny_recipe
from tests.model.triton_kernels import assembled, run
from tests.variants import config_file

pytest.importorskip("triton", reason="Triton is not installed")

PREPARE = """
from dataclasses import replace
from coca_scale.model.packing import packing_of
from coca_scale.model.varlen import varlen_cross_attention, varlen_self_attention

def heads_apart(x_BLW, heads):
    return x_BLW.unflatten(-1, (heads, -1)).transpose(1, 2)

def padded_self(qkv, rows, heads):
    q, k, v = (heads_apart(x, heads) for x in rows.pad(qkv).chunk(3, -1))
    mask = rows.mask()
    causal = mask is None and rows.causal
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return rows.pack(y.transpose(1, 2).flatten(2))

def padded_cross(q, kv, rows, heads):
    k, v = (heads_apart(x, heads) for x in kv.chunk(2, -1))
    y = F.scaled_dot_product_attention(heads_apart(rows.pad(q), heads), k, v)
    return rows.pack(y.transpose(1, 2).flatten(2))

def results(function, inputs, rows, heads, grad):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, rows, heads)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs)]

def draw(lengths, heads, width, context, dtype, hidden=0.0, causal=True):
    rows = packing_of(torch.tensor(lengths))[0].map(lambda x: x.to(device))
    rows = replace(rows, causal=causal)
    count = sum(lengths)
    shape = (count, 3 * heads * width) if context is None else (count, heads * width)
    inputs = [torch.randn(shape, device=device).to(dtype)]
    if context is not None:
        shape = (len(lengths), context, 2 * heads * width)
        inputs.append(torch.randn(shape, device=device).to(dtype))
    if hidden:
        seen = torch.rand(count, device=device) > hidden
        seen[rows.starts[:-1][rows.starts.diff() > 0].long()] = True
        rows = replace(rows, seen_N=seen)
    return inputs, rows, torch.randn(count, heads * width, device=device).to(dtype)
"""

COMPARE = """
LENGTHS = (1, 0, 64, 65, 130, 5)
for width in (8, 32, 64, 88):
    for dtype in (torch.float16, torch.bfloat16) if width == 64 else (torch.float16,):
        cases = (None, 0.0, True), (None, 0.4, True), (70, 0.0, True)
        both_ways = ((None, 0.0, False), (None, 0.4, False)) if width in (32, 88) else ()
        for context, hidden, causal in (*cases, *both_ways):
            heads = 1 + width % 3
            inputs, rows, grad = draw(LENGTHS, heads, width, context, dtype, hidden, causal)
            padded = padded_self if context is None else padded_cross
            ours = varlen_self_attention if context is None else varlen_cross_attention
            wide = [x.double() for x in inputs]
            exact = results(padded, wide, rows, heads, grad.double())
            theirs = results(padded, inputs, rows, heads, grad)
            found = results(ours, inputs, rows, heads, grad)
            for one in zip(found, theirs, exact, strict=True):
                good, figures = near(*one)
                assert good and one[0].dtype == dtype, (width, context, hidden, *figures)
            again = results(ours, inputs, rows, heads, grad)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
# A caption by itself is what it is among others.
inputs, rows, grad = draw((9, 40, 3), 2, 32, None, torch.float16)
found = results(varlen_self_attention, inputs, rows, 2, grad)
alone = packing_of(torch.tensor([40]))[0].map(lambda x: x.to(device))
again = results(varlen_self_attention, [inputs[0][9:49]], alone, 2, grad[9:49])
assert all(torch.equal(a[9:49], b) for a, b in zip(found, again, strict=True))
# Rows that see nothing are zero, and have no gradient; scores far from zero do not overflow.
inputs, rows, grad = draw((4, 70), 1, 64, None, torch.float16)
blind = replace(rows, seen_N=torch.arange(74, device=device) > 1)
out, gradient = results(varlen_self_attention, inputs, blind, 1, grad)
assert not out[:2].any() and not gradient[:2].any() and out[2:].all(1).all()
assert torch.equal(out[2:4].isfinite(), torch.ones_like(out[2:4], dtype=torch.bool))
inputs[0][:, :128] *= 12
ours = results(varlen_self_attention, inputs, rows, 1, grad)
exact = results(padded_self, [inputs[0].double()], rows, 1, grad.double())
for our, x in zip(ours, exact, strict=True):
    assert (our.double() - x).norm() <= 0.02 * x.norm()
"""

OPERATORS = """
import torch._dynamo
from torch.library import opcheck

def flops_and_graphs(ours, context, hidden):
    def block(*inputs):
        first, *others, rows, heads = inputs
        return ours(first * 2, *others, rows, heads) * 3
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 33, 2), (20, 1, 7, 66)):
        inputs, rows, grad = draw(lengths, 2, 16, context, torch.float16, hidden)
        with FlopCounterMode(display=False) as counter:
            results(ours, inputs, rows, 2, grad)
        score = 2 * len(lengths) * 2 * max(lengths) * (context or max(lengths)) * 16
        assert counter.get_total_flops() == 7 * score  # as a step's are counted, with padding
        torch._dynamo.config.error_on_recompile = lengths != (5, 33, 2)
        found = results(compiled, inputs, rows, 2, grad)
        expected = results(block, inputs, rows, 2, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch._dynamo.config.error_on_recompile = False

flops_and_graphs(varlen_self_attention, None, 0.4)
flops_and_graphs(varlen_cross_attention, 10, 0.0)

ops = torch.ops.coca_scale
lengths = (20, 1, 7, 66)
sizes = (2, max(lengths))
cross, rows, grad = draw(lengths, 2, 16, 10, torch.float16)
opcheck(
    ops.varlen_cross_attention.default, (*(x.requires_grad_() for x in cross), rows.starts, *sizes)
)
qkv, rows, grad = draw(lengths, 2, 16, None, torch.float16, 0.4)
others = rows.starts, rows.seen_N, *sizes, True
opcheck(ops.varlen_self_attention.default, (qkv[0].requires_grad_(), *others))
"""

MODELS = """
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.layers import Attention
from tests.model.captions import texts_of, uneven_captions

def gradients(model, images, tokens, targets, weights, varlen):
    for module in model.modules():
        if isinstance(module, Attention):
            module.varlen = varlen
    model.zero_grad()
    captions = model.text.pack(tokens, targets=targets)
    features, sums = model(images, captions.to(torch.device(device)))
    ((features * weights).sum() + sum(sums.values()) / 10).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **sums, **found}

for kind, file in FILES.items():
    config = load_model_config(file)
    torch.manual_seed(0)
    model = CoCa(config).to(device, torch.float16)
    model.set_activation_checkpointing("full" if kind == "coca" else "selective")
    size = config.vision_cfg.image_size
    images = torch.randn(6, 3, size, size, dtype=torch.float16, device=device)
    weights = torch.randn(6, 2, config.embed_dim, dtype=torch.float16, device=device)
    texts = (uneven_captions(config), None) if "clip" in kind else texts_of(config)
    ours, theirs = (gradients(model, images, *texts, weights, v) for v in (True, False))
    wide = images.double(), *texts, weights.double()
    exact = gradients(model.double(), *wide, False)
    assert ours.keys() == exact.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs, exact = (
        torch.cat([x.double().flatten() for x in found.values()]) for found in (ours, theirs, exact)
    )
    errors = [float((x - exact).norm() / exact.norm()) for x in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1] < 0.01, (kind, errors)
"""


@pytest.mark.parametrize("script", [COMPARE, OPERATORS], ids=["numbers", "operators"])
def test_packed_captions_attend_as_padded_ones(script):
    run(PREPARE + script)


def test_models_compute_the_same_without_padding(tmp_path):
    kinds = ("coca", "correct_mask", "clip", "roberta", "modern", "mammut", "mammut_modern")
    files = {kind: str(config_file(kind, tmp_path)) for kind in kinds}
    run(f"\nFILES = {files}\n" + MODELS)


SHAPES = [
    (64, None, True),
    (64, None, False),
    (64, 0, True),  # not causal
    (64, 255, False),
    (88, 255, False),
    (128, None, True),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
@pytest.mark.parametrize(("width", "context", "masked"), SHAPES)
def test_the_kernels_keep_to_the_registers_of_gpus(
    capability, name, width, context, masked, monkeypatch, capfd
):
    from coca_scale.model import varlen_kernel

    kernel, inner = getattr(varlen_kernel, name), 12 * width
    strides = (inner, 2 * inner) if context else (3 * inner, 3 * inner)
    constants = varlen_kernel.constants(12, width, context, masked, context is None, strides)
    kinds = {**dict.fromkeys(kernel.arg_names, "*bf16"), "N": "i32", "starts": "*i32"}
    kinds |= {"lse": "*fp32", "delta": "*fp32", "seen": "*i1" if masked else "*i32"}
    made = assembled(kernel, constants, kinds, capability, monkeypatch, capfd)
    assert capability < 90 or ("wgmma" in made.ptx and "serialized" not in made.log)
    assert made.spilled <= 512, made.log
    assert made.shared <= 99 * 1024  # of the smallest of these GPUs


def varlen_modules(recipe, varlen):
    model = CoCa(load_model_config(recipe.model.name))
    apply_settings(model, recipe, varlen=varlen)
    said = own_attention(model, recipe.engine.precision) or ""
    assert ("packed captions" in said) == any(getattr(m, "varlen", False) for m in model.modules())
    kinds = Attention
    return {n for n, m in model.named_modules() if isinstance(m, kinds) and m.varlen}


def test_a_recipe_decides_whether_captions_stay_packed():
    recipe = tiny_recipe(engine__precision="bf16")
    with FakeTensorMode():
        assert "text.blocks.0.attn" in varlen_modules(recipe, True)
        assert not varlen_modules(recipe, False)
        assert not varlen_modules(tiny_recipe(engine__precision="fp32"), True)
        assert not varlen_modules(
            tiny_recipe(engine__precision="bf16", engine__attention_kernel="torch"), True
        )
        if not torch.cuda.is_available():
            assert not varlen_modules(recipe, None)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("coca_ViT-L-14", "images and packed captions"), ("coca_2b", "packed captions")],
)
def test_the_log_says_what_our_kernels_attend_to(name, parts):
    with FakeTensorMode():
        model = CoCa(load_model_config(name))
        apply_settings(model, tiny_recipe(engine__precision="bf16"), varlen=True)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.kernel = lambda *_: None
    assert own_attention(model, "bf16") == f"attention by our Triton kernels to {parts}"


def test_a_plan_counts_less_for_packed_captions():
    recipe = tiny_recipe(
        engine__precision="bf16", train__micro_batch=8, train__global_batch=8, data__mean_tokens=8.0
    )
    batch = BatchSplit.from_recipe(recipe, 1)
    packed, padded = (count_costs(recipe, batch, varlen) for varlen in (True, False))
    assert packed.step_flops == pytest.approx(padded.step_flops, rel=0.01)
    for part in ("text", "decoder"):
        print(f"{part}: {packed.kept_bytes[part] / padded.kept_bytes[part]:.2f}")
        assert packed.kept_bytes[part] < 0.95 * padded.kept_bytes[part]
    assert packed.kept_bytes["image"] == padded.kept_bytes["image"]
