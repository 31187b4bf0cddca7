"""Unpack zip and tar archives from untrusted sources within limits and inside one folder."""

from __future__ import annotations

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import MESH_FORMATS

ARCHIVE_FORMATS = ("zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")
CHUNK_BYTES = 1 << 20
# What the readers raise on a damaged archive.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,  # an unknown compression
    RuntimeError,  # an encrypted member
    UnicodeError,
    ValueError,
)
# What the file system answers to a member's name that no file can have.
BAD_NAME_ERRNOS = (
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EILSEQ,
    errno.EINVAL,
)


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """Largest contents of an archive. Bytes are counted while they are unpacked."""

    max_members: int = 10_000
    """Largest number of members."""

    max_bytes: int = 1 << 30
    """Largest number of unpacked bytes."""

    max_ratio: float = 200.0
    """Largest ratio of unpacked bytes to bytes of the archive, beyond the first 64 MiB."""


def archive_format(name: str) -> str:
    """Return the archive extension of a file name in lower case, "" if it is not an archive."""
    return next((ending for ending in ARCHIVE_FORMATS if name.lower().endswith(f".{ending}")), "")


def extract(path: Path, folder: Path, limits: ArchiveLimits, below: str = "") -> list[Path]:
    """Unpack the regular files of a zip or tar archive into a folder.

    Links, devices and other special members are skipped.

    Args:
        path: The archive. Its content decides the format, not its name.
        folder: Directory for the files. No file is written outside it.
        limits: Largest number of members and bytes.
        below: Unpack only the members under this directory of the archive. "" unpacks all.

    Returns:
        The paths of the unpacked files in the order of the archive.

    Raises:
        Reject: "archive_bomb" (too many members or bytes), "archive_path" (a member's name is
            absolute, leads out of the folder, or is impossible for a file) or "unreadable" (no
            archive, truncated or encrypted).
    """
    size = path.stat().st_size
    allowed = min(limits.max_bytes, max(1 << 26, int(limits.max_ratio * size)))
    written: list[Path] = []
    total = 0
    try:
        for name, file in _members(path, limits, allowed, below):
            target = folder / _checked_path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                while chunk := file.read(CHUNK_BYTES):
                    total += len(chunk)
                    if total > allowed:
                        raise Reject("archive_bomb", bytes=total, allowed=allowed)
                    out.write(chunk)
            written.append(target)
    except ARCHIVE_ERRORS as error:
        raise Reject("unreadable", error=type(error).__name__, what="archive") from error
    except OSError as error:
        if error.errno in BAD_NAME_ERRNOS:
            raise Reject("archive_path", error=errno.errorcode[error.errno]) from error
        if error.errno is None:  # bz2 reports damaged data in this way
            raise Reject("unreadable", error=type(error).__name__, what="archive") from error
        raise
    return written


def find_only_mesh(files: list[Path], folder: Path) -> Path:
    """Return the mesh file with the shortest path of an unpacked archive.

    Hidden files and the resource forks of macOS are ignored.

    Args:
        files: The unpacked files.
        folder: The directory that they were unpacked to.

    Raises:
        Reject: "archive_without_mesh" if there is none, "archive_ambiguous" if several mesh files
            are equally deep.
    """
    meshes_by_depth: dict[int, list[Path]] = {}
    for file in files:
        parts = file.relative_to(folder).parts
        is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if file.suffix[1:].lower() in MESH_FORMATS and not is_hidden:
            meshes_by_depth.setdefault(len(parts), []).append(file)
    if not meshes_by_depth:
        raise Reject("archive_without_mesh", files=len(files))
    topmost = meshes_by_depth[min(meshes_by_depth)]
    if len(topmost) > 1:
        raise Reject("archive_ambiguous", meshes=len(topmost))
    return topmost[0]


def _members(
    path: Path, limits: ArchiveLimits, allowed: int, below: str
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and open content of each regular member, after checking names and sizes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            chosen = [
                info
                for info in archive.infolist()
                if not info.is_dir() and _is_below(info.filename, below)
            ]
            _check_limits(len(chosen), sum(info.file_size for info in chosen), limits, allowed)
            for info in chosen:
                _checked_path(info.filename)  # all names, before anything is written
            for info in chosen:
                file_type = info.external_attr >> 16 & 0o170000
                if file_type in (0, 0o100000):  # unspecified, or a regular file
                    with archive.open(info) as file:
                        yield info.filename, file
        return
    with tarfile.open(path, "r:*") as archive:
        claimed = 0
        # One member at a time: listing a compressed tar unpacks all of it.
        for members, info in enumerate(archive, start=1):
            claimed += max(info.size, 0)
            _check_limits(members, claimed, limits, allowed)
            # Directories are not written, and their names are free: "tar -C folder ." begins
            # with a member called ".".
            if not info.isdir():
                _checked_path(info.name)
            if info.isreg() and _is_below(info.name, below):
                file = archive.extractfile(info)
                assert file is not None
                with file:
                    yield info.name, file


def _check_limits(members: int, claimed: int, limits: ArchiveLimits, allowed: int) -> None:
    if members > limits.max_members:
        raise Reject("archive_bomb", members=members, max_members=limits.max_members)
    if claimed > allowed:
        raise Reject("archive_bomb", bytes=claimed, allowed=allowed)


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder.rstrip('/')}/")


def _checked_path(name: str) -> PurePosixPath:
    """Return the path of a member relative to the folder, or reject a name that leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    has_drive = bool(path.parts) and path.parts[0][1:2] == ":"
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if not is_inside or has_drive or "\0" in name:
        raise Reject("archive_path", member=ascii(name[:100]))
    return path
