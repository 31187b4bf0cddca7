"""Compiles Triton launches for a GPU that need not be there, and reports what each one needs.

The launches are those that the operators really make: `JITFunction.run` is replaced by the
compiler. This must run without the interpreter, so that tests start a process for it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, CompilationError
from triton.runtime.errors import TritonError

SPILL_LIMIT = 256  # bytes per thread: what a register cap that buys occupancy may cost
SHARED_LIMIT = 58 * 1024  # at least two programs in the 164 KB of an A100 multiprocessor

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
TYPES |= {torch.float64: "*fp64", torch.int64: "*i64", torch.uint8: "*u8", torch.int16: "*i16"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def gpu_target(name: str) -> GPUTarget:
    """Return the target of a name such as "90" (sm_90 of CUDA) or "gfx942" (ROCm)."""
    return (
        GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)
    )


class TargetDriver:
    """Stands in for the driver of a GPU, which kernels ask for their target while they compile."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target


def compile_launch(fn, args, kwargs, target: GPUTarget) -> dict:
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
    triton.runtime.driver.set_active(TargetDriver(target))
    compiled = triton.compile(source, target=target, options=options)
    launch = {"name": fn.__name__, "shared": compiled.metadata.shared}
    if target.backend == "hip":
        return launch | rocm_resources(compiled.asm["amdgcn"])
    float64 = sorted(set(re.findall(r"\b\w+(?:\.\w+)*\.f64\b", compiled.asm["ptx"])))
    return launch | {"float64": float64} | resources(compiled.asm["cubin"])


def rocm_resources(assembly: str) -> dict:
    """Return vector registers and the bytes of scratch memory per thread, from the assembly."""
    values = {
        name: int(re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    }
    return {"registers": values["vgpr_count"], "spilled": values["private_segment_fixed_size"]}


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


def record_launches(target: GPUTarget) -> dict[str, dict]:
    """Let every launch be compiled instead of run.

    Returns:
        What `compile_launch` says about the launches that follow, each different one once. A launch
        that does not compile has its name and the reason, "failed".
    """
    launches: dict[str, dict] = {}

    def record(fn, *args, grid, warmup, **kwargs):
        key = f"{fn.__name__} {[value for value in args if isinstance(value, int)]} {kwargs}"
        if key not in launches:
            try:
                launches[key] = compile_launch(fn, args, kwargs, target)
            except (RuntimeError, CompilationError, TritonError) as error:
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                launches[key] = {"name": fn.__name__, "failed": reason}

    triton.JITFunction.run = record
    return launches


def print_launches(launch_all: Callable[..., None]) -> None:
    """Print the launches of a function as JSON: the command of a module for `compiled_launches`.

    Args:
        launch_all: Makes the launches, given the target, the dtype and the numbers that follow them
            on the command line.
    """
    name, dtype, *sizes = sys.argv[1:]
    target = gpu_target(name)
    launches = record_launches(target)
    launch_all(target, getattr(torch, dtype), *map(int, sizes))
    sys.stdout.write(json.dumps(list(launches.values())) + "\n")


ARCHITECTURES = [pytest.param(80, marks=pytest.mark.slow), 90]


def on_architectures(fast: str, *, slow: Sequence[str]) -> Callable[[Callable], Callable]:
    """Run a test for A100 and Hopper (`arch`) and for the arguments of a command (`arguments`).

    The kernels of a step compile for up to a minute, so only the fast case on Hopper is not slow.

    Args:
        fast: The dtype and the numbers that follow the architecture on the command line.
        slow: Other arguments, whose tests are slow.
    """
    cases = [fast, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]

    def parametrize(test: Callable) -> Callable:
        with_arguments = pytest.mark.parametrize("arguments", cases)(test)
        return pytest.mark.parametrize("arch", ARCHITECTURES)(with_arguments)

    return parametrize
