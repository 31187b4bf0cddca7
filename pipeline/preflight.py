"""Look at a mesh file's first bytes and counts before a parser believes them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline.schema import Reject

HEAD = 4096


class Limits(Protocol):
    """What of the load configuration is needed here."""

    @property
    def max_faces(self) -> int: ...

    @property
    def max_instances(self) -> int: ...

    @property
    def max_unpacked_bytes(self) -> int: ...


def check_file(path: Path, limits: Limits) -> str:
    """The format, which is the lower-case extension. Rejects: "empty_file", "lfs_pointer", "wrong_magic"."""
    size = path.stat().st_size
    if size == 0:
        raise Reject("empty_file")
    extension = path.suffix[1:].lower()
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"version https://git-lfs"):
        raise Reject("lfs_pointer", bytes=size)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    page = text[:15].lower().startswith((b"<!doctype html", b"<html"))
    magic = {
        "glb": head.startswith(b"glTF"),
        "gltf": text.startswith(b"{"),
        "3mf": head.startswith(b"PK\x03\x04"),
        "zae": head.startswith(b"PK\x03\x04"),
        "ply": head.startswith(b"ply"),
        "dae": text.startswith(b"<"),
    }
    if page or not magic.get(extension, True):
        raise Reject("wrong_magic", format=extension, begins=ascii(head[:16].decode("latin-1")))
    return extension
