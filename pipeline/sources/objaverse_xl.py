"""Objaverse-XL: ten million files of GitHub, Thingiverse, Sketchfab and the Smithsonian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.curation.licences import licence_of
from pipeline.download.fetch import download
from pipeline.sources.annotations import AnnotatedSource, damaged, to_metadata
from pipeline.sources.github import GitHub, download_blob
from pipeline.sources.objaverse import HUB, OBJECT_PATHS, local_name, read_object_paths

HUB_XL = "https://huggingface.co/datasets/allenai/objaverse-xl/resolve/main"
PLACES = ("github", "thingiverse", "smithsonian", "sketchfab")  # in the package's order
COLUMNS = ["fileIdentifier", "license", "fileType", "sha256"]
BATCH_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ObjaverseXLSource(AnnotatedSource):
    """Every asset of Objaverse-XL in the order of its annotations.

    The file identifier is the key of the uid.

    Args:
        places: The sites whose assets are listed, a subset of `PLACES`.
        hub: URL of the files of Objaverse 1.0, which holds the Sketchfab assets.
        hub_xl: URL of the annotations of Objaverse-XL.
        thingiverse: URL of Thingiverse.
        github: URLs of GitHub.
    """

    places: tuple[str, ...] = PLACES
    hub: str = HUB
    hub_xl: str = HUB_XL
    thingiverse: str = "https://www.thingiverse.com"
    github: GitHub = field(default_factory=GitHub)
    name = "objaverse-xl"

    def snapshot(self) -> str:
        """Return a hash of the annotations that the records come from.

        Raises:
            UserError: If an annotation file cannot be downloaded.
        """
        names = [local_name(OBJECT_PATHS)] if "sketchfab" in self.places else []
        for name in names:
            self.annotations.ensure_file(name, f"{self.hub}/{OBJECT_PATHS}")
        return self.annotations.snapshot(names + [self._ensure_table(p) for p in self.places])

    def records(self) -> Iterator[Record]:
        """Yield one record per asset.

        Raises:
            UserError: If an annotation file cannot be downloaded or parsed.
        """
        has_sketchfab = "sketchfab" in self.places
        paths = read_object_paths(self.annotations, self.hub) if has_sketchfab else {}
        for place in self.places:
            path = self.annotations.folder / self._ensure_table(place)
            try:
                for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=COLUMNS):
                    yield from self._to_records(place, batch, paths)
            except (OSError, pa.ArrowException) as error:
                raise damaged(path, error) from error

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Download the file of a record, and its side files, to `scratch`.

        Errors as `pipeline.download.fetch`.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        wanted = self.request(record)
        if record.url.startswith(f"{self.github.site}/"):
            return download_blob(wanted, scratch / "repository", self.fetch, self.github)
        return download(wanted, scratch / f"{record.uid}.{record.format}", self.fetch)

    def _ensure_table(self, place: str) -> str:
        """Download the annotations of a site if they are missing, and return their local name."""
        name = f"{place}/{place}.parquet"
        self.annotations.ensure_file(name, f"{self.hub_xl}/{name}")
        return name

    def _to_records(
        self, place: str, batch: pa.RecordBatch, paths: dict[str, str]
    ) -> Iterator[Record]:
        for key, licence, file_type, sha256 in zip(*(batch[name].to_pylist() for name in COLUMNS)):
            url = self._download_url(place, key, paths)
            if url is not None:
                yield Record(
                    uid=make_uid(self.name, key),
                    source=self.name,
                    url=url,
                    licence=licence_of(licence),
                    sha256=sha256,
                    format=(file_type or "").lower().lstrip("."),
                    # The identifier is the page of the asset where its bytes lie elsewhere.
                    metadata="" if url == key else to_metadata(page=key),
                )

    def _download_url(self, place: str, key: str, paths: dict[str, str]) -> str | None:
        """Return the URL for a file identifier, None if Objaverse 1.0 has no such file any more."""
        if place == "sketchfab":
            path = paths.get(key.rpartition("/")[2])
            return None if path is None else f"{self.hub}/{path}"
        if place == "thingiverse":
            return f"{self.thingiverse}/download:{key.rpartition('fileId=')[2]}"
        return key
