"""`python -m benchmarks.sdf`: cost, accuracy and size of the SDF beside mesh2sdf and libigl.

It measures the CPU implementation. `benchmarks.sdf_gpu` compares the GPU with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from pipeline.config import PRESETS
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.core.grid import check_resolution
from pipeline.sources import open_source

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PROCEDURAL_MESHES = 6
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA", "IGL")}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SdfBenchmark:
    """Measure CPU seconds, peak memory, surface error and stored size of the SDF."""

    meshes: Path | None = None
    """Folder of mesh files. None measures a few procedural shapes."""

    names: tuple[str, ...] = ()
    """Names of the files to measure. If none is given, all files are measured."""

    limit: int | None = None
    """Number of files to measure, in the order of their names. None measures all."""

    resolutions: tuple[int, ...] = (128, 256, 512, 1024)
    """Resolutions that are measured separately, each with a topology of the same resolution."""

    full_resolutions: tuple[int, ...] = PRESETS["full"].resolutions
    """Resolutions that are computed from one topology, as in a build, and stored."""

    topology_resolution: int = PRESETS["full"].decision_resolution
    """Resolution of the topology for the full resolutions."""

    peers: tuple[Literal["mesh2sdf", "libigl"], ...] = ("mesh2sdf", "libigl")
    """Libraries to compare with. Libraries that are not installed are skipped."""

    peer_names: tuple[str, ...] = ()
    """Names of the files on which the other libraries are measured. If none is given, all are."""

    mesh2sdf_resolutions: tuple[int, ...] = (64, 128)
    """Resolutions at which mesh2sdf is measured. The largest one is also measured without its
    repair. 256 takes minutes per mesh."""

    samples: int = 20_000
    """Number of grid points at which errors are measured."""

    timeout_s: float = 3600.0
    """Longest time of one measurement in seconds."""

    out: Path = Path("benchmarks/results/sdf.json")
    """JSON file for the results."""

    def __post_init__(self):
        for resolution in (*self.resolutions, *self.full_resolutions, *self.mesh2sdf_resolutions):
            check_resolution(resolution)
            if resolution < 64:
                raise ValueError(f"resolutions must be at least 64, got {resolution}")
        for name in ("samples", "timeout_s", "limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")


def measure(cfg: SdfBenchmark) -> dict[str, Any]:
    """Run all measurements one after another, each in a new process.

    `cfg.out` is rewritten after each mesh.

    Returns:
        "machine", "options", and lists of rows: "rows" of single resolutions, "full" of all
        resolutions from one topology, "left_out" of meshes that were not measured.
    """
    peers = [peer for peer in dict.fromkeys(cfg.peers) if _version(peer)]
    for peer in sorted({*cfg.peers} - {*peers}):
        log.info("%s is not installed and is skipped.", peer)
    results: dict[str, Any] = {
        "machine": machine(peers),
        "options": _options(cfg),
        "rows": [],
        "full": [],
        "left_out": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, path) in enumerate(_files(cfg, Path(scratch))):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            on_peers = [peer for peer in peers if not cfg.peer_names or name in cfg.peer_names]
            _measure_mesh(cfg, name, path, folder, on_peers, results)
            cfg.out.parent.mkdir(parents=True, exist_ok=True)
            cfg.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _measure_mesh(
    cfg: SdfBenchmark,
    name: str,
    path: Path,
    folder: Path,
    peers: Sequence[str],
    results: dict[str, Any],
) -> None:
    # load the mesh and compute the true distances
    with_fix = sorted(set(cfg.mesh2sdf_resolutions)) if "mesh2sdf" in peers else []
    resolutions = sorted({*cfg.resolutions, *with_fix})
    prepared = run_child(
        folder,
        {
            "method": "prepare",
            "path": str(path),
            "resolutions": resolutions,
            "samples": cfg.samples,
        },
        cfg.timeout_s,
    )
    if "faces" not in prepared:
        log.info("%s is not measured: %s", name, prepared)
        results["left_out"].append({"mesh": name, **prepared})
        return
    # each resolution by each method
    about = {"mesh": name, **prepared}
    for resolution in resolutions:
        libigl = "libigl" in peers and resolution in cfg.resolutions
        methods = ["ours"] + ["libigl"] * libigl + ["mesh2sdf"] * (resolution in with_fix)
        if with_fix and resolution == with_fix[-1]:
            methods.append("mesh2sdf raw")
        for method in methods:
            job = {"method": method, "resolution": resolution, "keep_band": libigl}
            row = {
                **about,
                "resolution": resolution,
                "method": method,
                **run_child(folder, job, cfg.timeout_s),
            }
            log.info(
                "%s R=%d %s: %s",
                name,
                resolution,
                method,
                row.get("failed") or f"{row.get('cpu_s', 0):.2f} CPU-s",
            )
            results["rows"].append(row)
            if "cpu_s" not in row and method == "ours":
                break
        (folder / f"band-{resolution}.npy").unlink(missing_ok=True)
    # all resolutions from one topology
    if cfg.full_resolutions:
        job = {
            "method": "full",
            "resolutions": sorted(set(cfg.full_resolutions)),
            "topology_resolution": cfg.topology_resolution,
        }
        row = {**about, **run_child(folder, job, cfg.timeout_s)}
        log.info(
            "%s all resolutions: %s", name, row.get("failed") or f"{row.get('cpu_s', 0):.2f} CPU-s"
        )
        results["full"].append(row)


def run_child(folder: Path, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run one measurement of `benchmarks.sdf_child` in a new process.

    Args:
        folder: Directory that the measurements of one mesh share.
        job: Method and arguments.
        timeout_s: Longest time in seconds.

    Returns:
        The numbers of the measurement, {"rejected": reason} or {"failed": cause}.
    """
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "benchmarks.sdf_child", str(folder), json.dumps(job)]
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout_s:.0f} s"}
    if done.returncode or not result.exists():
        last = done.stderr.strip().rpartition("\n")[2]
        return {"failed": f"exit code {done.returncode}: {last[:200]}"}
    return json.loads(result.read_text(encoding="utf-8"))


def _files(cfg: SdfBenchmark, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and file of every mesh. UserError if a chosen name does not exist."""
    source = open_source("procedural" if cfg.meshes is None else f"folder:{cfg.meshes}")
    records = {record.url.removeprefix("procedural:"): record for record in source.records()}
    missing = sorted({*cfg.names, *cfg.peer_names} - {*records})
    if missing:
        raise UserError(f"no mesh is called {missing[0]}; choose from the files of --meshes")
    names = [name for name in records if not cfg.names or name in cfg.names]
    limit = cfg.limit
    if cfg.meshes is None and not cfg.names and limit is None:
        limit = PROCEDURAL_MESHES
    for name in islice(names, limit):
        yield name, source.materialize(records[name], scratch).absolute()


def machine(peers: Sequence[str]) -> dict[str, Any]:
    """Return the processor and the versions on which the numbers depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: _version(name) for name in ("numba", "numpy", *peers)}
    return {
        "cpu": next(iter(models), platform.machine()),
        "python": platform.python_version(),
        **versions,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _options(cfg: SdfBenchmark) -> dict[str, Any]:
    """Return the options on which the numbers depend. Local paths are removed."""
    options = {name: value for name, value in asdict(cfg).items() if name not in ("meshes", "out")}
    return {**options, "meshes": "procedural" if cfg.meshes is None else cfg.meshes.absolute().name}


def tables(results: dict[str, Any]) -> str:
    """Format the results as three Markdown tables with explanations."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    parts = [
        machine,
        "## Topology on the same grid, SDF and sharp bits",
        "CPU s excludes the start and compilation. Peak MB is the peak resident memory, and base "
        "the resident memory before the work. Errors are measured in voxels at random grid points "
        "of the band, against brute force. A positive offset means that the surface lies too far "
        "out.",
        markdown_table(_cost_rows(results["rows"])),
    ]
    full = [row for row in results["full"] if "stored" in row]
    if full:
        topology = results["options"]["topology_resolution"]
        parts += [
            f"## All resolutions from one topology at {topology}",
            "Peak MB includes writing the stores.",
            markdown_table(_full_rows(full)),
            "## Stored bytes per cell (8^3 grid points), with metadata and one asset per store",
            markdown_table(_size_rows(full)),
        ]
    left_out = [
        *results["left_out"],
        *(row for row in results["rows"] + results["full"] if "cpu_s" not in row),
    ]
    if left_out:
        parts.append("## Not measured")
        parts.append(
            "\n".join(
                f"- {_where(row)}: {row.get('rejected') or row.get('failed')}" for row in left_out
            )
        )
    return "\n\n".join(parts) + "\n"


def _cost_rows(rows: Sequence[Row]) -> Iterator[Row]:
    ours = {
        (row["mesh"], row["resolution"]): row["cpu_s"]
        for row in rows
        if row["method"] == "ours" and "cpu_s" in row
    }
    for row in rows:
        if "cpu_s" not in row:
            continue
        topology = row["parts_s"].get("topology")
        yield {
            "mesh": row["mesh"],
            "faces": row["faces"],
            "R": row["resolution"],
            "method": row["method"],
            "CPU s": f"{row['cpu_s']:.2f}",
            "topology + sdf": ""
            if topology is None
            else f"{topology:.2f} + {row['parts_s']['sdf']:.2f}",
            "x ours": f"{row['cpu_s'] / ours[row['mesh'], row['resolution']]:.1f}",
            "peak MB": f"{row['peak_mb']:.0f}",
            "base": f"{row['base_mb']:.0f}",
            "cells": row.get("cells", ""),
            "points": row["points"],
            "offset": _number(row.get("offset_voxels"), 4),
            "mean error": _number(row.get("error_voxels"), 4),
            "max": _number(row.get("max_error_voxels"), 2),
            "wrong sign %": _number(row.get("wrong_sign"), 2, 100),
            "not stored %": _number(row.get("missing"), 2, 100),
        }


def _full_rows(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        parts = {
            name.removeprefix("sdf_"): f"{seconds:.2f}" for name, seconds in row["parts_s"].items()
        }
        memory = {"peak MB": f"{row['peak_mb']:.0f}", "base": f"{row['base_mb']:.0f}"}
        yield {
            "mesh": row["mesh"],
            "faces": row["faces"],
            **parts,
            "all CPU s": f"{row['cpu_s']:.2f}",
            **memory,
        }


def _size_rows(rows: Sequence[Row]) -> Iterator[Row]:
    resolutions = list(rows[0]["stored"])
    table = {
        row["mesh"]: {R: row["stored"][R]["bytes"] / row["stored"][R]["cells"] for R in resolutions}
        for row in rows
    }
    for row in rows:
        cells = " / ".join(str(row["stored"][R]["cells"]) for R in resolutions)
        yield {
            "mesh": row["mesh"],
            **{R: f"{table[row['mesh']][R]:.0f}" for R in resolutions},
            "cells": cells,
        }
    cells = " / ".join(
        f"{mean(row['stored'][R]['cells'] for row in rows):.0f}" for R in resolutions
    )
    yield {
        "mesh": "mean",
        **{R: f"{mean(line[R] for line in table.values()):.0f}" for R in resolutions},
        "cells": cells,
    }


def _where(row: Row) -> str:
    return " ".join(
        [row["mesh"], *(str(row[name]) for name in ("resolution", "method") if name in row)]
    )


def _number(value: float | None, digits: int, factor: float = 1) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def markdown_table(rows: Iterator[Row]) -> str:
    """Format rows with equal keys as a Markdown table with aligned columns."""
    table = [{name: str(value) for name, value in row.items()} for row in rows]
    if not table:
        return "(none)"
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    head = "| " + " | ".join(name.ljust(width) for name, width in widths.items()) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths.values()) + "|"
    body = [
        "| " + " | ".join(row[name].rjust(width) for name, width in widths.items()) + " |"
        for row in table
    ]
    return "\n".join([head, rule, *body])


def main(args: Sequence[str]) -> None:
    """Run the command."""
    cfg = parse(SdfBenchmark, args, prog="python -m benchmarks.sdf")
    sys.stdout.write(tables(measure(cfg)))
    log.info("The results are in %s.", cfg.out)


if __name__ == "__main__":
    command(main)
