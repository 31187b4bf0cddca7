"""Compare the mesh readers with independent ones on a folder of real files.

`python -m benchmarks.mesh_readers FOLDER ... --assimp PYTHON --blender PYTHON --trimesh PYTHON
--ufbx PROGRAM` reads every mesh file below the folders with each reader, in a process of its own,
and writes a table of agreement by format and a list of all disagreements.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.mesh_io.formats import MESH_FORMATS

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("mesh_readers_child.py")
PEERS = ("assimp", "blender", "trimesh", "ufbx")
RELATIVE_TOLERANCE = 1e-3  # of area and bounding box, relative to the longest side


@dataclass(frozen=True, kw_only=True)
class MeshReadersConfig:
    """Compare the mesh readers of this project with independent ones on real files."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that are searched for mesh files."""

    out: Path = Path("mesh_readers")
    """Directory for the measurements of each reader, the table and the list. A reader whose
    measurements are there already is not run again."""

    python: Path = Path(".venv/bin/python")
    """Interpreter with this project."""

    assimp: Path | None = None
    """Interpreter with assimp-py and numpy. None leaves that reader out."""

    blender: Path | None = None
    """Interpreter with bpy and numpy. None leaves that reader out. This project reads blend and abc
    files through it, too."""

    trimesh: Path | None = None
    """Interpreter with trimesh and the libraries that it reads 3MF and COLLADA with. None leaves
    that reader out."""

    ufbx: Path | None = None
    """Program that `benchmarks/mesh_readers_ufbx.c` becomes with ufbx, for FBX files. None leaves
    that reader out."""

    timeout_s: float = 60.0
    """Largest number of seconds for one file."""


def main(args: Sequence[str]) -> None:
    """Run the comparison."""
    cfg = parse(MeshReadersConfig, args, prog="python -m benchmarks.mesh_readers")
    files = sorted(
        path
        for folder in cfg.folders
        for path in folder.rglob("*")
        if path.suffix[1:].lower() in MESH_FORMATS and path.is_file()
    )
    if not files:
        raise UserError(f"no mesh file below {' '.join(map(str, cfg.folders))}")
    cfg.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for reader, python in [("ours", cfg.python), *((name, getattr(cfg, name)) for name in PEERS)]:
        if python is not None:
            results[reader] = measure(reader, python, files, cfg)
    rows = [compare(path, {name: r[str(path)] for name, r in results.items()}) for path in files]
    (cfg.out / "table.md").write_text(
        table(rows, [name for name in PEERS if name in results]), encoding="utf-8"
    )
    disagreements = [row for row in rows if row["disagrees_with"]]
    lines = [json.dumps(row) for row in disagreements]
    (cfg.out / "disagreements.jsonl").write_text(
        "\n".join(lines) + "\n" if lines else "", encoding="utf-8"
    )
    log.info("%d files, %d disagreements: %s", len(rows), len(disagreements), cfg.out)


def measure(
    reader: str, python: Path, files: Sequence[Path], cfg: MeshReadersConfig
) -> dict[str, dict[str, Any]]:
    """Return {path: result} of one reader. A file that ends its process is marked as a crash."""
    stored = cfg.out / f"{reader}.jsonl"
    results: dict[str, dict[str, Any]] = {}
    if stored.exists():
        for line in stored.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            results[result["path"]] = result
    pending = [path for path in files if str(path) not in results]
    log.info("%s: %d files", reader, len(pending))
    with stored.open("a", encoding="utf-8") as out:
        while pending:
            for result in _run_child(reader, python, pending, cfg):
                out.write(json.dumps(result) + "\n")
                out.flush()
                results[result["path"]] = result
            pending = [path for path in pending if str(path) not in results]
    return results


def _run_child(
    reader: str, python: Path, files: Sequence[Path], cfg: MeshReadersConfig
) -> Iterable[dict[str, Any]]:
    """Yield results until the child has read all files or one of them ends it."""
    command_line = [str(python.absolute())]
    if reader != "ufbx":  # a program of its own
        command_line += [str(CHILD), reader]
    environment = {**os.environ, "PYTHONPATH": str(CHILD.parents[1]) if reader == "ours" else ""}
    if cfg.blender is not None:  # with which this project reads blend and abc files
        environment["BLENDER"] = str(cfg.blender.absolute())
    child = subprocess.Popen(
        command_line,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",  # libraries print names in any encoding
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        for path in files:
            timer = threading.Timer(cfg.timeout_s, child.kill)
            timer.start()
            try:
                child.stdin.write(f"{path}\n")
                child.stdin.flush()
                # Libraries print to standard output, too.
                line = child.stdout.readline()
                while line and not line.startswith('{"path"'):
                    line = child.stdout.readline()
            except BrokenPipeError:
                line = ""
            timed_out = not timer.is_alive()
            timer.cancel()
            if not line:
                error = (
                    f"no result within {cfg.timeout_s:.0f} s" if timed_out else "the process died"
                )
                yield {"path": str(path), "error": error}
                return
            yield json.loads(line)
    finally:
        child.kill()
        child.wait()


def compare(path: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare our result with that of each peer.

    Returns:
        path, format, the results, and {peer: what differs} for peers that disagree. A peer that
        cannot read the file does not disagree.
    """
    ours = results["ours"]
    disagrees = {}
    for name, peer in results.items():
        if name == "ours" or "error" in peer:
            continue
        if "error" in ours:
            disagrees[name] = ["rejected"]
            continue
        # The unit of a file does not matter, because the pipeline normalises the size.
        scale = _longest_side(ours) / max(_longest_side(peer), 1e-30)
        low, high = ([scale * x for x in peer[name]] for name in ("low", "high"))
        area = scale**2 * peer["area"]
        different = []
        if abs(ours["area"] - area) > RELATIVE_TOLERANCE * max(area, 1e-30):
            different.append("area")
        if not _same_box(ours, low, high):
            # assimp and trimesh leave 3MF files lying: z up to y up is (x, z, -y).
            (x, y, z), (x1, y1, z1) = low, high
            turned = _same_box(ours, [x, z, -y1], [x1, z1, -y])
            different.append("axis" if turned else "box")
        if ours["triangles"] != peer["triangles"]:
            different.append("triangles")
        if peer["textures"] is not None and ours["textures"] < peer["textures"]:
            different.append("textures")
        if different:
            disagrees[name] = different
    return {
        "path": str(path),
        "format": path.suffix[1:].lower(),
        "disagrees_with": disagrees,
        "results": results,
    }


def _longest_side(result: dict[str, Any]) -> float:
    return max(high - low for low, high in zip(result["low"], result["high"], strict=True))


def _same_box(ours: dict[str, Any], low: Sequence[float], high: Sequence[float]) -> bool:
    tolerance = RELATIVE_TOLERANCE * max(1e-30, *(b - a for a, b in zip(low, high, strict=True)))
    pairs = zip([*ours["low"], *ours["high"]], [*low, *high], strict=True)
    return all(abs(a - b) <= tolerance for a, b in pairs)


def is_confirmed(row: dict[str, Any]) -> bool:
    """Return whether some peer has the same box and the same area, or rejects the file, too."""
    results = row["results"]
    if "error" in results["ours"]:
        return not row["disagrees_with"]
    return any(
        "error" not in result and not {"area", "box"} & set(row["disagrees_with"].get(name, ()))
        for name, result in results.items()
        if name != "ours"
    )


def table(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    """Return a Markdown table: files by format, and how many agree with each peer.

    "unreadable" counts the files that no reader reads, this project included. "confirmed" counts
    the files whose box and area some peer has, too, or that no peer reads where we reject them.
    "by no reader" counts the files that we read and no peer does.
    """
    by_format: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_format[row["format"]].append(row)
    head = ["format", "files", "read", "unreadable", "with warnings", "confirmed", "by no reader"]
    for peer in peers:
        head += [f"{peer} reads", "same box and area", "same triangles"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in [*sorted(by_format), "all"]:
        chosen = rows if name == "all" else by_format[name]
        read = [row for row in chosen if "error" not in row["results"]["ours"]]
        cells: list[Any] = [name, len(chosen), len(read)]
        cells.append(
            sum(all("error" in result for result in row["results"].values()) for row in chosen)
        )
        cells.append(sum(bool(row["results"]["ours"]["warnings"]) for row in read))
        confirmed = sum(is_confirmed(row) for row in chosen)
        alone = sum(
            all("error" in row["results"][peer] for peer in peers)
            and "error" not in row["results"]["ours"]
            for row in chosen
        )
        cells += [confirmed, alone]
        for peer in peers:
            compared = [row for row in chosen if "error" not in row["results"][peer]]
            differences = Counter(
                word for row in compared for word in set(row["disagrees_with"].get(peer, ()))
            )
            shapes = sum(
                bool({"area", "box", "rejected"} & set(row["disagrees_with"].get(peer, ())))
                for row in compared
            )
            triangles = differences["triangles"] + differences["rejected"]
            cells += [len(compared), len(compared) - shapes, len(compared) - triangles]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(main)
