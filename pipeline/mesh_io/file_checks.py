"""Checks of mesh files before parsing: magic bytes, and claimed counts against the file size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig

# Extensions of the formats that `pipeline.mesh_io.load` reads.
MESH_FORMATS = frozenset({"glb", "gltf", "obj", "ply", "stl", "off", "3mf", "dae", "zae"})
LFS_SIGNATURE = b"version https://git-lfs"
HEAD_BYTES = 4096  # bytes at the beginning of a file that the checks look at

# A claim beyond BOMB_BYTES and beyond BOMB_FACTOR times the bytes that are there is an attack.
# Below that the file is treated as truncated.
BOMB_BYTES = 1 << 26
BOMB_FACTOR = 8

PLY_TYPES_BY_BYTES = {
    1: ("char", "uchar", "int8", "uint8"),
    2: ("short", "ushort", "int16", "uint16"),
    4: ("int", "uint", "int32", "uint32", "float", "float32"),
    8: ("double", "float64"),
}
PLY_BYTES = {name: size for size, names in PLY_TYPES_BY_BYTES.items() for name in names}


def check_file(path: Path, cfg: LoadConfig) -> str:
    """Check that a mesh file can be parsed within bounded memory.

    A malformed header may raise any other exception of the code that reads it. `load` turns those
    into "unreadable".

    Args:
        path: The file. Its extension decides which format is expected.
        cfg: Limits of faces, instances and unpacked bytes.

    Returns:
        The format: the extension in lower case, without the dot.

    Raises:
        Reject: "empty_file", "lfs_pointer", "wrong_magic", "unreadable" (for example truncated),
            "allocation_bomb" (it claims far more data than it has) or "too_many_faces".
    """
    size = path.stat().st_size
    if size == 0:
        raise Reject("empty_file")
    extension = path.suffix[1:].lower()
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        check_magic(head, extension, size)
        check = _FORMAT_CHECKS.get(extension)
        if check is not None:
            file.seek(0)
            check(file, size, cfg)
    return extension


def find_side_file(folder: Path, name: str) -> Path | None:
    """Find a file, such as a texture, that an asset refers to by name.

    The name is tried as written, percent-decoded with "/" for each backslash, and reduced to its
    last component. A file outside `folder` is never returned.

    Args:
        folder: Directory of the asset.
        name: The name as it stands in the asset.

    Returns:
        The resolved path, or None if there is no such file.
    """
    root = folder.resolve()
    names = (name.strip(), unquote(name.strip()).replace("\\", "/"))
    relative = tuple(text.lstrip("/") for text in names)
    last = tuple(text.rpartition("/")[2] for text in names)
    for candidate in dict.fromkeys((*names, *relative, *last)):
        try:
            path = (root / candidate).resolve()
            if path.is_relative_to(root) and path.is_file():
                return path
        # The name is impossible for a file, or the path is a link to itself.
        except (OSError, ValueError, RuntimeError):
            continue
    return None


def check_magic(head: bytes, extension: str, size: int) -> None:
    """Check that the first bytes of a file fit its format.

    Args:
        head: The first bytes of the file.
        extension: The expected format. Formats without magic bytes accept anything except an HTML
            page.
        size: Size of the file in bytes, for the error.

    Raises:
        Reject: "lfs_pointer" or "wrong_magic".
    """
    if head.startswith(LFS_SIGNATURE):
        raise Reject("lfs_pointer", bytes=size)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    is_html = text[:15].lower().startswith((b"<!doctype html", b"<html"))
    is_zip = head.startswith(b"PK\x03\x04")
    has_magic = {
        "glb": head.startswith(b"glTF"),
        "gltf": text.startswith(b"{"),
        "3mf": is_zip,
        "zae": is_zip,
        "zip": is_zip,
        "ply": head.startswith(b"ply"),
        "dae": text.startswith(b"<"),
    }
    if is_html or not has_magic.get(extension, True):
        raise Reject("wrong_magic", format=extension, begins=ascii(head[:16].decode("latin-1")))


def check_claimed_bytes(what: str, claimed: int, available: int) -> None:
    """Check that a file does not claim far more data than it can have.

    Args:
        what: What the claim is about, for the error.
        claimed: Bytes that the stated counts need at least.
        available: Bytes that are there.

    Raises:
        Reject: "unreadable" for a negative claim, or "allocation_bomb".
    """
    if claimed < 0:
        raise Reject("unreadable", error="negative_count", what=what, claimed=claimed)
    if claimed > max(BOMB_FACTOR * available, BOMB_BYTES):
        raise Reject("allocation_bomb", what=what, claimed=claimed, available=available)


def _check_claim(what: str, claimed: int, available: int) -> None:
    """Compare the bytes that a file claims to have with the bytes that it can have."""
    check_claimed_bytes(what, claimed, available)
    if claimed > available:
        raise Reject(
            "unreadable", error="truncated", what=what, claimed=claimed, available=available
        )


def check_face_count(faces: int, cfg: LoadConfig) -> None:
    """Reject a file that states more faces than allowed as "too_many_faces"."""
    if faces > cfg.max_faces:
        raise Reject("too_many_faces", faces=faces, max_faces=cfg.max_faces)


def _check_ply(file: BinaryIO, size: int, cfg: LoadConfig) -> None:
    is_binary = False
    elements: list[list[Any]] = []  # [name, rows, least bytes of a row]
    for _ in range(1000):
        words = file.readline(1000).decode("latin-1").split()
        if words == ["end_header"]:
            break
        if words[:1] == ["format"]:
            is_binary = not words[1].startswith("ascii")
        elif words[:1] == ["element"]:
            elements.append([words[1], int(words[2]), 0])
        elif words[:1] == ["property"]:
            # The least size of a value: a digit and a blank in text, an empty list in binary.
            position = 2 if words[1:2] == ["list"] else 1
            elements[-1][2] += PLY_BYTES[words[position]] if is_binary else 2
    else:
        raise Reject("unreadable", error="no_end_header")
    for name, count, row_bytes in elements:
        # The last line of a text file may end without its blank and its line break.
        missing = 0 if is_binary or count == 0 else 2
        _check_claim(f"element {name}", count * row_bytes - missing, size - file.tell())
        if name == "face":
            check_face_count(count, cfg)


_FORMAT_CHECKS: dict[str, Callable[[BinaryIO, int, LoadConfig], None]] = {
    "ply": _check_ply,
}
