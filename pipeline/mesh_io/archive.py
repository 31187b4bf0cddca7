"""Unpacks zip and tar archives that strangers made: counted, bounded, and only ever into the folder that is given."""

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
PIECE = 1 << 20
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,  # a compression that Python does not know
    RuntimeError,  # a password
    UnicodeError,
    ValueError,
)
BAD_NAME = (
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EILSEQ,
    errno.EINVAL,
)


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may hold; bytes are counted as they are unpacked, whatever the archive says."""

    max_members: int = 10_000
    max_bytes: int = 1 << 30
    max_ratio: float = 200.0  # bytes unpacked to bytes of the archive, beyond the first 64 MB


def archive_format(name: str) -> str:
    """The ending of an archive's name without its dot, lower case; "" if it is none."""
    return next((ending for ending in ARCHIVE_FORMATS if name.lower().endswith(f".{ending}")), "")


def extract(path: Path, folder: Path, limits: ArchiveLimits, below: str = "") -> list[Path]:
    """Writes the regular files of a zip or tar to `folder` and returns them in the archive's order.

    `below`: only members under that directory. Links and devices are left out. Reject: "archive_bomb" (members, bytes
    or ratio), "archive_path" (a member that is absolute, climbs out, or has a name that no file can have),
    "unreadable" (no archive, cut short, encrypted).
    """
    size = path.stat().st_size
    allowed = min(limits.max_bytes, max(1 << 26, int(limits.max_ratio * size)))
    written: list[Path] = []
    total = 0
    try:
        for name, file in _members(path, limits, allowed, below):
            target = folder / _safe(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                while piece := file.read(PIECE):
                    total += len(piece)
                    if total > allowed:
                        raise Reject("archive_bomb", bytes=total, allowed=allowed)
                    out.write(piece)
            written.append(target)
    except BROKEN as error:
        raise Reject("unreadable", error=type(error).__name__, what="archive") from error
    except OSError as error:
        if error.errno in BAD_NAME:
            raise Reject("archive_path", error=errno.errorcode[error.errno]) from error
        if error.errno is None:  # bz2
            raise Reject("unreadable", error=type(error).__name__, what="archive") from error
        raise
    return written


def only_mesh(files: list[Path], folder: Path) -> Path:
    """The one mesh file that lies highest. Reject: "archive_without_mesh", "archive_ambiguous" if it is not alone."""
    depth: dict[int, list[Path]] = {}
    for file in files:
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if file.suffix[1:].lower() in MESH_FORMATS and not hidden:
            depth.setdefault(len(parts), []).append(file)
    if not depth:
        raise Reject("archive_without_mesh", files=len(files))
    highest = depth[min(depth)]
    if len(highest) > 1:
        raise Reject("archive_ambiguous", meshes=len(highest))
    return highest[0]


def _members(
    path: Path, limits: ArchiveLimits, allowed: int, below: str
) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every regular member, once names, counts and claims are in order."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            chosen = [
                info
                for info in archive.infolist()
                if not info.is_dir() and _is_below(info.filename, below)
            ]
            _count(len(chosen), sum(info.file_size for info in chosen), limits, allowed)
            for info in chosen:
                _safe(info.filename)  # before anything is written
            for info in chosen:
                kind = info.external_attr >> 16 & 0o170000
                if kind in (0, 0o100000):
                    with archive.open(info) as file:
                        yield info.filename, file
        return
    with tarfile.open(path, "r:*") as archive:
        members = claimed = 0
        for info in archive:  # one by one: to list a tar is to unpack it
            members, claimed = members + 1, claimed + max(info.size, 0)
            _count(members, claimed, limits, allowed)
            if not info.isdir():  # never written; "tar -C folder ." begins with "."
                _safe(info.name)
            if info.isreg() and _is_below(info.name, below):
                file = archive.extractfile(info)
                assert file is not None
                with file:
                    yield info.name, file


def _count(members: int, claimed: int, limits: ArchiveLimits, allowed: int) -> None:
    if members > limits.max_members:
        raise Reject("archive_bomb", members=members, max_members=limits.max_members)
    if claimed > allowed:
        raise Reject("archive_bomb", bytes=claimed, allowed=allowed)


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder.rstrip('/')}/")


def _safe(name: str) -> PurePosixPath:
    """The member's path below the folder it is unpacked to."""
    plain = PurePosixPath(name.replace("\\", "/"))
    if (
        plain.is_absolute()
        or ".." in plain.parts
        or not plain.parts
        or plain.parts[0][1:2] == ":"
        or "\0" in name
    ):
        raise Reject("archive_path", member=ascii(name[:100]))
    return plain
