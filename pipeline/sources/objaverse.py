"""Objaverse 1.0: some 800,000 GLB files, from the annotations of the objaverse package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.curation.licences import licence_of
from pipeline.download.fetch import FetchConfig, Wanted, fetch
from pipeline.sources.annotations import Annotations, read_json, to_metadata

HUB = "https://huggingface.co/datasets/allenai/objaverse/resolve/main"
PATHS = "object-paths.json.gz"
FOLDERS = tuple(f"{i // 1000:03d}-{i % 1000:03d}" for i in range(160))  # as the package counts them


@dataclass(frozen=True, kw_only=True)
class ObjaverseSource:
    """Every asset of the annotations, in the order of their files and then of Sketchfab's ids, which are the keys."""

    annotations: Annotations = field(default_factory=Annotations)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    max_bytes: int = 1 << 30
    hub: str = HUB
    folders: tuple[str, ...] = FOLDERS
    name = "objaverse"

    def snapshot(self) -> str:
        """Says which annotations the records come from. UserError if they cannot be had."""
        self._files()
        return self.annotations.snapshot([local_name(name) for name in self._names()])

    def records(self) -> Iterator[Record]:
        self._files()
        paths = object_paths(self.annotations, self.hub)
        for name in self._names()[1:]:
            about = read_json(self.annotations.folder / local_name(name))
            for uid in sorted(about):
                if uid in paths:
                    yield _record(uid, about[uid], f"{self.hub}/{paths[uid]}")

    def materialize(self, record: Record, scratch: Path) -> Path:
        """The file, downloaded below `scratch`. Reject and Transient as `fetch`."""
        scratch.mkdir(parents=True, exist_ok=True)
        want = Wanted(
            url=record.url, format=record.format, sha256=record.sha256, max_bytes=self.max_bytes
        )
        return fetch(want, scratch / f"{record.uid}.{record.format}", self.fetch)

    def _names(self) -> list[str]:
        return [PATHS, *(f"metadata/{folder}.json.gz" for folder in self.folders)]

    def _files(self) -> None:
        for name in self._names():
            self.annotations.file(local_name(name), f"{self.hub}/{name}")


def local_name(name: str) -> str:
    return f"hf-objaverse-v1/{name}"


def object_paths(annotations: Annotations, hub: str) -> dict[str, str]:
    """Sketchfab's id -> path below the hub, of every asset."""
    return read_json(annotations.file(local_name(PATHS), f"{hub}/{PATHS}"))


def _record(uid: str, about: dict[str, Any], url: str) -> Record:
    return Record(
        uid=make_uid("objaverse", uid),
        source="objaverse",
        url=url,
        licence=licence_of(about.get("license")),
        format=url.rpartition(".")[2].lower(),
        metadata=to_metadata(
            name=about.get("name"),
            tags=[tag.get("name", "") for tag in about.get("tags") or ()],
            categories=[category.get("name", "") for category in about.get("categories") or ()],
            animations=about.get("animationCount"),
            age_restricted=about.get("isAgeRestricted"),
        ),
    )
