"""The embedded data set: a few hundred seeded shapes that need neither network nor files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.files import write_atomically
from pipeline.core.hashing import make_uid, seed_of
from pipeline.core.schema import Record
from pipeline.sources.shapes import FAMILIES, to_glb
from pipeline.sources.shapes.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class ProceduralSource:
    """Shapes that are generated from their keys, such as 0017-torus_knot.

    Shape i belongs to family i modulo the number of families, so a short list is a varied one. The
    key, and the url after "procedural:", is NUMBER-FAMILY.

    Args:
        count: Number of shapes.
    """

    count: int = 300

    @property
    def name(self) -> str:
        return "procedural"

    def records(self) -> Iterator[Record]:
        """Yield one record per shape."""
        families = list(FAMILIES)
        for i in range(self.count):
            key = f"{i:04d}-{families[i % len(families)]}"
            yield Record(
                uid=make_uid(self.name, key),
                source=self.name,
                url=f"{self.name}:{key}",
                licence="cc0-1.0",
                format="glb",
            )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Write the shape of a record as a GLB file below `scratch`, with the same bytes each time.

        Raises:
            ValueError: If the record belongs to another source.
        """
        scheme, _, key = record.url.partition(":")
        if scheme != self.name:
            raise ValueError(f"record must be of the procedural source, got {record.url!r}")
        path = scratch / f"{record.uid}.glb"
        write_atomically(path, to_glb(make_shape(key)), several_writers=True)
        return path


def make_shape(key: str) -> list[Piece]:
    """Generate the pieces of a shape.

    Args:
        key: NUMBER-FAMILY, such as 0017-torus_knot. The shape depends on it alone.

    Raises:
        ValueError: If the family is unknown.
    """
    family = key.partition("-")[2]
    if family not in FAMILIES:
        raise ValueError(f"shape must be NUMBER-FAMILY with a known family, got {key!r}")
    return FAMILIES[family](np.random.default_rng(seed_of("procedural", key)))
