"""Objaverse 1.0: about 800,000 GLB files, listed by the annotations of the objaverse package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.curation.licences import licence_of
from pipeline.download.fetch import download
from pipeline.sources.annotations import AnnotatedSource, Annotations, read_json, to_metadata

HUB = "https://huggingface.co/datasets/allenai/objaverse/resolve/main"
OBJECT_PATHS = "object-paths.json.gz"
# The metadata files are numbered as in the objaverse package: 000-000 to 000-159.
FOLDERS = tuple(f"{i // 1000:03d}-{i % 1000:03d}" for i in range(160))


@dataclass(frozen=True, kw_only=True)
class ObjaverseSource(AnnotatedSource):
    """Every asset of Objaverse 1.0, ordered by annotation file and Sketchfab id.

    The Sketchfab id is the key of the uid.

    Args:
        hub: URL of the dataset's files.
        folders: Numbers of the metadata files to read.
    """

    hub: str = HUB
    folders: tuple[str, ...] = FOLDERS
    name = "objaverse"

    def snapshot(self) -> str:
        """Return a hash of the annotations that the records come from.

        Raises:
            UserError: If an annotation file cannot be downloaded.
        """
        self._ensure_files()
        return self.annotations.snapshot([local_name(name) for name in self._file_names()])

    def records(self) -> Iterator[Record]:
        """Yield one record per asset.

        Raises:
            UserError: If an annotation file cannot be downloaded or parsed.
        """
        self._ensure_files()
        paths = read_object_paths(self.annotations, self.hub)
        for name in self._file_names()[1:]:
            assets = read_json(self.annotations.folder / local_name(name))
            for sketchfab_id in sorted(assets):
                if sketchfab_id in paths:
                    url = f"{self.hub}/{paths[sketchfab_id]}"
                    yield _to_record(sketchfab_id, assets[sketchfab_id], url)

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Download the file of a record to `scratch`. Errors as `pipeline.download.fetch`."""
        scratch.mkdir(parents=True, exist_ok=True)
        return download(self.request(record), scratch / f"{record.uid}.{record.format}", self.fetch)

    def _file_names(self) -> list[str]:
        """Names of the annotation files. The first one holds the paths of the mesh files."""
        return [OBJECT_PATHS, *(f"metadata/{folder}.json.gz" for folder in self.folders)]

    def _ensure_files(self) -> None:
        for name in self._file_names():
            self.annotations.ensure_file(local_name(name), f"{self.hub}/{name}")


def local_name(name: str) -> str:
    """Return the path of an annotation file in the layout of the objaverse package."""
    return f"hf-objaverse-v1/{name}"


def read_object_paths(annotations: Annotations, hub: str) -> dict[str, str]:
    """Return the path of each asset below `hub`, by Sketchfab id.

    Raises:
        UserError: If the annotation file cannot be downloaded or parsed.
    """
    path = annotations.ensure_file(local_name(OBJECT_PATHS), f"{hub}/{OBJECT_PATHS}")
    return read_json(path)


def _to_record(sketchfab_id: str, annotation: dict[str, Any], url: str) -> Record:
    return Record(
        uid=make_uid("objaverse", sketchfab_id),
        source="objaverse",
        url=url,
        licence=licence_of(annotation.get("license")),
        format=url.rpartition(".")[2].lower(),
        metadata=to_metadata(
            name=annotation.get("name"),
            author=(annotation.get("user") or {}).get("displayName"),
            page=annotation.get("viewerUrl"),
            tags=[tag.get("name", "") for tag in annotation.get("tags") or ()],
            categories=[
                category.get("name", "") for category in annotation.get("categories") or ()
            ],
            animations=annotation.get("animationCount"),
            age_restricted=annotation.get("isAgeRestricted"),
        ),
    )
