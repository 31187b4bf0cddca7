"""`python -m benchmarks.sdf_gpu`: time and accuracy of the SDF on a GPU, compared with the CPU.

There are two commands, because the machine with the GPU may have no mesh libraries. `topologies`
writes the topologies of meshes to one file. `measure` computes their distances on both devices.
`benchmarks.sdf` compares with other libraries.
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from pipeline.core.cli import command
from pipeline.core.errors import UserError
from pipeline.core.grid import band, spacing
from pipeline.core.primitives.triangles import pack
from pipeline.core.schema import Bricks
from pipeline.core.subcommands import parse_subcommand
from pipeline.geometry import sdf, sdf_cuda
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.flood_fill import Bins, FloodFill, bin_triangles
from pipeline.geometry.topology import Topology, build_topology
from pipeline.orchestration.isolated_process import IsolatedProcess

log = logging.getLogger(__name__)

PROG = "python -m benchmarks.sdf_gpu"
KERNELS = ("_narrow", "_distances", "_votes")
PARTS = ("triangles", "kinds", "sharp_edges", "bin_of", "blocks", "outside", "whole")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Topologies:
    """Write the topologies of the meshes of a folder to one file."""

    meshes: Path
    """Folder of mesh files."""

    names: tuple[str, ...] = ()
    """Names of the files to use. If none is given, all files are used."""

    topology_resolution: int = 512
    """Resolution of the grid on which inside and outside are decided."""

    out: Path = Path("topologies.npz")
    """File for the topologies."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure CPU and GPU on a file of topologies, and the start of a new process."""

    topologies: Path
    """File that the command topologies has written."""

    resolutions: tuple[int, ...] = (256, 384, 512, 1024)
    """Resolutions to measure."""

    repeats: int = 5
    """Number of measurements on the GPU, of which the median is reported. The CPU is measured
    once."""

    out: Path = Path("benchmarks/results/sdf_gpu.json")
    """JSON file for the results."""


def pack_topologies(cfg: Topologies) -> None:
    """Write a file of topologies. UserError if the folder has none of the files."""
    from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
    from pipeline.mesh_io.load import load
    from pipeline.mesh_io.normalize import normalize

    paths = [
        path for path in sorted(cfg.meshes.iterdir()) if not cfg.names or path.name in cfg.names
    ]
    if not paths:
        named = f" is called {' or '.join(cfg.names)}" if cfg.names else ""
        raise UserError(f"no mesh in {cfg.meshes}{named}; check --meshes and --names")
    packed: dict[str, Any] = {
        "names": [path.name for path in paths],
        "resolution": cfg.topology_resolution,
    }
    for number, path in enumerate(paths):
        mesh = normalize(load(path, LoadConfig()), NormalizeConfig())
        topology = build_topology(mesh, TopologyConfig(resolution=cfg.topology_resolution))
        packed |= {f"{part}{number}": value for part, value in _parts(topology).items()}
        log.info("%s: %d faces, %s", path.name, len(mesh.faces), topology.sign_path)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(cfg.out, **packed)


def _parts(topology: Topology) -> dict[str, np.ndarray]:
    """Return the arrays of a topology that distances need, by the names in the file."""
    flood = topology.flood
    values = (
        topology.triangles,
        topology.kinds,
        topology.sharp_edges,
        flood.bins.bin_of,
        flood.bins.cells,
        flood.outside,
        flood.whole_cells,
    )
    return dict(zip(PARTS, values))


def read_topologies(path: Path) -> dict[str, Topology]:
    """Read a file of topologies.

    Returns:
        The topology of each mesh by name, without the bins and the barrier of its flood fill, which
        distances do not need.
    """
    packed = np.load(path)
    resolution, found = int(packed["resolution"]), {}
    for number, name in enumerate(packed["names"].tolist()):
        triangles, kinds, sharp_edges, bin_of, blocks, outside, whole = (
            packed[f"{part}{number}"] for part in PARTS
        )
        none = np.zeros(len(blocks) + 1, np.int64)
        bins = Bins(
            resolution=resolution,
            bin_of=bin_of,
            cells=blocks,
            offsets=none,
            triangles=np.empty(0, np.int32),
        )
        found[name] = Topology(
            resolution=resolution,
            triangles=triangles,
            kinds=kinds,
            openings=np.full(len(triangles), -1, np.int32),
            sharp_edges=sharp_edges,
            flood=FloodFill(
                bins=bins, barrier=np.zeros_like(outside), outside=outside, whole_cells=whole
            ),
            sign_path="",
            numbers={},
        )
    return found


def measure(cfg: Measure) -> dict[str, Any]:
    """Run all measurements. `cfg.out` is rewritten after each mesh.

    Raises:
        UserError: If there is no CUDA device.
    """
    # new processes come first, because a process with a CUDA context cannot fork
    results: dict[str, Any] = {
        "machine": machine(),
        "resolutions": cfg.resolutions,
        "process": [],
        "rows": [],
    }
    # the first process compiles; the last shows that CUDA does not start under RLIMIT_AS
    for limit in ("RLIMIT_DATA", "RLIMIT_DATA", "RLIMIT_AS"):
        results["process"].append(in_a_process(cfg.topologies, max(cfg.resolutions), limit))
        log.info("%s", results["process"][-1])
    sdf_cuda.check_cuda()
    results["machine"]["gpu"] = sdf_cuda.device_name("cuda")
    topologies = read_topologies(cfg.topologies)
    sdf.compute_bricks(next(iter(topologies.values())), 64)  # compiles the CPU implementation
    for name, topology in topologies.items():
        for resolution in cfg.resolutions:
            row = {
                "mesh": name,
                "faces": len(topology.triangles),
                **compare(topology, resolution, cfg.repeats),
            }
            log.info("%s", row)
            results["rows"].append(row)
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        cfg.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def compare(topology: Topology, resolution: int, repeats: int, device: str = "cuda") -> Row:
    """Measure both devices on one topology.

    Args:
        topology: The topology.
        resolution: Grid points along one side.
        repeats: Number of measurements on the GPU.
        device: "cuda", or "cpu" in tests, where the kernels are interpreted.

    Returns:
        Seconds of `compute_bricks` and of its parts, milliseconds of the kernels, and `difference`.
    """
    tau, h = band(resolution), spacing(resolution)
    half, trusted = sdf.SHEET_HALF_VOXELS * h, sdf.FLOOD_VOXELS * spacing(topology.resolution)

    def fill() -> None:
        for _ in sdf_cuda.fill_cells(
            packed,
            topology.kinds,
            bins,
            topology.flood,
            tau=tau,
            half=half,
            trusted=trusted,
            device=device,
        ):
            pass

    began = time.perf_counter()
    packed = pack(topology.triangles)
    bins = bin_triangles(packed, resolution, max(tau + half, trusted) / h)
    binned = time.perf_counter()
    expected = sdf.compute_bricks(topology, resolution)
    done = time.perf_counter()
    fill()  # compiles the kernels
    row = {
        "resolution": resolution,
        "blocks": len(bins.cells),
        "candidates": len(bins.triangles),
        "cells": len(expected.cells),
        "cpu_s": done - binned,
        "bins_s": binned - began,
        "fill_s": statistics.median(seconds(fill, device) for _ in range(repeats)),
    }
    if device == "cuda":
        whole = [
            seconds(lambda: sdf.compute_bricks(topology, resolution, device), device)
            for _ in range(repeats)
        ]
        row |= {"gpu_s": statistics.median(whole), **kernel_ms(fill)}
        found = sdf.compute_bricks(topology, resolution, device)
        row |= {
            "kernels_ms": sum(row[f"{name}_ms"] for name in KERNELS),
            **difference(found, expected),
        }
    return row


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the wall-clock seconds of a function, including its work on the GPU."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def kernel_ms(work: Callable[[], None]) -> dict[str, float]:
    """Return the GPU milliseconds of each kernel, over all launches of a function."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / 1e3 for event in profile.key_averages()}
    return {f"{name}_ms": spent.get(name, 0.0) for name in KERNELS}


def difference(found: Bricks, expected: Bricks) -> Row:
    """Compare stored bricks.

    Returns:
        The largest difference in voxels and the float16 rounding step, the share of values that
        differ, and the numbers of wrong signs (beyond 1e-3 voxels from the surface), of compared
        values, of cells that only one has and of sharp bits that differ.
    """
    R = expected.resolution
    keys, others = (bricks.cells.astype(np.int64) @ [R * R, R, 1] for bricks in (expected, found))
    both, rows, other_rows = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
    a = expected.values[rows].astype(np.float32)
    b = found.values[other_rows].astype(np.float32)
    voxels = band(R) / spacing(R)
    wrong = (np.signbit(a) != np.signbit(b)) & (np.abs(a) * voxels > 1e-3)
    return {
        "max_voxels": float(np.abs(a - b).max() * voxels),
        "f16_step_voxels": float(voxels * 2**-11),
        "differing": float((a != b).mean()),
        "wrong_signs": int(wrong.sum()),
        "values": a.size,
        "other_cells": len(keys) + len(others) - 2 * len(both),
        "other_sharp_bits": int(
            np.unpackbits(expected.sharp[rows] ^ found.sharp[other_rows]).sum()
        ),
    }


def in_a_process(topologies: Path, resolution: int, limit: str) -> Row:
    """Measure a process as a build starts it for an asset, including the start of CUDA.

    It is forked from a server that has imported everything, and limited to 8 GB.

    Args:
        topologies: File of topologies.
        resolution: The finest resolution.
        limit: Name of the resource limit.
    """
    isolated = IsolatedProcess("benchmarks.sdf_gpu:_warm_up")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "seconds.json"
        end = isolated.call(
            "benchmarks.sdf_gpu:_child",
            (topologies, resolution, out),
            log=Path(scratch) / "log.txt",
            timeout_s=120,
            memory_bytes=8 * 10**9,
            memory_limit=getattr(resource, limit),
        )
        isolated.close()
        found = (
            json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"said": end.detail}
        )
        return {"limit": limit, "ended": end.reason or "well", "wall_s": end.seconds, **found}


def _warm_up() -> None:
    sdf_cuda.warm_up()


def _child(job: tuple[Path, int, Path]) -> None:
    """Measure two runs at 256 and two at the finest resolution, on the first topology."""
    path, resolution, out = job
    topology = next(iter(read_topologies(path).values()))
    sdf.compute_bricks(topology, 256)  # compiles the CPU part
    took = [
        seconds(partial(sdf.compute_bricks, topology, R, "cuda"), "cuda")
        for R in (256, 256, resolution, resolution)
    ]
    at_hand = {f"run_{number}_s": value for number, value in enumerate(took)}
    out.write_text(
        json.dumps({**at_hand, "gpu_mb": torch.cuda.max_memory_reserved() >> 20}), encoding="utf-8"
    )


def machine() -> Row:
    """Return the processor and the versions on which the numbers depend."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return {"cpu": next(iter(models), platform.machine()), **versions, "numpy": np.__version__}


def table(results: dict[str, Any]) -> str:
    """Format the results as a Markdown table."""
    head = ("mesh", "faces", "R", "cells", "CPU s", "GPU s", "x", "bins s", "fill s", "kernels ms")
    head += ("narrow", "distances", "votes", "max voxels", "f16 step")
    head += ("wrong signs", "other cells", "sharp bits")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results["rows"]:
        cells = [row["mesh"], row["faces"], row["resolution"], row["cells"], f"{row['cpu_s']:.3f}"]
        cells += [
            f"{row['gpu_s']:.3f}",
            f"{row['cpu_s'] / row['gpu_s']:.1f}",
            f"{row['bins_s']:.3f}",
        ]
        cells += [
            f"{row['fill_s']:.3f}",
            f"{row['kernels_ms']:.2f}",
            *(f"{row[f'{name}_ms']:.2f}" for name in KERNELS),
        ]
        cells += [
            f"{row['max_voxels']:.5f}",
            f"{row['f16_step_voxels']:.5f}",
            row["wrong_signs"],
            row["other_cells"],
        ]
        lines.append("| " + " | ".join(map(str, [*cells, row["other_sharp_bits"]])) + " |")
    return "\n".join(lines) + "\n"


def run(cfg: Measure) -> None:
    """Run the command `measure`."""
    results = measure(cfg)
    sys.stdout.write(table(results))
    log.info("The results are in %s.", cfg.out)


def main(args: Sequence[str]) -> None:
    """Run the command."""
    name, cfg = parse_subcommand({"topologies": Topologies, "measure": Measure}, args, prog=PROG)
    {"topologies": pack_topologies, "measure": run}[name](cfg)


if __name__ == "__main__":
    command(main)
