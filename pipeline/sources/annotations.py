"""Annotation files of a catalogue: download, cache, hash and parse them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

from pipeline.core.errors import Reject, UserError
from pipeline.core.hashing import sha256_of
from pipeline.core.schema import Record
from pipeline.download.config import FetchConfig
from pipeline.download.fetch import DownloadRequest, download

MAX_ANNOTATION_BYTES = 16 << 30
MAX_ITEMS = 32  # entries of a list, such as tags, that a record keeps
MAX_CHARACTERS = 100  # characters of a text, such as a name, that a record keeps


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Annotation files in one directory, in the layout of the objaverse package.

    Args:
        root: The directory. None is the directory of the objaverse package.
        fetch: Options of downloads.
    """

    root: Path | None = None
    fetch: FetchConfig = field(default_factory=FetchConfig)

    @property
    def folder(self) -> Path:
        """The directory of the files. It may not exist yet."""
        if self.root is not None:
            return self.root
        # Imported only here: a user with an own directory does not need the package.
        import objaverse

        return Path(objaverse.BASE_PATH)

    def ensure_file(self, name: str, url: str) -> Path:
        """Return the local file and download it first if it is missing.

        Args:
            name: Path of the file relative to `folder`.
            url: URL to download it from.

        Raises:
            UserError: If the download fails.
        """
        path = self.folder / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = DownloadRequest(url=url, max_bytes=MAX_ANNOTATION_BYTES)
        try:
            return download(wanted, path, self.fetch)
        except Reject as verdict:
            raise UserError(
                f"cannot download the annotations {url} ({verdict}); put the file at {path}"
            ) from verdict

    def snapshot(self, names: Sequence[str]) -> str:
        """Hash the content of local files.

        Returns:
            The sha256 of the sorted "name\\0sha256" lines as 64 hex digits.
        """
        lines = [f"{name}\0{sha256_of(self.folder / name)}\n" for name in sorted(names)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AnnotatedSource:
    """What sources with annotation files share.

    Args:
        annotations: The annotation files. Missing ones are downloaded.
        fetch: Options of downloads.
        max_bytes: Largest size of a downloaded mesh file.
    """

    annotations: Annotations = field(default_factory=Annotations)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    max_bytes: int = 1 << 30

    def request(self, record: Record) -> DownloadRequest:
        """Return the download of a record's file."""
        return DownloadRequest(
            url=record.url, format=record.format, sha256=record.sha256, max_bytes=self.max_bytes
        )


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for an annotation file that cannot be parsed."""
    return UserError(
        f"the annotation file {path} is damaged ({error}); delete it to download it again"
    )


def read_json(path: Path) -> Any:
    """Return the value of a gzipped JSON file.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        with gzip.open(path, "rb") as file:
            return json.load(file)
    except (OSError, EOFError, ValueError, ZlibError) as error:
        raise damaged(path, error) from error


def to_metadata(**values: Any) -> str:
    """Encode what a record keeps of its annotations.

    Long texts and lists are cut, and empty values are left out.

    Returns:
        A JSON object with sorted keys, or "" if nothing is left.
    """
    kept = {name: value for name, value in values.items() if value}
    for name, value in kept.items():
        if isinstance(value, str):
            kept[name] = value[:MAX_CHARACTERS]
        elif isinstance(value, list):
            kept[name] = [str(item)[:MAX_CHARACTERS] for item in value[:MAX_ITEMS]]
    return json.dumps(kept, sort_keys=True, ensure_ascii=False) if kept else ""
