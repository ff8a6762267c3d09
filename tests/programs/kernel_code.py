"""Compile the fused kernels for an H100, which need not be there, and show what their code asks of it.

    python tests/programs/kernel_code.py
    python tests/programs/kernel_code.py --first --dtypes float16 tf32 --json

A layer is called on the CPU with a launch that compiles instead of running, so kernels get the arguments and constants
that a GPU gives them. The code is read with the disassembler that comes with Triton.

The column *issue* compares two rates of an SM. The four schedulers issue one instruction a clock each; the tensor cores
do 2,048 multiply-adds of bf16 a clock. Of a kernel's loop, or of all its code where the loop is unrolled, it is the
time to issue the instructions over the time of the products. A kernel near or above 100% cannot keep the tensor cores
busy. Nothing here says how long loads take.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from translution.models import Translution
from translution.models.ops.fused import gradient_kernels, kernels, support, tile
from translution.models.ops.fused.configs import KernelConfig

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
DTYPES = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
"""Dtype and precision of products by name."""
H100 = GPUTarget("cuda", 90, 32)
_SHARED_BYTES, _REGISTERS, _WARPS = 228 * 1024, 65_536, 64
"""Of one SM. Each program takes 1 KiB of shared memory more than it asks for (CUDA's tuning guide for Hopper)."""
_MULTIPLY_ADDS = 2_048
"""Of bf16, of one SM in one clock: 989 TFLOP/s, 132 SMs, 1.83 GHz (data sheet of the H100 SXM)."""
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([^;]*);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")


@dataclass(frozen=True)
class Code:
    """What the code of a kernel asks of an SM."""

    registers: int
    spilled_bytes: int
    """Of a thread: registers that did not fit."""
    products: int
    """Instructions for the tensor cores in all its code."""
    instructions: int
    """Of a thread, in the first loop with products; in all its code where there is none."""
    issue: float | None
    """Time to issue the instructions over the time of the products; None without products of half-precision numbers."""


def main() -> None:
    """Compile the kernels of a layer, forward and backward, and print a line for each configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=768, help="of the layer")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--roles", default="qkv", help='those with matrices, for instance "kv"')
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    for dtype in given.dtypes:
        for row in compile_layer(dtype, given.width, given.heads, given.roles, only_first=given.first):
            print(json.dumps(row) if given.json else text(row), flush=True)


def text(row: dict[str, Any]) -> str:
    """Return one configuration of a kernel as a line."""
    config, issue = row["config"], row["issue"]
    sizes = (
        f"{config['rows']}x{config['inner']}x{config['columns']}, {config['warps']} warps, {config['stages']} stages"
    )
    limit = "" if config["registers"] is None else f", at most {config['registers']} registers"
    flags = " ".join(f"{name}={value}" for name, value in row["flags"].items())
    return (
        f"{row['kernel']} {flags} {row['dtype']} ({sizes}{limit}): {row['registers']} registers, "
        f"{row['spilled_bytes']} bytes spilled, {row['shared_bytes'] / 1024:.0f} KiB shared, "
        f"{row['programs_per_sm']} programs an SM, {row['products']} products, "
        f"{row['instructions']} instructions" + ("" if issue is None else f", issue {issue:.0%}")
    )


def compile_layer(dtype: str, width: int, heads: int, roles: str, *, only_first: bool) -> list[dict[str, Any]]:
    """Return a row for every configuration of every kernel that a layer calls.

    Args:
        dtype: one of `DTYPES`.
        width: of the layer.
        heads: number of heads.
        roles: roles with matrices.
        only_first: take the first configuration of each kernel.
    """
    rows: dict[str, dict[str, Any]] = {}

    def compile_kernel(
        name: str,
        programs: int,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        config: KernelConfig,
        *,
        only_compile: bool = False,
    ) -> None:
        flags = {key: value for key, value in constants.items() if isinstance(value, bool)}
        key = f"{name} {flags} {config}"
        if key in rows:
            return
        made = compile_for_gpu(name, arguments, constants, config)
        code, shared = read_code(made.asm["cubin"], config.warps), int(made.metadata.shared)
        rows[key] = {"kernel": name, "flags": flags, "dtype": dtype, "config": vars(config), **vars(code)}
        rows[key] |= {"shared_bytes": shared, "programs_per_sm": programs_per_sm(code, config, shared)}

    def choose(_: object, offered: tuple[KernelConfig, ...], launch: Any, *, timed: bool) -> KernelConfig:
        for config in () if only_first else offered:
            launch(config, only_compile=True)
        return offered[0]

    values, precision = DTYPES[dtype]
    patched = {(tile, "launch_kernel"): compile_kernel, (tile, "choose_config"): choose}
    patched |= {(tile, "product_precision"): lambda _: precision, (support, "interpreted"): lambda: True}
    before = {(module, name): getattr(module, name) for module, name in patched}
    try:
        for (module, name), value in patched.items():
            setattr(module, name, value)
        layer = Translution(width, heads, length=2, roles=roles, implementation="fused").to(values)
        layer(torch.zeros(1, 2, width, dtype=values, requires_grad=True)).sum().backward()
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
    return list(rows.values())


def compile_for_gpu(name: str, arguments: Sequence[Any], constants: dict[str, Any], config: KernelConfig) -> Any:
    """Compile a kernel for an H100.

    Args:
        name: of the kernel.
        arguments: tensors and integers as the launch gets them.
        constants: values it is compiled for.
        config: number of warps and stages, and limit of registers.
    """
    kernel = getattr(kernels, name, None) or getattr(gradient_kernels, name)
    given = dict(zip((n for n in kernel.arg_names if n not in constants), arguments, strict=True))
    types = {n: TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for n, x in given.items()}
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    # Torch aligns its tensors; without that, loads are not asynchronous.
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind.startswith("*")}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=H100, options=config.options)


def programs_per_sm(code: Code, config: KernelConfig, shared_bytes: int) -> int:
    """Return the number of programs that an SM runs at a time."""
    by_registers = _REGISTERS // (-(-code.registers // 8) * 8 * 32 * config.warps)
    return min(by_registers, _SHARED_BYTES // (shared_bytes + 1024), _WARPS // config.warps)


def read_code(cubin: bytes, warps: int) -> Code:
    """Read the machine code of a kernel.

    Args:
        cubin: as the compiler returns it.
        warps: of a program.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        lines = _tool("nvdisasm", "-c", file.name).splitlines()
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    code = [found[1] for line in lines if (found := _INSTRUCTION.match(line))]
    loop = _loop(lines) or code
    clocks = sum(map(_product_clocks, loop)) * warps / 4
    return Code(
        numbers["REG"],
        numbers["STACK"],
        sum(line.startswith(("HGMMA", "HMMA")) for line in code),
        len(loop),
        len(loop) * warps / 4 / clocks if clocks else None,
    )


def _tool(name: str, *arguments: str) -> str:
    """Run one of the programs that come with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def _loop(lines: Sequence[str]) -> list[str]:
    """Return the instructions of the first loop with products; none if it is unrolled."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", found[1])
            body = code[labels.get(target[1], len(code)) :] if target else []
            if any(map(_product_clocks, body)):
                return body
    return []


def _product_clocks(instruction: str) -> float:
    """Return the clocks of the tensor cores for an instruction of four warps; 0 for others."""
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(16)\.", instruction)
    return 0.0 if shape is None else int(shape[1]) * int(shape[2]) * int(shape[3]) / _MULTIPLY_ADDS


if __name__ == "__main__":
    main()
