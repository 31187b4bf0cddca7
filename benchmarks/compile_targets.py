"""`python -m benchmarks.compile_targets`: every kernel compiled for GPUs that need not be there.

Triton compiles the launches of a training step for each target. The table says which kernels do not
compile, and how the others use the registers and the shared memory of the target.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import triton

from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError
from pipeline.core.files import replacing

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
TargetName = Literal["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
TIMEOUT_S = 3600
# The modules that make the launches, with their dtype and sizes.
STEPS = {
    "attention": ("tests.kernels.attention.compile_ssa", "bfloat16", "16", "32"),
    # 6: every tile size
    "convolution": ("tests.kernels.conv.compile_conv", "bfloat16", "64", "32", "6"),
    "narrow convolution": ("tests.kernels.conv.compile_conv", "bfloat16", "32", "32", "6"),
    "SDF head": ("tests.kernels.conv.compile_sdf_head", "bfloat16", "32"),
    "fused": ("tests.kernels.fused.compile_fused", "bfloat16", "1024", "32"),
    "distances": ("tests.kernels.sdf.compile_sdf", "float64"),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU architecture that the kernels are compiled for.

    Attributes:
        name: Its name for the modules of `STEPS`.
        example: A GPU of this kind.
        shared_limit: Largest shared memory of one program in bytes.
    """

    name: str
    example: str
    shared_limit: int


TARGETS: dict[TargetName, Target] = {
    "sm_80": Target(name="80", example="A100", shared_limit=163 * 1024),
    "sm_90": Target(name="90", example="H100, H200", shared_limit=227 * 1024),
    "sm_100": Target(name="100", example="B200", shared_limit=227 * 1024),
    "sm_120": Target(name="120", example="RTX 5090", shared_limit=99 * 1024),
    "gfx942": Target(name="gfx942", example="MI300X, ROCm", shared_limit=64 * 1024),
}


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compile every kernel for several kinds of GPUs and print a Markdown table."""

    targets: tuple[TargetName, ...] = get_args(TargetName)
    """Kinds of GPUs."""

    out: Path | None = None
    """File to which the launches are also written as JSON."""


def kernels_in_source(folder: Path = ROOT / "kernels") -> set[str]:
    """Return the names of the kernels of a folder that its modules launch.

    A function that only kernels of its module call is no kernel itself, but a part of them.
    """
    return {
        name
        for file in folder.rglob("*.py")
        for name in _launched(ast.parse(file.read_text(encoding="utf-8")))
    }


def _launched(module: ast.Module) -> set[str]:
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    jitted = {
        function
        for function in functions
        if any(ast.unparse(line).startswith("triton.jit") for line in function.decorator_list)
    }
    used = {
        node.id
        for part in module.body
        if part not in jitted
        for node in ast.walk(part)
        if isinstance(node, ast.Name)
    }
    return {function.name for function in jitted} & used


def compiled(target: Target, step: str) -> list[dict[str, Any]]:
    """Compile the launches of a step for a target in a process of its own.

    Returns:
        The launches, as the module of the step prints them.

    Raises:
        RunError: If the process fails.
    """
    module, *arguments = STEPS[step]
    # The interpreter would run the kernels instead of compiling them.
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    log.info("%s: %s", target.name, step)
    ended = subprocess.run(
        [sys.executable, "-m", module, target.name, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=TIMEOUT_S,
    )
    if ended.returncode:
        last = (ended.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise RunError(f"{module} failed for {target.name} with {ended.returncode}: {last}")
    return json.loads(ended.stdout)


def table_row(name: str, target: Target, launches: Sequence[dict[str, Any]]) -> str:
    """Return the row of a target in the Markdown table.

    Args:
        name: Name of the target.
        target: The target.
        launches: Its launches.
    """
    fine = [launch for launch in launches if "failed" not in launch]
    kernels = {launch["name"] for launch in launches}
    failed = sorted({launch["name"] for launch in launches if "failed" in launch})
    too_large = [launch["name"] for launch in fine if launch["shared"] > target.shared_limit]
    spilling = {launch["name"] for launch in fine if launch["spilled"]}

    def largest(key: str) -> str:
        launch = max(fine, key=lambda launch: launch[key])
        return f"{launch[key]} (`{launch['name']}`)" if launch[key] else "0"

    cells = [
        f"{name} ({target.example})",
        f"{len(kernels) - len(failed)} of {len(kernels)}",
        _names(failed),
        str(max(launch["registers"] for launch in fine)),
        f"{len(spilling)}, at most {largest('spilled')}" if spilling else "0",
        f"{largest('shared')} of {target.shared_limit}",
        f"{len(too_large)} of {len(fine)}: {_names(sorted({*too_large}))}" if too_large else "0",
    ]
    return f"| {' | '.join(cells)} |"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def check_complete(launches: Iterable[dict[str, Any]], kernels: Iterable[str]) -> None:
    """Check that every kernel was launched.

    Raises:
        RunError: If one was not.
    """
    missing = sorted(set(kernels) - {launch["name"] for launch in launches})
    if missing:
        raise RunError(f"no step of STEPS launches {', '.join(missing)}; add the launch")


def main(args: Sequence[str]) -> None:
    """Parse the options, compile and print a Markdown table."""
    cfg = parse(CompileConfig, args, prog="python -m benchmarks.compile_targets")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in cfg.targets:
        found[name] = [launch for step in STEPS for launch in compiled(TARGETS[name], step)]
        check_complete(found[name], kernels_in_source())
    lines = [
        f"Triton {triton.__version__}, bf16, every tile size of the convolutions.",
        "",
        "| target | kernels that compile | that do not | most registers | kernels that spill, "
        "bytes a thread | most shared memory of a program, bytes | launches that need more |",
        "|---|---|---|---|---|---|---|",
        *(table_row(name, TARGETS[name], launches) for name, launches in found.items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if cfg.out is not None:
        with replacing(cfg.out) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(main)
