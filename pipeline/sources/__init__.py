"""Where assets come from: `open_source` turns "procedural" or "folder:PATH" into a Source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pipeline.schema import Record, UserError


class Source(Protocol):
    """A catalogue and the way to its bytes. Picklable and cheap to construct: workers get a copy.

    `records` yields the same records in the same order on every machine; `materialize` returns a readable local
    file for one of them, written below `scratch` if it has to be written at all.
    """

    @property
    def name(self) -> str: ...

    def records(self) -> Iterator[Record]: ...

    def materialize(self, record: Record, scratch: Path) -> Path: ...


def open_source(spec: str, up: str = "y") -> Source:
    """The source that `spec` names: "procedural" or "folder:PATH". `up` = axis that points up in its files.

    UserError: unknown scheme, or a folder that is missing, unreadable or without a single mesh file.
    """
    from pipeline.sources.folder import FolderSource
    from pipeline.sources.procedural import ProceduralSource

    if up not in ("y", "z"):
        raise UserError(f"the up axis must be y or z, got {up!r}")
    scheme, _, rest = spec.partition(":")
    if scheme == "procedural" and not rest:
        return ProceduralSource()
    if scheme == "folder" and rest:
        source = FolderSource(root=Path(rest).expanduser().absolute(), up=up)
        source.check()
        return source
    raise UserError(f"unknown source {spec!r}; use procedural or folder:PATH")
