"""Which implementation of the operator a call uses.

"auto" takes the first of these that serves:
    fused      on an NVIDIA GPU with Triton: bf16 or fp16, or fp32 if torch allows TF32; widths that are multiples of 16
    batched    on any GPU
    grouped    everywhere
The reference, "naive", is used only where it is asked for.
"""

from __future__ import annotations

import os

import torch

from translution.planner.common import InputError
from translution.planner.config import fits_fused_kernels

from .fused import fp32_products_use_tf32, fused_is_correct, fused_problem

IMPLEMENTATIONS = ("auto", "fused", "batched", "grouped", "naive")
IMPLEMENTATION_ALIASES = {"gather": "naive"}
"""Other names of implementations, which specs and programs used before."""
IMPLEMENTATION_VARIABLE = "TRANSLUTION_IMPLEMENTATION"
"""Environment variable that replaces "auto"."""


def canonical_implementation(name: str, source: str = "implementation") -> str:
    """Return an implementation's name in place of an alias.

    Args:
        name: one of `IMPLEMENTATIONS` or of the aliases.
        source: what gives the name, for the error.

    Raises:
        InputError: if there is no implementation of this name.
    """
    name = IMPLEMENTATION_ALIASES.get(name, name)
    if name not in IMPLEMENTATIONS:
        allowed = ", ".join((*IMPLEMENTATIONS, *IMPLEMENTATION_ALIASES))
        raise InputError(f"{source}: {name!r} is not allowed: must be one of {allowed}")
    return name


def choose_implementation(
    name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, int], heads: int
) -> str:
    """Return the implementation of a call: "fused", "batched", "grouped" or "naive".

    Args:
        name: one of `IMPLEMENTATIONS`.
        device: device of the rows.
        dtype: dtype of the rows.
        widths: input and output width of the matrices.
        heads: number of attention heads.

    Raises:
        InputError: if the environment variable names no implementation, or if "fused" is asked for and cannot be used.
    """
    source = "implementation"
    if name == "auto":
        source = IMPLEMENTATION_VARIABLE
        name = canonical_implementation(os.environ.get(source) or name, source)
    if name == "fused":
        problem = fused_problem(device, dtype, widths, heads)
        if problem is not None:
            raise InputError(f"{source}: 'fused' is not allowed: it {problem}")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "grouped"
    # Exact products of fp32 do not run on tensor cores, and cuBLAS has the faster ones.
    fit = fits_fused_kernels(*widths, heads) and (dtype != torch.float32 or fp32_products_use_tf32())
    if fit and fused_problem(device, dtype, widths, heads) is None and fused_is_correct(device, dtype, widths, heads):
        return "fused"
    return "batched"
