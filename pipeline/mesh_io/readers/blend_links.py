"""List the files that a blend file makes Blender open, before Blender opens it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.file_checks import GZIP_MAGIC, ZSTANDARD_MAGIC

COMPRESSIONS = {GZIP_MAGIC: "gzip", ZSTANDARD_MAGIC: "zstd"}
CHUNK_BYTES = 1 << 20
# Structs of a blend file and their members that name files or directories which Blender reads while
# it opens and evaluates a scene. Images are not among them: only the exporter reads them.
LINKING_MEMBERS = {
    "Library": ("name", "filepath"),  # other blend files; "filepath" was absolute before 2.5
    "CacheFile": ("filepath",),  # Alembic and USD
    "CacheFileLayer": ("filepath",),
    "Volume": ("filepath",),
    "VFont": ("name",),
    "MeshCacheModifierData": ("filepath",),
    "FluidDomainSettings": ("cache_directory",),
    "OceanModifierData": ("cachepath",),
    "PointCache": ("path",),
    "bNodeSocketValueString": ("value",),  # paths of nodes that import files
}
LIBRARY = "Library"
MEMBER = re.compile(r"(\w+)((?:\[\d+\])*)")  # of a plain array, without pointers


def check_links(content: bytes, path: Path, root: Path, cfg: LoadConfig) -> None:
    """Reject a blend file that makes Blender open a file outside the root.

    The libraries inside the root are checked, too. Links to files that do not exist are harmless.

    Args:
        content: The blend file, which may be compressed.
        path: Its path.
        root: Directory of the files that may be used, resolved.
        cfg: The limit of unpacked bytes, of all files together.

    Raises:
        Reject: "unreadable" with the error "file_outside_root", or with "blend_structure" if the
            file has no structure that could be checked. "allocation_bomb" if the unpacked files are
            too large.
    """
    path = path.resolve()
    available = cfg.max_unpacked_bytes
    checked = {path}
    pending = [(path, content)]
    while pending:
        place, packed = pending.pop()
        unpacked = _unpacked(packed, available)
        available -= len(unpacked)
        try:
            links = list(_links(unpacked))
        except (ValueError, IndexError, struct.error) as error:
            raise Reject("unreadable", error="blend_structure", message=str(error)) from error
        for kind, name in links:
            target = _place(name, place.parent)
            if target is None:
                continue
            if not target.is_relative_to(root):
                raise Reject("unreadable", error="file_outside_root", kind=kind, name=name[:120])
            if kind == LIBRARY and target.is_file() and target not in checked:
                checked.add(target)
                pending.append((target, target.read_bytes()))


def _place(name: str, folder: Path) -> Path | None:
    """Return the resolved place of a file or directory as Blender finds it, None without one.

    "//" is the directory of the blend file. Outside of Windows, Blender reads backslashes as
    slashes and drops the letter of a drive.
    """
    plain = re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/")
    try:
        beside = plain.startswith("//")
        place = (folder / plain.lstrip("/") if beside else Path(plain)).resolve()
        return place if place.exists() else None
    except (OSError, RuntimeError, ValueError):  # no name of a file, or a link to itself
        return None


def _unpacked(content: bytes, available: int) -> bytes:
    """Return the content without its compression.

    Raises:
        Reject: "allocation_bomb" if it has more than `available` bytes, "unreadable" if it is
            damaged.
    """
    kinds = [kind for magic, kind in COMPRESSIONS.items() if content.startswith(magic)]
    if not kinds:
        return content
    parts: list[bytes] = []
    total = 0
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), kinds[0]) as stream:
            while part := stream.read(CHUNK_BYTES):
                parts.append(part)
                total += len(part)
                if total > available:
                    size = len(content)
                    raise Reject("allocation_bomb", what="blend", claimed=total, available=size)
    except OSError as error:
        raise Reject("unreadable", error="blend_structure", message=str(error)[:120]) from error
    return b"".join(parts)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a blend file writes numbers and blocks.

    Attributes:
        order: "<" or ">", the byte order of `struct`.
        pointer_bytes: 4 or 8.
        head: The head of a block in the notation of `struct`.
        length: Position of the number of bytes of the block in the head.
        kind: Position of the number of its struct.
        start: Byte at which the first block begins.
    """

    order: str
    pointer_bytes: int
    head: str
    length: int
    kind: int
    start: int


def _layout(content: bytes) -> _Layout:
    """Return the layout that the first bytes state.

    Raises:
        ValueError: If they are not those of a blend file.
    """
    # Since Blender 5: BLENDER, bytes of this header, "-", version of the layout, "v", version.
    if match := re.match(rb"BLENDER(\d\d)-01v\d{4}", content):
        return _Layout(
            order="<", pointer_bytes=8, head="<4siQqq", length=3, kind=1, start=int(match[1])
        )
    match = re.match(rb"BLENDER([_-])([vV])\d{3}", content)
    if match is None:
        raise ValueError(f"unknown header {content[:17].decode('latin-1')!a}")
    order = "<" if match[2] == b"v" else ">"
    is_small = match[1] == b"_"
    return _Layout(
        order=order,
        pointer_bytes=4 if is_small else 8,
        head=order + ("4siIii" if is_small else "4siQii"),
        length=1,
        kind=3,
        start=12,
    )


def _blocks(content: bytes, layout: _Layout) -> Iterator[tuple[bytes, int, memoryview]]:
    """Yield (code, number of the struct, data) of each block.

    Raises:
        ValueError: If a block has a negative length.
    """
    head = struct.Struct(layout.head)
    view = memoryview(content)
    position = layout.start
    while position + head.size <= len(content):
        fields = head.unpack_from(content, position)
        position += head.size
        code, length = fields[0].strip(b"\0"), fields[layout.length]
        if code == b"ENDB":
            return
        if length < 0:
            raise ValueError(f"a block of {length} bytes")
        yield code, fields[layout.kind], view[position : position + length]
        position += length


def _links(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield (struct, name of a file) of each name that is not empty.

    Raises:
        ValueError, IndexError, struct.error: If the structure is damaged.
    """
    layout = _layout(content)
    catalogue = next((data for code, _, data in _blocks(content, layout) if code == b"DNA1"), None)
    if catalogue is None:
        raise ValueError("no block DNA1, which describes the others")
    structs = _structs(bytes(catalogue), layout)
    for _, number, data in _blocks(content, layout):
        if not 0 <= number < len(structs):
            continue
        kind, size, members = structs[number]
        for offset, length in members:
            for start in range(offset, len(data), size):
                text = bytes(data[start : start + length]).split(b"\0")[0]
                if text:
                    yield kind, text.decode("utf-8", errors="surrogateescape")


def _structs(catalogue: bytes, layout: _Layout) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """Return the name, the bytes, and the linking members as (offset, bytes) of each struct.

    Args:
        catalogue: The block DNA1: the names of members, names and sizes of types, and the structs.
        layout: The layout of the file.
    """
    reader = _CatalogueReader(catalogue, layout.order)
    names = reader.strings(b"NAME")
    types = reader.strings(b"TYPE")
    reader.section(b"TLEN")
    sizes = reader.shorts(len(types))
    reader.section(b"STRC")
    structs = []
    for _ in range(reader.count()):
        kind, count = reader.shorts(2)
        pairs = reader.shorts(2 * count)
        linking = LINKING_MEMBERS.get(types[kind], ())
        members = []
        offset = 0
        for member_type, member in zip(pairs[::2], pairs[1::2], strict=True):
            plain = MEMBER.fullmatch(names[member])
            # Pointers are written as "*name", pointers to functions as "(*name)()".
            is_pointer = names[member].startswith(("*", "("))
            size = layout.pointer_bytes if is_pointer else sizes[member_type]
            for length in re.findall(r"\[(\d+)\]", names[member]):
                size *= int(length)
            if plain is not None and plain[1] in linking and types[member_type] == "char":
                members.append((offset, size))
            offset += size
        if members and offset != sizes[kind]:
            raise ValueError(f"{types[kind]} has {offset} bytes of members in {sizes[kind]} bytes")
        structs.append((types[kind], sizes[kind], members))
    return structs


class _CatalogueReader:
    """Reads the parts of a block DNA1 one after the other."""

    def __init__(self, content: bytes, order: str):
        self._content = content
        self._order = order
        self._position = 4  # after "SDNA"

    def section(self, tag: bytes) -> None:
        """Go to the next section, which begins at a multiple of four bytes."""
        self._position = (self._position + 3) // 4 * 4
        found = self._content[self._position : self._position + 4]
        if found != tag:
            raise ValueError(f"DNA1 has {found.decode('latin-1')!a} instead of {tag.decode()}")
        self._position += 4

    def count(self) -> int:
        """Read a number of things, each of which takes at least one byte."""
        (number,) = struct.unpack_from(f"{self._order}i", self._content, self._position)
        self._position += 4
        if not 0 <= number <= len(self._content):
            raise ValueError(f"DNA1 states {number} entries in {len(self._content)} bytes")
        return number

    def strings(self, tag: bytes) -> list[str]:
        """Read a section of strings that end with a zero byte."""
        self.section(tag)
        strings = []
        for _ in range(self.count()):
            end = self._content.index(b"\0", self._position)
            strings.append(self._content[self._position : end].decode("latin-1"))
            self._position = end + 1
        return strings

    def shorts(self, count: int) -> tuple[int, ...]:
        """Read 16 bit numbers."""
        numbers = struct.unpack_from(f"{self._order}{count}H", self._content, self._position)
        self._position += 2 * count
        return numbers
