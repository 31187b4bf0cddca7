"""Objaverse-XL: ten million files on GitHub, Thingiverse, Sketchfab and at the Smithsonian, each with its sha256."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.curation.licences import licence_of
from pipeline.download.fetch import FetchConfig, Wanted, fetch
from pipeline.sources.annotations import Annotations
from pipeline.sources.github import GitHub, fetch_blob
from pipeline.sources.objaverse import HUB, PATHS, local_name, object_paths

HUB_XL = "https://huggingface.co/datasets/allenai/objaverse-xl/resolve/main"
PLACES = ("github", "thingiverse", "smithsonian", "sketchfab")  # in the order of the package
COLUMNS = ["fileIdentifier", "license", "fileType", "sha256"]
ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ObjaverseXLSource:
    """Every asset of the annotations, in their order; the key is the file identifier."""

    annotations: Annotations = field(default_factory=Annotations)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    max_bytes: int = 1 << 30
    places: tuple[str, ...] = PLACES
    hub: str = HUB
    hub_xl: str = HUB_XL
    thingiverse: str = "https://www.thingiverse.com"
    github: GitHub = field(default_factory=GitHub)
    name = "objaverse-xl"

    def snapshot(self) -> str:
        """Says which annotations the records come from. UserError if they cannot be had."""
        paths = [local_name(PATHS)] if "sketchfab" in self.places else []
        for path in paths:
            self.annotations.file(path, f"{self.hub}/{PATHS}")
        return self.annotations.snapshot(paths + [self._table(place) for place in self.places])

    def records(self) -> Iterator[Record]:
        paths = object_paths(self.annotations, self.hub) if "sketchfab" in self.places else {}
        for place in self.places:
            path = self.annotations.folder / self._table(place)
            try:
                for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=COLUMNS):
                    yield from self._records(place, batch, paths)
            except (OSError, pa.ArrowException) as error:
                message = f"the annotation file {path} is damaged ({error}); delete it to download it again"
                raise UserError(message) from error

    def materialize(self, record: Record, scratch: Path) -> Path:
        """The file, with its side files if it has some, below `scratch`. Reject and Transient as `fetch`."""
        scratch.mkdir(parents=True, exist_ok=True)
        url = record.url
        want = Wanted(url=url, format=record.format, sha256=record.sha256, max_bytes=self.max_bytes)
        if url.startswith(f"{self.github.site}/"):
            return fetch_blob(want, scratch / "repository", self.fetch, self.github)
        return fetch(want, scratch / f"{record.uid}.{record.format}", self.fetch)

    def _table(self, place: str) -> str:
        """The name of a place's annotations, once they are there."""
        name = f"{place}/{place}.parquet"
        self.annotations.file(name, f"{self.hub_xl}/{name}")
        return name

    def _records(
        self, place: str, batch: pa.RecordBatch, paths: dict[str, str]
    ) -> Iterator[Record]:
        for key, licence, kind, sha256 in zip(*(batch[name].to_pylist() for name in COLUMNS)):
            url = self._url(place, key, paths)
            if url is not None:
                yield Record(
                    uid=make_uid(self.name, key),
                    source=self.name,
                    url=url,
                    licence=licence_of(licence),
                    sha256=sha256,
                    format=(kind or "").lower().lstrip("."),
                )

    def _url(self, place: str, key: str, paths: dict[str, str]) -> str | None:
        """Where the bytes of a file identifier are; None for what is gone from Objaverse 1.0."""
        if place == "sketchfab":
            path = paths.get(key.rpartition("/")[2])
            return None if path is None else f"{self.hub}/{path}"
        if place == "thingiverse":
            return f"{self.thingiverse}/download:{key.rpartition('fileId=')[2]}"
        return key
