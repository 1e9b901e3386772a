"""Attention in Triton: compared on a GPU, in Triton's interpreter elsewhere; compiled anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

PREPARE = """
import numpy
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter
from torch.utils.flop_counter import FlopCounterMode
from coca_scale.model import attention_kernel

device = "cuda" if torch.cuda.is_available() else "cpu"
seed = torch.seed()

# The interpreter multiplies matrices of bfloat16 as the integers that hold them, and cuts off
# the bits that a GPU rounds.
multiply = interpreter.InterpreterBuilder.create_dot
def wide(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(data.view(numpy.float32), tl.float32)
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(
    self, wide(a), wide(b), *rest
)
def near(dtype):
    return (3.0, 4e-3) if device == "cpu" and dtype == torch.bfloat16 else (1.5, 1e-6)

def attend(qkv, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def draw(batch, length, heads, dtype):
    qkv = torch.randn(batch, length, heads * 192, device=device).to(dtype)
    return qkv, torch.randn(batch, length, heads * 64, device=device).to(dtype)

def both(function, qkv, grad, heads):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv, heads)
    out.backward(grad)
    return out.detach(), qkv.grad

# What is left in new memory is seen: it is no number.
def poisoned(make):
    return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))
torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
torch.empty_like = poisoned(torch.empty_like)
"""

COMPARE = """
for length in (1, 17, 50, 64, 65, 129, 197, 256, 257):
    heads = 2 + length % 2
    for dtype in (torch.float16, torch.bfloat16):
        qkv, grad = draw(2, length, heads, dtype)
        assert attention_kernel.takes(qkv, heads)
        exact = both(attend, qkv.double(), grad.double(), heads)
        theirs = both(attend, qkv, grad, heads)
        ours = both(attention_kernel.short_attention, qkv, grad, heads)
        for x, their, our in zip(exact, theirs, ours):
            assert our.dtype == dtype and our.is_contiguous()
            times, rest = near(dtype)
            bound = max(times * (their.double() - x).norm(), rest * x.norm())
            error = (our.double() - x).norm()
            assert error <= bound, (seed, length, dtype, error / x.norm(), bound / x.norm())
        for x, y in zip(ours, both(attention_kernel.short_attention, qkv, grad, heads)):
            assert torch.equal(x, y), (length, dtype)
# Scores far from zero: the largest of a row is taken off before the powers, and nothing overflows.
qkv, grad = draw(1, 257, 2, torch.float16)
qkv[..., :256] *= 12
ours = both(attention_kernel.short_attention, qkv, grad, 2)
exact = both(attend, qkv.double(), grad.double(), 2)
for x, our in zip(exact, ours):
    assert (our.double() - x).norm() <= 0.02 * x.norm()
print("equal")
"""

OPERATOR = """
qkv, grad = draw(2, 65, 2, torch.float16)
def block(x):
    return attention_kernel.short_attention(x * 2, 2) * 3
found = []
for function in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
    x = qkv.clone().requires_grad_()
    y = function(x)
    y.backward(grad)
    found.append((y.detach(), x.grad))
assert all(torch.equal(a, b) for a, b in zip(*found))

counts = []
for function in (attention_kernel.short_attention, attend):
    x = qkv.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        function(x, 2).backward(grad)
    counts.append(counter.get_total_flops())
score = 2 * 2 * 2 * 65 * 65 * 64
assert counts[0] == 7 * score, (counts, score)

torch.library.opcheck(torch.ops.coca_scale.short_attention.default, (qkv.requires_grad_(), 2))
out, lse = torch.ops.coca_scale.short_attention(qkv.detach(), 2)
torch.library.opcheck(
    torch.ops.coca_scale.short_attention_backward.default, (grad, qkv.detach(), out, lse, 2)
)
print("equal")
"""


@pytest.mark.parametrize("script", [COMPARE, OPERATOR], ids=["numbers", "operator"])
def test_short_attention_is_attention(script):
    environ = dict(os.environ)
    if not torch.cuda.is_available():
        environ["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREPARE + script)],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-3000:]


def test_what_is_too_long_or_not_half_precision_is_left_to_torch():
    from coca_scale.model.attention_kernel import takes

    qkv = torch.empty(2, 257, 384, dtype=torch.bfloat16, device="meta")
    assert not takes(qkv, 2)  # no GPU
    script = """
    import torch
    from coca_scale.model.attention_kernel import takes
    qkv = torch.empty(2, 257, 384, dtype=torch.bfloat16)
    odd = [qkv.float(), qkv[0], torch.cat([qkv, qkv[:, :1]], 1), qkv[:, :0], qkv[..., :192]]
    assert takes(qkv, 2) and not takes(qkv, 4) and not any(takes(x, 2) for x in odd)
    """
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environ, check=True)


@pytest.mark.parametrize("name", ["_forward", "_backward"])
@pytest.mark.parametrize(
    ("kind", "heads", "length"),
    [("*bf16", 16, 257), ("*fp16", 16, 257), ("*bf16", 12, 197), ("*bf16", 12, 50)],
)
def test_the_kernels_keep_to_the_registers_of_a_hopper(
    name, kind, heads, length, monkeypatch, capfd
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coca_scale.model import attention_kernel

    kernel = getattr(attention_kernel, name)
    settings = attention_kernel.FORWARD if name == "_forward" else attention_kernel.BACKWARD
    constants = attention_kernel.constants(heads, length, settings)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    tensors = [x for x in kernel.arg_names if x not in constants]
    kinds = {x: "*fp32" if x in ("lse", "stats") else kind for x in tensors}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))}
    chosen = dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {**kinds, **chosen}, constants, aligned)
    if not hasattr(triton.knobs.nvidia, "dump_ptxas_log"):
        pytest.skip("this Triton does not tell what its assembler says")
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assembler = capfd.readouterr().out
    assert "wgmma" in made.asm["ptx"] and "serialized" not in assembler, assembler
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill", assembler)]
    assert len(spilled) == 2 and sum(spilled) <= 512, assembler  # before the loops, if at all
    assert made.metadata.shared <= 113 * 1024  # two programs at a time on a multiprocessor
