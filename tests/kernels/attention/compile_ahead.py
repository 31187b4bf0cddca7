"""Compiles the kernels of one SSA step for an architecture, without a GPU, and prints JSON.

`python -m tests.kernels.attention.compile_ahead 80 bfloat16 16 32` (architecture, dtype, H / G, D)
prints the resources that each kernel needs. It must run without the interpreter. The launches are
those that the operators really make: `JITFunction.run` is replaced by the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from kernels.attention.ssa import ssa_backward, ssa_forward
from tests.kernel_inputs import random_index

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
TYPES |= {torch.float64: "*fp64", torch.int64: "*i64", torch.uint8: "*u8", torch.int16: "*i16"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def compile_launch(fn, args, kwargs, arch: int) -> dict:
    """Return registers, spilled bytes, shared memory and float64 operations (PTX) of a launch."""
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    bound = dict(zip(fn.arg_names, args)) | kwargs
    signature, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(fn.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if not parameter.do_not_specialize and value == 1:
                signature[parameter.name], constants[(i,)] = "constexpr", 1
    source = ASTSource(fn, signature, constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    float64 = sorted(set(re.findall(r"\b\w+(?:\.\w+)*\.f64\b", compiled.asm["ptx"])))
    launch = {"name": fn.__name__, "shared": compiled.metadata.shared, "float64": float64}
    return launch | resources(compiled.asm["cubin"])


def resources(cubin: bytes) -> dict:
    """Return registers, and stack and local bytes, from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]) + int(usage["LOCAL"])}


def compile_step(
    arch: int, dtype: torch.dtype, group: int, D: int, G: int = 2, top_k: int = 3
) -> list[dict]:
    """Compile every kernel of forward and backward once, with ordered and unordered windows."""
    index = random_index([700, 300], 24)
    N, P, H = index.num_tokens, index.num_compressed, G * group
    launches: dict[str, dict] = {}

    def record(fn, *args, grid, warmup, **kwargs):
        key = f"{fn.__name__} {[value for value in args if isinstance(value, bool | int)]} {kwargs}"
        if key not in launches:
            launches[key] = compile_launch(fn, args, kwargs, arch)

    triton.JITFunction.run = record
    rows = ((N, H, D), (N, G, D), (N, G, D), (P, G, D), (P, G, D), (N, 3))
    inputs = [torch.zeros(shape, dtype=dtype) for shape in rows]
    for shifted, k in ((False, top_k), (True, index.max_blocks)):
        out, *saved = ssa_forward(inputs, index, k, shifted, 1.0)
        ssa_backward(out, inputs, saved, index, k, shifted, 1.0)
    return list(launches.values())


if __name__ == "__main__":
    arch, dtype, group, D = sys.argv[1:]
    launches = compile_step(int(arch), getattr(torch, dtype), int(group), int(D))
    sys.stdout.write(json.dumps(launches) + "\n")
