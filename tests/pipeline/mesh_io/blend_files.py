"""Write small blend files: a header, blocks, and the description of their structs."""

import struct
from collections.abc import Sequence

FILE_NAME_BYTES = 1024
# (type, name) of the members of each struct. Pointers of all sizes, arrays and numbers stand before
# the names, so that a reader must add up the sizes.
STRUCTS = {
    "ID": (("void", "*next"), ("char", "name[66]"), ("short", "us[3]")),
    "Library": (
        ("ID", "id"),
        ("void", "(*callback)()"),
        ("char", f"name[{FILE_NAME_BYTES}]"),
        ("int", "flag"),
        ("int", "_pad"),
    ),
    "CacheFile": (("ID", "id"), ("ID", "*layers[2][1]"), ("char", f"filepath[{FILE_NAME_BYTES}]")),
    "Image": (("ID", "id"), ("char", f"name[{FILE_NAME_BYTES}]")),
}
NUMBERS = {"void": 0, "char": 1, "short": 2, "int": 4}
HEADERS = {
    "64": (b"BLENDER-v405", "<4siQii", 8),
    "32": (b"BLENDER_v248", "<4siIii", 4),
    "big-endian": (b"BLENDER-V260", ">4siQii", 8),
    "5.0": (b"BLENDER17-01v0500", "<4siQqq", 8),
}


def blend_file(links: Sequence[tuple[str, str]] = (), layout: str = "64") -> bytes:
    """Return a blend file with one block for each (struct, name of a file).

    Args:
        links: The structs of `STRUCTS` and the names in them.
        layout: One of `HEADERS`.
    """
    header, head, pointer_bytes = HEADERS[layout]
    order = head[0]
    sizes = dict(NUMBERS)

    def size_of(member: tuple[str, str]) -> int:
        kind, name = member
        size = pointer_bytes if name.startswith(("*", "(")) else sizes[kind]
        for part in name.split("[")[1:]:
            size *= int(part.rstrip("]"))
        return size

    for name, listed in STRUCTS.items():
        sizes[name] = sum(map(size_of, listed))

    def block(code: bytes, data: bytes, number: int = 0, count: int = 1) -> bytes:
        fields = (len(data), 7, number, count)
        if layout == "5.0":
            fields = (number, 7, len(data), count)
        return struct.pack(head, code, *fields) + data

    file = header
    for kind, name in links:
        listed = STRUCTS[kind]
        place = next(n for n, (_, text) in enumerate(listed) if text.startswith(("name", "file")))
        before = sum(map(size_of, listed[:place]))
        data = b"\x55" * before + name.encode().ljust(FILE_NAME_BYTES, b"\0")
        data = data.ljust(sizes[kind], b"\x55")
        file += block(b"LI", data, list(STRUCTS).index(kind))
    return file + block(b"DNA1", _catalogue(sizes, order)) + block(b"ENDB", b"")


def _catalogue(sizes: dict[str, int], order: str) -> bytes:
    names = sorted({name for members in STRUCTS.values() for _, name in members})
    types = list(sizes)

    def section(tag: bytes, *entries: str) -> None:
        nonlocal data
        data = data.ljust((len(data) + 3) // 4 * 4, b"\0") + tag
        if entries:
            data += struct.pack(f"{order}i", len(entries))
            data += b"".join(entry.encode() + b"\0" for entry in entries)

    data = b"SDNA"
    section(b"NAME", *names)
    section(b"TYPE", *types)
    section(b"TLEN")
    data += struct.pack(f"{order}{len(types)}H", *sizes.values())
    section(b"STRC")
    data += struct.pack(f"{order}i", len(STRUCTS))
    for kind, members in STRUCTS.items():
        numbers = [types.index(kind), len(members)]
        for member_kind, name in members:
            numbers += [types.index(member_kind), names.index(name)]
        data += struct.pack(f"{order}{len(numbers)}H", *numbers)
    return data
