"""The Triton kernel against torch: compiled on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

COMPARE = """
import torch
from coca_scale.losses import caption
device = "cuda" if torch.cuda.is_available() else "cpu"
made = []
for smoothing, z_loss in ((0.0, 0.0), (0.1, 1e-2)):
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (37, 5000):  # less than a block of columns, and more than one
            torch.manual_seed(0)
            hidden = torch.randn(9, 16, device=device).to(dtype)
            weight = torch.randn(vocabulary, 16, device=device).to(dtype)
            labels = torch.randint(0, vocabulary, (9,), device=device)
            found = []
            for kernel in ("torch", "triton"):
                leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
                loss = caption.chunked_cross_entropy(
                    *leaves, labels, chunk_rows=4, label_smoothing=smoothing, z_loss=z_loss,
                    kernel=kernel,
                )
                loss.backward()
                found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
            logits = torch.zeros(1, 2, device=device)
            made.append(caption._implementation("triton", logits).__module__)
            for ours, theirs in zip(*found):
                bound = 2e-6 if dtype == torch.float32 else 1e-2
                error = (ours.double() - theirs.double()).norm() / ours.double().norm()
                assert error <= bound, (smoothing, dtype, vocabulary, error)
assert set(made) == {"coca_scale.losses.softmax_kernel"}, made
print("equal")
"""


def test_the_kernel_gives_what_torch_gives():
    pytest.importorskip("triton", reason="Triton is not installed")
    environ = dict(os.environ)
    if not torch.cuda.is_available():
        environ["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-3000:]


@pytest.mark.parametrize("grads", ["*bf16", "*fp32"])
def test_the_kernel_compiles_for_hopper(grads):
    pytest.importorskip("triton", reason="Triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coca_scale.losses.softmax_kernel import COLUMNS, _kernel

    pointers = {"logits": "*fp32", "labels": "*i64", "grads": grads, "losses": "*fp32"}
    numbers = {"vocabulary": "i32", "smoothing": "fp32", "z_loss": "fp32"}
    chosen = {"with_grads": True, "columns": COLUMNS}
    kinds = {**pointers, **numbers, **dict.fromkeys(chosen, "constexpr")}
    made = triton.compile(ASTSource(_kernel, kinds, chosen), target=GPUTarget("cuda", 90, 32))
    assert "ld.global" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
