"""The embedded data set: a few hundred seeded shapes, made on the spot without network or files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.hashing import make_uid, seed_of
from pipeline.core.schema import Record
from pipeline.sources.shapes import FAMILIES, to_glb
from pipeline.sources.shapes.primitives import Piece


@dataclass(frozen=True, kw_only=True)
class ProceduralSource:
    """`count` shapes; number i is of family i mod the number of families, so the first few hold every family once.

    A record's key (and, after "procedural:", its url) is like 0017-torus_knot; the shape is a function of it alone.
    """

    count: int = 300

    @property
    def name(self) -> str:
        return "procedural"

    def records(self) -> Iterator[Record]:
        names = list(FAMILIES)
        for i in range(self.count):
            key = f"{i:04d}-{names[i % len(names)]}"
            yield Record(
                uid=make_uid(self.name, key),
                source=self.name,
                url=f"{self.name}:{key}",
                licence="cc0-1.0",
                format="glb",
            )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """A GLB below `scratch`, the same bytes each time. ValueError for a record of another source."""
        scheme, _, key = record.url.partition(":")
        if scheme != self.name:
            raise ValueError(f"record must be of the procedural source, got {record.url!r}")
        scratch.mkdir(parents=True, exist_ok=True)
        path = scratch / f"{record.uid}.glb"
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(to_glb(make_shape(key)))
        part.replace(path)
        return path


def make_shape(key: str) -> list[Piece]:
    """The pieces of the shape called e.g. 0017-torus_knot. ValueError if its family is unknown."""
    family = key.partition("-")[2]
    if family not in FAMILIES:
        raise ValueError(f"shape must be NUMBER-FAMILY with a known family, got {key!r}")
    return FAMILIES[family](np.random.default_rng(seed_of("procedural", key)))
