"""Checks of mesh files: magic bytes, and claimed counts against the bytes that are there."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig

LFS_SIGNATURE = b"version https://git-lfs"
GZIP_MAGIC = b"\x1f\x8b"
ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"
HEAD_BYTES = 4096  # bytes at the beginning of a file that the checks look at

# A claim beyond BOMB_BYTES and beyond BOMB_FACTOR times the bytes that are there is an attack.
# Below that the file is treated as truncated.
BOMB_BYTES = 1 << 26
BOMB_FACTOR = 8


def check_file(path: Path) -> str:
    """Check that a file is not empty and begins as its format does.

    Args:
        path: The file. Its extension decides which format is expected.

    Returns:
        The format: the extension in lower case, without the dot.

    Raises:
        Reject: "empty_file", "lfs_pointer" or "wrong_magic".
    """
    size = path.stat().st_size
    if size == 0:
        raise Reject("empty_file")
    extension = path.suffix[1:].lower()
    with path.open("rb") as file:
        check_magic(file.read(HEAD_BYTES), extension, size)
    return extension


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
    text = head
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        text = head[: len(head) // 2 * 2].decode("utf-16", errors="replace").encode()
    text = text.lstrip(b"\xef\xbb\xbf \t\r\n")
    is_html = text[:15].lower().startswith((b"<!doctype html", b"<html"))
    is_zip = head.startswith(b"PK\x03\x04")
    # The layers of USD are text or binary in files of any of its extensions.
    is_usd = is_zip or head.startswith(b"PXR-USDC") or text.startswith((b"#usda", b"#sdf"))
    has_magic = {
        "glb": head.startswith(b"glTF"),
        "gltf": text.startswith(b"{"),
        "3mf": is_zip,
        "zae": is_zip,
        "zip": is_zip,
        "ply": text.startswith(b"ply"),
        "fbx": head.startswith(b"Kaydara FBX Binary") or b"FBX" in text,
        "dae": text.startswith(b"<"),
        **dict.fromkeys(("usd", "usda", "usdc"), is_usd),
        "usdz": is_zip,
        # Blend files may be compressed with gzip or Zstandard. Alembic is Ogawa or HDF5.
        "blend": head.startswith((b"BLENDER", GZIP_MAGIC, ZSTANDARD_MAGIC)),
        "abc": head.startswith((b"Ogawa", b"\x89HDF")),
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


def check_face_count(faces: int, cfg: LoadConfig) -> None:
    """Reject a file that states more faces than allowed as "too_many_faces"."""
    if faces > cfg.max_faces:
        raise Reject("too_many_faces", faces=faces, max_faces=cfg.max_faces)
