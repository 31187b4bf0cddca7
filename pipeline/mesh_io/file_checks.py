"""Look at a mesh file's first bytes, and hold its counts against its size, before a parser believes them."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote

from pipeline.core.errors import Reject

MESH_FORMATS = frozenset(
    {"glb", "gltf", "obj", "ply", "stl", "off", "3mf", "dae", "zae"}
)  # what `load` reads
HEAD = 4096
ZIP_FACTOR = 200  # of text that compresses well
BOMB_BYTES, BOMB_FACTOR = (
    1 << 26,
    8,
)  # a claim beyond both is an attack, below it the file is cut short
COMPONENT_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
PLY_BYTES = {
    **{
        "char": 1,
        "uchar": 1,
        "int8": 1,
        "uint8": 1,
        "short": 2,
        "ushort": 2,
        "int16": 2,
        "uint16": 2,
    },
    **{
        "int": 4,
        "uint": 4,
        "int32": 4,
        "uint32": 4,
        "float": 4,
        "float32": 4,
        "double": 8,
        "float64": 8,
    },
}
# glTF extensions whose absence from the result changes the look at most
HARMLESS = (
    "KHR_materials_",
    "KHR_texture_transform",
    "KHR_lights_punctual",
    "EXT_texture_webp",
    "KHR_mesh_quantization",
)


class Limits(Protocol):
    """What of the load configuration is needed here."""

    @property
    def max_faces(self) -> int: ...

    @property
    def max_instances(self) -> int: ...

    @property
    def max_unpacked_bytes(self) -> int: ...


def check_file(path: Path, limits: Limits) -> str:
    """The format, which is the lower-case extension, of a file whose counts fit its size.

    Reject: "empty_file", "lfs_pointer", "wrong_magic", "unreadable" (cut short), "allocation_bomb" (claims far more
    than it holds), "too_many_faces", "unsupported_extension" (a required glTF extension). A malformed header raises
    whatever its reader raises: `load` takes that for "unreadable".
    """
    size = path.stat().st_size
    if size == 0:
        raise Reject("empty_file")
    extension = path.suffix[1:].lower()
    with path.open("rb") as file:
        head = file.read(HEAD)
        check_magic(head, extension, size)
        check = _CHECKS.get(extension)
        if check is not None:
            file.seek(0)
            check(file, size, limits)
    return extension


def side_file(folder: Path, name: str) -> Path | None:
    """The file that an asset in `folder` calls `name`: as written, unquoted, or its last part; never one above."""
    root, names = folder.resolve(), (name.strip(), unquote(name.strip()).replace("\\", "/"))
    relative, last = (
        (word.lstrip("/") for word in names),
        (word.rpartition("/")[2] for word in names),
    )
    for candidate in dict.fromkeys((*names, *relative, *last)):
        try:
            path = (root / candidate).resolve()
            if path.is_relative_to(root) and path.is_file():
                return path
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # a name that no file can have, or a link to itself
            continue
    return None


def check_magic(head: bytes, extension: str, size: int) -> None:
    """Reject "lfs_pointer" or "wrong_magic" if a file that begins with `head` does not look like its format."""
    if head.startswith(b"version https://git-lfs"):
        raise Reject("lfs_pointer", bytes=size)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    page = text[:15].lower().startswith((b"<!doctype html", b"<html"))
    magic = {
        "glb": head.startswith(b"glTF"),
        "gltf": text.startswith(b"{"),
        "3mf": head.startswith(b"PK\x03\x04"),
        "zae": head.startswith(b"PK\x03\x04"),
        "zip": head.startswith(b"PK\x03\x04"),
        "ply": head.startswith(b"ply"),
        "dae": text.startswith(b"<"),
    }
    if page or not magic.get(extension, True):
        raise Reject("wrong_magic", format=extension, begins=ascii(head[:16].decode("latin-1")))


def _claim(what: str, claimed: int, available: int) -> None:
    """Bytes that a file says it has against those it can have."""
    if claimed < 0:
        raise Reject("unreadable", error="negative_count", what=what, claimed=claimed)
    if claimed > max(BOMB_FACTOR * available, BOMB_BYTES):
        raise Reject("allocation_bomb", what=what, claimed=claimed, available=available)
    if claimed > available:
        raise Reject(
            "unreadable", error="truncated", what=what, claimed=claimed, available=available
        )


def _count_faces(faces: int, limits: Limits) -> None:
    if faces > limits.max_faces:
        raise Reject("too_many_faces", faces=faces, max_faces=limits.max_faces)


def _check_glb(file: BinaryIO, size: int, limits: Limits) -> None:
    _, version, length = struct.unpack("<4sII", file.read(12))
    _claim("file", length, size)
    if version != 2:
        raise Reject("unreadable", error="gltf_version", version=version)
    json_bytes, kind = struct.unpack("<I4s", file.read(8))
    if kind != b"JSON":
        raise Reject("unreadable", error="no_json_chunk")
    _claim("json", json_bytes, size - 20)
    document = json.loads(file.read(json_bytes))
    _check_document(document, size + _bytes_beside(file, document), limits)


def _check_gltf(file: BinaryIO, size: int, limits: Limits) -> None:
    document = json.loads(file.read().decode("utf-8-sig"))
    _check_document(document, size + _bytes_beside(file, document), limits)


def _bytes_beside(file: BinaryIO, document: dict[str, Any]) -> int:
    """Of the files that a glTF's buffers name."""
    folder = Path(file.name).parent
    uris = [buffer.get("uri", "") for buffer in document.get("buffers", [])]
    found = [side_file(folder, uri) for uri in uris if uri and not uri.startswith("data:")]
    return sum(path.stat().st_size for path in found if path is not None)


def _check_document(document: dict[str, Any], available: int, limits: Limits) -> None:
    """Views and accessors of a glTF may overlap, but each is copied out: their sums count too."""
    unknown = [
        name for name in document.get("extensionsRequired", []) if not name.startswith(HARMLESS)
    ]
    if unknown:
        raise Reject("unsupported_extension", extensions=unknown[:8])
    views, accessors = document.get("bufferViews", []), document.get("accessors", [])
    for buffer in document.get("buffers", []):
        _claim("buffer", buffer["byteLength"], available)
    for view in views:
        _claim("buffer view", view["byteLength"], available)
    overlapping = max(BOMB_FACTOR * available, BOMB_BYTES)
    total = sum(view["byteLength"] for view in views)
    for accessor in accessors:
        count = accessor["count"]
        item = COMPONENT_BYTES[accessor["componentType"]] * COMPONENTS[accessor["type"]]
        if "bufferView" in accessor:
            view = views[accessor["bufferView"]]
            last = max(count - 1, 0) * view.get("byteStride", item) + item * min(count, 1)
            _claim("accessor", accessor.get("byteOffset", 0) + last, view["byteLength"])
        total += count * item
    if total > overlapping:
        raise Reject("allocation_bomb", what="accessors", claimed=total, available=available)
    _count_faces(_placed_faces(document, limits), limits)


def _placed_faces(document: dict[str, Any], limits: Limits) -> int:
    """Triangles after every node's mesh is written out."""
    meshes, nodes, accessors = (document.get(name, []) for name in ("meshes", "nodes", "accessors"))
    scenes = document.get("scenes", [])
    pending = list(scenes[document.get("scene", 0)].get("nodes", [])) if scenes else []
    reached: set[int] = set()
    faces = placed = 0
    while pending:
        index = pending.pop()
        if index in reached:
            continue
        reached.add(index)
        pending += nodes[index].get("children", [])
        for primitive in (
            meshes[nodes[index]["mesh"]]["primitives"] if "mesh" in nodes[index] else []
        ):
            placed += 1
            corners = accessors[
                primitive.get("indices", primitive["attributes"].get("POSITION", 0))
            ]["count"]
            faces += corners // 3 if primitive.get("mode", 4) == 4 else corners
    if placed > limits.max_instances:
        raise Reject(
            "too_many_faces", faces=faces, instances=placed, max_instances=limits.max_instances
        )
    return faces


def _check_ply(file: BinaryIO, size: int, limits: Limits) -> None:
    binary, elements = False, []
    for _ in range(1000):
        words = file.readline(1000).decode("latin-1").split()
        if words == ["end_header"]:
            break
        if words[:1] == ["format"]:
            binary = not words[1].startswith("ascii")
        elif words[:1] == ["element"]:
            elements.append([words[1], int(words[2]), 0])
        elif words[:1] == [
            "property"
        ]:  # the least that a row can take: a digit and a blank, or an empty list
            elements[-1][2] += (
                PLY_BYTES[words[2] if words[1] == "list" else words[1]] if binary else 2
            )
    else:
        raise Reject("unreadable", error="no_end_header")
    for name, count, row in elements:
        # The last line may end without its blank or line break.
        _claim(
            f"element {name}", count * row - (0 if binary or count == 0 else 2), size - file.tell()
        )
        if name == "face":
            _count_faces(count, limits)


def _check_stl(file: BinaryIO, size: int, limits: Limits) -> None:
    head = file.read(HEAD)
    if head.lstrip()[:5].lower() == b"solid" and b"\0" not in head:
        return  # text: its triangles cost more than they claim
    if size < 84:
        raise Reject("unreadable", error="truncated", what="header", claimed=84, available=size)
    (faces,) = struct.unpack_from("<I", head, 80)
    _claim("triangles", 50 * faces, size - 84)
    _count_faces(faces, limits)


def _check_off(file: BinaryIO, size: int, limits: Limits) -> None:
    text = file.read(HEAD).decode("latin-1")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    words = " ".join(line for line in lines if line).split()
    if not words or not words[0].upper().endswith("OFF"):
        raise Reject("wrong_magic", format="off", begins=ascii(text[:16]))
    vertices, faces = int(words[1]), int(words[2])
    _claim("vertices", 6 * vertices, size)
    _claim("faces", 8 * faces, size)
    _count_faces(faces, limits)


def _check_zip(file: BinaryIO, size: int, limits: Limits) -> None:
    with zipfile.ZipFile(file) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > min(limits.max_unpacked_bytes, max(BOMB_BYTES, ZIP_FACTOR * size)):
        raise Reject("allocation_bomb", what="archive", claimed=total, available=size)


_CHECKS: dict[str, Callable[[BinaryIO, int, Limits], None]] = {
    "glb": _check_glb,
    "gltf": _check_gltf,
    "ply": _check_ply,
    "stl": _check_stl,
    "off": _check_off,
    "3mf": _check_zip,
    "zae": _check_zip,
}
