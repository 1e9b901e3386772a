"""Attention in Triton: compared on a GPU, in Triton's interpreter elsewhere; compiled anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.model.triton_kernels import assembled, run

pytest.importorskip("triton", reason="Triton is not installed")

PREPARE = """
from coca_scale.model import attention_kernel

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
            good, figures = near(our, their, x)
            assert good, (length, *figures)
        for x, y in zip(ours, both(attention_kernel.short_attention, qkv, grad, heads)):
            assert torch.equal(x, y), (length, dtype)
# Scores far from zero: the largest of a row is taken off before the powers, and nothing overflows.
qkv, grad = draw(1, 257, 2, torch.float16)
qkv[..., :256] *= 12
ours = both(attention_kernel.short_attention, qkv, grad, 2)
exact = both(attend, qkv.double(), grad.double(), 2)
for x, our in zip(exact, ours):
    assert (our.double() - x).norm() <= 0.02 * x.norm()
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
"""


@pytest.mark.parametrize("script", [COMPARE, OPERATOR], ids=["numbers", "operator"])
def test_short_attention_is_attention(script):
    run(PREPARE + script)


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
    from coca_scale.model import attention_kernel

    kernel = getattr(attention_kernel, name)
    settings = attention_kernel.FORWARD if name == "_forward" else attention_kernel.BACKWARD
    constants = attention_kernel.constants(heads, length, settings)
    kinds = {x: "*fp32" if x in ("lse", "stats") else kind for x in kernel.arg_names}
    made = assembled(kernel, constants, kinds, 90, monkeypatch, capfd)
    assert "wgmma" in made.ptx and "serialized" not in made.log, made.log
    assert made.spilled <= 512, made.log  # before the loops, if at all
    assert made.shared <= 113 * 1024  # two programs at a time on a multiprocessor
