"""Attribution: who made the assets that a run was trained on, carried from builds to exports."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.files import write_atomically
from pipeline.storage.remote import StorePath

ATTRIBUTION = "attribution.csv"  # written by pipeline.build, one row per finished asset
LEVELS = 3  # directories between a checkpoint and its run at most


@contextmanager
def attributed(data: StorePath, out: Path, is_first: bool) -> Iterator[None]:
    """Add the attribution of a build to the run that trains on it, also if the run is stopped.

    The run keeps the rows that it has, such as those of the weights that it started from. A build
    of an older version has none, and then nothing is added. A run that has not begun has no
    directory, and gets none.

    Args:
        data: Directory or URL of the build.
        out: Directory of the run.
        is_first: Whether this process writes files.
    """
    try:
        yield
    finally:
        if is_first and out.is_dir():
            add_attribution([data / ATTRIBUTION], out)


def attribute_weights(init: Path, out: Path) -> None:
    """Add the attribution of the weights that a run starts from to the run.

    Weights without an attribution add nothing.

    Args:
        init: Directory of the weights. Their attribution is the nearest one in it and above it.
        out: Directory of the run. It is made if there is something to write.
    """
    add_attribution(_attributions_of([init]), out)


def export_attribution(checkpoints: Iterable[Path], out: Path, *, keep: bool = False) -> int:
    """Write the attribution of all runs that checkpoints come from, each asset once.

    Args:
        checkpoints: The checkpoints. Their runs are the nearest directories above them.
        out: Directory of the export.
        keep: Keep the rows that the export has, because some of its stages stay.

    Returns:
        The number of assets. If no run has an attribution, nothing is written.
    """
    sources = _attributions_of(checkpoints)
    if keep:
        return add_attribution(sources, out)
    return _write(_read(sources), out)


def add_attribution(sources: Iterable[StorePath], out: Path) -> int:
    """Add rows to the attribution of a directory, each asset once, and return their number.

    Args:
        sources: Attributions to add. Missing ones are left out. Later rows of an asset replace
            earlier ones.
        out: The directory, which is made if there is something to write.
    """
    return _write(_read([out / ATTRIBUTION, *sources]), out)


def _attributions_of(checkpoints: Iterable[Path]) -> list[Path]:
    """Return the nearest attribution in or above each checkpoint that has one."""
    paths = []
    for checkpoint in checkpoints:
        folders = [checkpoint, *checkpoint.absolute().parents[:LEVELS]]
        paths += [f / ATTRIBUTION for f in folders if (f / ATTRIBUTION).is_file()][:1]
    return paths


def _read(paths: Iterable[StorePath]) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for path in paths:
        if path.exists():
            text = path.read_bytes().decode("utf-8")
            rows |= {row["uid"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    return list(rows.values())


def _write(rows: list[dict[str, str]], out: Path) -> int:
    if rows:
        text = io.StringIO(newline="")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ATTRIBUTION, text.getvalue().encode())
    return len(rows)
