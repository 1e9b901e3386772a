"""Kernels in Triton without a GPU: run in its interpreter, compiled for any GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch

PREPARE = """
import numpy
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter
from torch.utils.flop_counter import FlopCounterMode

device = "cuda" if torch.cuda.is_available() else "cpu"
seed = torch.seed()

# The interpreter multiplies matrices of bfloat16 as the integers that hold them, and cuts off
# the bits that a GPU rounds.
multiply = interpreter.InterpreterBuilder.create_dot
def as_fp32(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(data.view(numpy.float32), tl.float32)
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(
    self, as_fp32(a), as_fp32(b), *rest
)
def near(ours, theirs, exact):
    # at most so much farther from what float64 gives than torch's own
    cut_off = device == "cpu" and ours.dtype == torch.bfloat16
    times, rest = (3.0, 4e-3) if cut_off else (1.5, 1e-6)
    bound = max(times * (theirs.double() - exact).norm(), rest * exact.norm())
    error = (ours.double() - exact).norm()
    return bool(error <= bound), (seed, ours.dtype, error / exact.norm(), bound / exact.norm())

# What is left in new memory is seen: it is no number.
def poisoned(make):
    def made(*args, **kwargs):
        x = make(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x
    return made
torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
torch.empty_like = poisoned(torch.empty_like)
"""


def run(script: str) -> None:
    """A script behind `PREPARE`, in a process that interprets kernels where there is no GPU."""
    environ = dict(os.environ)
    if not torch.cuda.is_available():
        environ["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREPARE + script + "\nprint('equal')\n")],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-3000:]


class Assembled(NamedTuple):
    """What an assembler says of a kernel.

    Attributes:
        ptx: its code before.
        log: the assembler's words.
        spilled: bytes written to memory and read, for want of registers.
        shared: bytes of shared memory of a program.
    """

    ptx: str
    log: str
    spilled: int
    shared: int


def assembled(kernel, constants, kinds, capability, monkeypatch, capfd) -> Assembled:
    """Compile a kernel for a GPU that need not be here.

    Args:
        kernel: of Triton.
        constants: by name, with `num_warps` and `num_stages`.
        kinds: of its other arguments, by name.
        capability: of the GPU, such as 90.
        monkeypatch: pytest's.
        capfd: pytest's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(triton.knobs.nvidia, "dump_ptxas_log"):
        pytest.skip("this Triton does not tell what its assembler says")
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    names = [name for name in kernel.arg_names if name not in constants]
    places = {name: (kernel.arg_names.index(name),) for name in names}
    aligned = {places[n]: [["tt.divisibility", 16]] for n in names if kinds[n].startswith("*")}
    chosen = {**{n: kinds[n] for n in names}, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, chosen, constants, aligned)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    log = capfd.readouterr().out
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill", log)]
    assert len(spilled) == 2, log
    return Assembled(made.asm["ptx"], log, sum(spilled), made.metadata.shared)
