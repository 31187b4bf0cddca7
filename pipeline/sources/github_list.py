"""A list of files of GitHub repositories as a source: each with its commit, hash and licence."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid, sha256_of
from pipeline.core.schema import Record
from pipeline.curation.licences import licence_of
from pipeline.download.config import FetchConfig
from pipeline.download.fetch import DownloadRequest
from pipeline.sources.folder import readable_file
from pipeline.sources.github import Blob, GitHub, download_blob

# What each column of a list must look like.
COLUMNS = {
    "repository": re.compile(r"[\w.-]+/[\w.-]+"),
    "commit": re.compile(r"[0-9a-f]{40}"),
    "path": re.compile(r"(?!/)(?!(.*/)?\.\.(/|$)).*\.\w+"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "licence": re.compile(r".+"),
}
FILE = "file"  # optional column: path of the file in a local folder


@dataclass(frozen=True, kw_only=True)
class GitHubListSource:
    """The files of a csv list with the columns repository, commit, path, sha256 and licence.

    They are downloaded at their commits, with their side files, or read from a local folder where
    there is no network. Records are the same in both cases. The URL of the file at its commit is
    the key of the uid. With a column `file` the uid is the one that `FolderSource` gives to that
    path, so that cameras and seeds are those of a build of the folder.

    Args:
        path: The list. Further columns are not read, except `file`.
        folder: Directory that holds the files at the paths of the column `file`, or at
            OWNER/NAME/PATH if the list has no such column. None downloads them.
        fetch: Options of downloads.
        max_bytes: Largest size of a downloaded file.
        github: URLs of GitHub.
    """

    path: Path
    folder: Path | None = None
    fetch: FetchConfig = field(default_factory=FetchConfig)
    max_bytes: int = 1 << 30
    github: GitHub = field(default_factory=GitHub)
    name = "github"

    @property
    def side_file_root(self) -> Path | None:
        """Directory that holds all side files of local files."""
        return self.folder

    def check(self) -> None:
        """Check that the list can be used and the folder is there.

        Raises:
            UserError: If not, with the first row that is at fault.
        """
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(
                f"no folder {self.folder}; name the directory of the files with folder=DIR, or "
                "leave it out to download them"
            )
        if not list(self.records()):
            raise UserError(
                f"{self.path} names no asset; github:LIST must be a csv file with the columns "
                f"{', '.join(COLUMNS)} and at least one row"
            )

    def snapshot(self) -> str:
        """Return the hash of the list."""
        return sha256_of(self.path)

    def records(self) -> Iterator[Record]:
        """Yield one record per row, in the order of the list.

        Raises:
            UserError: If the list cannot be read, or a row lacks a value or has a wrong one.
        """
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot read the list {self.path}: {reason}; name a readable csv file as "
                "github:LIST"
            ) from error
        seen: set[str] = set()
        for number, row in enumerate(rows, 1):
            for column, pattern in COLUMNS.items():
                if not pattern.fullmatch(row.get(column) or ""):
                    raise UserError(
                        f"{self.path}: row {number} has no usable {column}, got "
                        f"{row.get(column)!r}; a list has the columns {', '.join(COLUMNS)}"
                    )
            blob = Blob(repository=row["repository"], commit=row["commit"], path=row["path"])
            url = blob.page(self.github)
            local = row.get(FILE) or f"{row['repository']}/{row['path']}"
            uid = make_uid("folder", local) if row.get(FILE) else make_uid(self.name, url)
            if seen & {url, uid}:
                raise UserError(
                    f"{self.path}: row {number} repeats {url} or its file {local}; name each once"
                )
            seen |= {url, uid}
            yield Record(
                uid=uid,
                source=self.name,
                url=url,
                licence=licence_of(row["licence"]),
                sha256=row["sha256"],
                format=row["path"].rpartition(".")[2].lower(),
                metadata=json.dumps({FILE: local}, ensure_ascii=False),
            )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Return the local file of a record, or download it with its side files to `scratch`.

        Raises:
            FileNotFoundError: If the local file is missing or leads out of the folder.
            PermissionError: If the local file cannot be read.
            Reject: As `download_blob`.
            Transient: As `download_blob`.
        """
        if self.folder is not None:
            return readable_file(self.folder, json.loads(record.metadata)[FILE])
        wanted = DownloadRequest(
            url=record.url, format=record.format, sha256=record.sha256, max_bytes=self.max_bytes
        )
        scratch.mkdir(parents=True, exist_ok=True)
        return download_blob(wanted, scratch / "repository", self.fetch, self.github)
