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
    """Copy the attribution of a build to the run that trains on it, also if the run is stopped.

    A build of an older version has none, and then nothing is copied. A run that has not begun has
    no directory, and gets none.

    Args:
        data: Directory or URL of the build.
        out: Directory of the run.
        is_first: Whether this process writes files.
    """
    try:
        yield
    finally:
        if is_first and out.is_dir() and (data / ATTRIBUTION).exists():
            write_atomically(out / ATTRIBUTION, (data / ATTRIBUTION).read_bytes())


def export_attribution(checkpoints: Iterable[Path], out: Path) -> int:
    """Write the attribution of all runs that checkpoints come from, each asset once.

    Args:
        checkpoints: The checkpoints. Their runs are the nearest directories above them.
        out: Directory of the export.

    Returns:
        The number of assets. If no run has an attribution, nothing is written.
    """
    rows: dict[str, dict[str, str]] = {}
    for checkpoint in checkpoints:
        folders = [checkpoint, *checkpoint.absolute().parents[:LEVELS]]
        path = next((f / ATTRIBUTION for f in folders if (f / ATTRIBUTION).is_file()), None)
        if path is not None:
            with path.open(encoding="utf-8", newline="") as file:
                rows |= {row["uid"]: row for row in csv.DictReader(file)}
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, next(iter(rows.values())), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write_atomically(out / ATTRIBUTION, text.getvalue().encode())
    return len(rows)
