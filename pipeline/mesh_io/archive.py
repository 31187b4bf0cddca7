"""Unpack zip and tar archives from untrusted sources within limits and inside one folder."""

from __future__ import annotations

import errno
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.core.errors import Reject
from pipeline.mesh_io.formats import MESH_FORMATS
from pipeline.mesh_io.member_names import LEGACY_ENCODINGS, common_encoding, other_spellings

MAX_INNER_DEPTH = 2  # archives in archives
UTF8_FLAG = 0x800  # of a zip member whose name is UTF-8
MAX_NAME_BYTES = 255  # of a file name
ARCHIVE_FORMATS = ("zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")
# Archives often hold one model in several formats. Formats that need more than this project to be
# read, or several files, are the last ones to be chosen.
SPARE_FORMATS = (("fbx",), ("usd", "usda", "usdc", "usdz"), ("abc",), ("blend",))
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

    Links, devices and other special members are skipped. `pipeline.mesh_io.member_names` decodes
    names without a stated encoding. Links give them their other spellings, because the files that
    refer to them may be decoded in another way.

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
    legacy_names: list[tuple[PurePosixPath, bytes]] = []
    total = 0
    try:
        for name, raw_name, file in _members(path, limits, allowed, below):
            relative = _checked_path(name)
            target = folder / relative
            if raw_name is not None:
                legacy_names.append((relative, raw_name))
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                while chunk := file.read(CHUNK_BYTES):
                    total += len(chunk)
                    if total > allowed:
                        raise Reject("archive_bomb", bytes=total, allowed=allowed)
                    out.write(chunk)
            written.append(target)
        _link_other_spellings(folder, legacy_names)
    except ARCHIVE_ERRORS as error:
        raise Reject("unreadable", error=type(error).__name__, what="archive") from error
    except OSError as error:
        if error.errno in BAD_NAME_ERRNOS:
            raise Reject("archive_path", error=errno.errorcode[error.errno]) from error
        if error.errno is None:  # bz2 reports damaged data in this way
            raise Reject("unreadable", error=type(error).__name__, what="archive") from error
        raise
    # The later one of two members of the same name replaces the earlier one.
    return list(dict.fromkeys(written))


def unpack_mesh(path: Path, folder: Path, limits: ArchiveLimits) -> Path:
    """Unpack an archive and the archives in it, and return its mesh file.

    The mesh of an inner archive counts only if the outer one has none. Inner archives are unpacked
    beside themselves, up to `MAX_INNER_DEPTH` levels deep. The limits hold for all together. An
    inner archive that is damaged is left out.

    Args:
        path: The archive.
        folder: Directory for the files.
        limits: Largest number of members and bytes.

    Raises:
        Reject: As `extract` and `find_only_mesh`.
    """
    files = extract(path, folder, limits)
    levels = [files]
    for _ in range(MAX_INNER_DEPTH):
        inner: list[Path] = []
        for archive in levels[-1]:
            if not archive_format(archive.name):
                continue
            used = [file for level in (*levels, inner) for file in level]
            rest = replace(
                limits,
                max_members=max(limits.max_members - len(used), 0),
                max_bytes=max(limits.max_bytes - sum(file.stat().st_size for file in used), 0),
            )
            target = archive.with_name(archive.name[: -len(archive_format(archive.name)) - 1])
            if target.exists():
                target = archive.with_name(f"{archive.name}.unpacked")
            try:
                inner += extract(archive, target, rest)
            except Reject as error:
                if error.reason == "archive_bomb":
                    raise
        if not inner:
            break
        levels.append(inner)
    for level in levels[:-1]:
        try:
            return find_only_mesh(level, folder)
        except Reject as error:
            if error.reason != "archive_without_mesh":
                raise
    return find_only_mesh(levels[-1], folder)


def find_only_mesh(files: list[Path], folder: Path) -> Path:
    """Return the mesh file with the shortest path of an unpacked archive.

    Hidden files and the resource forks of macOS are ignored. A file of one of `SPARE_FORMATS`
    counts only if there is none of the formats before it.

    Args:
        files: The unpacked files.
        folder: The directory that they were unpacked to.

    Raises:
        Reject: "archive_without_mesh" if there is none, "archive_ambiguous" if several mesh files
            are equally deep.
    """
    meshes: list[Path] = []
    for file in files:
        parts = file.relative_to(folder).parts
        is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if file.suffix[1:].lower() in MESH_FORMATS and not is_hidden:
            meshes.append(file)
    if not meshes:
        raise Reject("archive_without_mesh", files=len(files))
    ranks = {name: rank for rank, names in enumerate(SPARE_FORMATS, 1) for name in names}
    places = [
        (ranks.get(mesh.suffix[1:].lower(), 0), len(mesh.relative_to(folder).parts))
        for mesh in meshes
    ]
    first = [mesh for mesh, place in zip(meshes, places, strict=True) if place == min(places)]
    if len(first) > 1:
        raise Reject("archive_ambiguous", meshes=len(first))
    return first[0]


def _members(
    path: Path, limits: ArchiveLimits, allowed: int, below: str
) -> Iterator[tuple[str, bytes | None, IO[bytes]]]:
    """Yield each regular member, after checking names and sizes.

    Yields:
        The name, the name as stored if its encoding is not stated, and the open content.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = _zip_names(archive.infolist())
            chosen = [
                (info, names[info.orig_filename])
                for info in archive.infolist()
                if not info.is_dir() and _is_below(names[info.orig_filename], below)
            ]
            claimed = sum(info.file_size for info, _ in chosen)
            _check_limits(len(chosen), claimed, limits, allowed)
            for _, name in chosen:
                _checked_path(name)  # all names, before anything is written
            for info, name in chosen:
                file_type = info.external_attr >> 16 & 0o170000
                if file_type in (0, 0o100000):  # unspecified, or a regular file
                    with archive.open(info) as file:
                        yield name, _legacy_name(info), file
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
                    raw_name = info.name.encode("utf-8", "surrogateescape")
                    if _is_text(info.name):
                        yield info.name, None, file
                    else:
                        yield raw_name.decode(common_encoding([raw_name])), raw_name, file


def _zip_names(members: list[zipfile.ZipInfo]) -> dict[str, str]:
    """Return {name as the zip library decodes it: name} of all members."""
    legacy_names = {info.orig_filename: _legacy_name(info) for info in members}
    encoding = common_encoding(name for name in legacy_names.values() if name is not None)
    return {
        name: name if raw_name is None else raw_name.decode(encoding)
        for name, raw_name in legacy_names.items()
    }


def _legacy_name(info: zipfile.ZipInfo) -> bytes | None:
    """Return a name as stored if its encoding is not stated and it is not ASCII."""
    if info.flag_bits & UTF8_FLAG or info.orig_filename.isascii():
        return None
    return info.orig_filename.encode("cp437")  # how the library decodes such names


def _is_text(name: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in name)


def _link_other_spellings(folder: Path, names: list[tuple[PurePosixPath, bytes]]) -> None:
    """Give each component of names without stated encoding its other spellings, as links."""
    linked: set[tuple[PurePosixPath, bytes]] = set()
    for path, raw_name in names:
        raw_parts = raw_name.strip(b"/").split(b"/")
        if len(raw_parts) != len(path.parts):
            continue
        for index, (part, raw_part) in enumerate(zip(path.parts, raw_parts, strict=True)):
            parent = PurePosixPath(*path.parts[:index])
            if raw_part.isascii() or (parent, raw_part) in linked:
                continue
            linked.add((parent, raw_part))
            encodings = ("utf-8", *LEGACY_ENCODINGS)
            encoding = next(name for name in encodings if _spells(raw_part, name, part))
            for spelling in other_spellings(raw_part, encoding):
                link = folder / parent / spelling
                if "/" not in spelling and _fits(spelling) and not os.path.lexists(link):
                    link.symlink_to(part)


def _spells(raw_name: bytes, encoding: str, name: str) -> bool:
    try:
        return raw_name.decode(encoding) == name
    except UnicodeDecodeError:
        return False


def _fits(name: str) -> bool:
    """Return whether a name is one that a file can have."""
    return "\0" not in name and name not in (".", "..") and len(name.encode()) <= MAX_NAME_BYTES


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
