"""A user's own directory of meshes as a source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.mesh_io.archive import (
    ARCHIVE_FORMATS,
    ArchiveLimits,
    archive_format,
    extract,
    only_mesh,
)
from pipeline.mesh_io.file_checks import MESH_FORMATS

SIDE_FORMATS = frozenset(
    {"mtl", "bin", "png", "jpg", "jpeg", "webp", "bmp", "tga", "tif", "tiff", "gif", "ktx2", "dds"}
)

PLAN = frozenset({"plan.json", "plan.parquet"})  # a build begins with them


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Every mesh file below `root`, in the order of relative POSIX paths, which are also the uids' keys.

    A zip or tar counts as the one mesh that lies highest in it, with its side files.
    Nobody states a licence for one's own files, so it is "unknown"; the licence policy lets a folder pass because
    its owner named it. A link to a file inside the folder counts, a link out of it or to a directory does not. What
    builds have put there, this one's `out` included, is no input: their renders are tars.
    """

    root: Path
    licence: str = "unknown"
    out: Path | None = None
    archives: ArchiveLimits = field(default_factory=ArchiveLimits)

    @property
    def name(self) -> str:
        return "folder"

    @property
    def skipped(self) -> int:
        """How many files are neither a mesh nor the side file of one, or have a name that is not text."""
        return sum(
            not _is_mesh(path) and _extension(path) not in SIDE_FORMATS for path in self._files()
        )

    def check(self) -> None:
        """UserError if the folder is missing, unreadable, or holds no mesh file."""
        if not self.root.exists():
            raise UserError(f"no folder {self.root}; give an existing one, folder:PATH")
        if not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give the folder that holds it, folder:PATH")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise UserError(
                f"cannot read the folder {self.root}; give yourself the right to list and read it"
            )
        if next(self.records(), None) is None:
            formats = " ".join(sorted(MESH_FORMATS) + list(ARCHIVE_FORMATS))
            raise UserError(f"no mesh file in {self.root}; the formats are {formats}")

    def records(self) -> Iterator[Record]:
        for path in self._files():
            if _is_mesh(path):
                yield Record(
                    uid=make_uid("folder", path),
                    source=self.name,
                    url=path,
                    licence=self.licence,
                    format=_extension(path),
                )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """The file itself, or the mesh out of an archive, unpacked below `scratch`.

        FileNotFoundError or PermissionError if it is gone, closed or outside by now; Reject as `extract`, `only_mesh`.
        """
        path = self.root / record.url
        try:
            inside = path.resolve().is_relative_to(self.root.resolve())
        except RuntimeError as error:  # a link to itself
            raise FileNotFoundError(f"{record.url} leads nowhere") from error
        if not inside:
            raise FileNotFoundError(f"{record.url} leads out of the folder {self.root}")
        with path.open("rb"):
            if record.format not in ARCHIVE_FORMATS:
                return path
        folder = scratch / "archive"
        folder.mkdir()
        return only_mesh(extract(path, folder, self.archives), folder)

    def _files(self) -> list[str]:
        top, out = self.root.resolve(), None if self.out is None else self.out.resolve()
        own = self.root / out.relative_to(top) if out is not None and top in out.parents else None
        return _files(self.root, own)


def _is_mesh(path: str) -> bool:
    """Also False for a name whose bytes are not UTF-8: it could be neither hashed into a uid nor stored."""
    return _extension(path) in (*MESH_FORMATS, *ARCHIVE_FORMATS) and not any(
        "\udc80" <= character <= "\udcff" for character in path
    )


def _extension(path: str) -> str:
    return archive_format(path) or (path.rpartition(".")[2].lower() if "." in path else "")


def _files(root: Path, own: Path | None) -> list[str]:
    """Relative POSIX paths of all regular files that are not of a build, sorted.

    A link to a file counts if that file lies inside; a link to a directory never does: what it shows inside the folder
    is listed in its own place.
    """
    top, found, pending = root.resolve(), [], [root]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            continue  # a closed corner of the folder: its files have no names to list
        if folder == own or PLAN.issubset(entry.name for entry in entries):
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif _leads_to_a_file_below(top, entry):
                found.append(Path(entry.path).relative_to(root).as_posix())
    return sorted(found)


def _leads_to_a_file_below(top: Path, entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_file()
    try:
        real = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):  # dangling, or a link to itself
        return False
    return real.is_file() and real.is_relative_to(top)
