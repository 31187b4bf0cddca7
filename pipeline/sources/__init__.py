"""Where assets come from: `open_source` turns "procedural", "folder:PATH", "objaverse" and so on into a Source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs

from pipeline.core.errors import UserError
from pipeline.core.schema import Record
from pipeline.download.config import FetchConfig


class Listing(Protocol):
    """Records, the same ones in the same order on every machine."""

    @property
    def name(self) -> str: ...

    def records(self) -> Iterator[Record]: ...


class Source(Listing, Protocol):
    """A catalogue and the way to its bytes. Picklable and cheap to construct: workers get a copy.

    `materialize` returns a readable local file for a record, written below `scratch` if it has to be written at all.
    A source may also have `skipped`, how many files it did not count, and `snapshot()`, which names the state of its
    catalogue.
    """

    def materialize(self, record: Record, scratch: Path) -> Path: ...


def open_source(
    spec: str, fetch: FetchConfig | None = None, max_bytes: int = 1 << 30, out: Path | None = None
) -> Source:
    """The source that `spec` names; `max_bytes` of a downloaded file, `out` = where a build from it is written.

    procedural[:COUNT] | folder:PATH | objaverse[:ANNOTATIONS] | objaverse-xl[:ANNOTATIONS][?places=github,...] |
    shapenet:PATH[?categories=chair,03001627][&splits=train]. ANNOTATIONS is a folder laid out as the objaverse package
    does; without it that package's own. UserError: unknown scheme or option, or a folder without what it should hold.
    """
    from pipeline.sources.annotations import Annotations
    from pipeline.sources.folder import FolderSource
    from pipeline.sources.objaverse import ObjaverseSource
    from pipeline.sources.objaverse_xl import PLACES, ObjaverseXLSource
    from pipeline.sources.procedural import ProceduralSource
    from pipeline.sources.shapenet import ShapeNetSource

    fetch = fetch or FetchConfig()
    scheme, _, rest = spec.partition(":")
    if scheme == "procedural":
        if rest and not (rest.isdecimal() and int(rest)):
            raise UserError(
                f"procedural:COUNT takes how many shapes to make, 1 or more, got {rest!r}"
            )
        return ProceduralSource(count=int(rest)) if rest else ProceduralSource()
    if scheme == "folder" and rest:
        source = FolderSource(root=_path(rest), out=out)
        source.check()
        return source
    scheme, _, options = spec.partition("?")
    scheme, _, rest = scheme.partition(":")
    annotations = Annotations(root=_path(rest) if rest else None, fetch=fetch)
    if scheme == "objaverse" and not options:
        return ObjaverseSource(annotations=annotations, fetch=fetch, max_bytes=max_bytes)
    if scheme == "objaverse-xl":
        places = _options(spec, options, "places").get("places", PLACES)
        if not set(places) <= set(PLACES):
            raise UserError(f"{spec}: places are {','.join(PLACES)}")
        return ObjaverseXLSource(
            annotations=annotations, fetch=fetch, max_bytes=max_bytes, places=places
        )
    if scheme == "shapenet" and rest:
        chosen = _options(spec, options, "categories", "splits")
        source = ShapeNetSource(
            root=_path(rest),
            categories=chosen.get("categories", ()),
            splits=chosen.get("splits", ()),
        )
        source.check()
        return source
    raise UserError(
        f"unknown source {spec!r}; use procedural[:COUNT], folder:PATH, objaverse, objaverse-xl or shapenet:PATH"
    )


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"no home directory for {text.partition('/')[0]} of {text}; give the whole path"
        ) from error


def _options(spec: str, text: str, *names: str) -> dict[str, tuple[str, ...]]:
    """What follows the question mark: name=value,value joined by &."""
    found = parse_qs(text, keep_blank_values=True)
    for name in found:
        if name not in names:
            raise UserError(f"{spec}: unknown option {name!r}; there is {' and '.join(names)}")
    return {
        name: tuple(word for word in ",".join(values).split(",") if word)
        for name, values in found.items()
    }
