"""Compile every Triton kernel of a layer for an NVIDIA GPU, which need not be there, and print a line of JSON for each.

The layer is called on the CPU with a launch that compiles instead of running, so the kernels get the arguments and
constants that a GPU gives them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from translution.models import Translution
from translution.models.ops.fused import gradient_kernels, kernels, support, tile

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
DTYPES = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
H100 = GPUTarget("cuda", 90, 32)


def main() -> None:
    """Call a layer with a plain role, forward and backward, in every dtype."""
    label, done = "", set()

    def compile_kernel(
        name: str, programs: int, arguments: Sequence[Any], constants: dict[str, Any], config: Any, **_: Any
    ) -> None:
        kernel = getattr(kernels, name, None) or getattr(gradient_kernels, name)
        given = dict(zip((n for n in kernel.arg_names if n not in constants), arguments, strict=True))
        types = {n: TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for n, x in given.items()}
        signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
        kinds = ("QUERY_TABLE", "ADD") if dtype in (torch.bfloat16, torch.float32) else ()
        key = (label, name, *(constants.get(n) for n in kinds))
        if key in done:
            return
        done.add(key)
        # Torch aligns its tensors; without that, loads are not asynchronous.
        aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind.startswith("*")}
        values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        options |= {} if config.registers is None else {"maxnreg": config.registers}
        made = triton.compile(ASTSource(kernel, signature, values, aligned), target=H100, options=options)
        text = made.asm["ptx"]
        tables = [constants.get(f"{role}_TABLE", name != "plain_gradients_kernel") for role in ("QUERY", "KEY")]
        line = {
            "name": name,
            "multiplies": any(tables),
            "dtype": label,
            "shared_bytes": made.metadata.shared,
            "tensor_core_products": text.count("wgmma.mma_async") + text.count("mma.sync"),
        }
        print(json.dumps(line), flush=True)

    tile.launch_kernel = compile_kernel
    tile.product_precision = lambda _: precision
    tile.choose_config = lambda _, offered, launch, **more: offered[0]
    support.interpreted = lambda: True
    for dtype, precision in DTYPES:
        label = str(dtype).removeprefix("torch.") + (" as tf32" if precision == "tf32" else "")
        layer = Translution(768, 12, length=2, roles="kv", implementation="fused").to(dtype)
        layer(torch.zeros(1, 2, 768, dtype=dtype, requires_grad=True)).sum().backward()


if __name__ == "__main__":
    main()
