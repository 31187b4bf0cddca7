"""Read the parts of a zipped format (3MF, zipped COLLADA) within the limits of a loaded file."""

from __future__ import annotations

import io
import posixpath
import struct
import zipfile
import zlib
from urllib.parse import unquote

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.member_names import folded

BOMB_BYTES = 1 << 26  # contents up to this size may have any ratio
MAX_ZIP_RATIO = 200  # unpacked to packed bytes; text that compresses well stays below it
# What the zip library raises on a damaged, encrypted or unknown member.
MEMBER_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
)


class ZipPackage:
    """The parts of a zipped file by name. Upper and lower case are equal.

    Args:
        content: The zip file.
        cfg: The limit of unpacked bytes.

    Raises:
        Reject: "allocation_bomb" if the parts together are too large.
        zipfile.BadZipFile: If the content is no zip file.
    """

    def __init__(self, content: bytes, cfg: LoadConfig):
        self._archive = zipfile.ZipFile(io.BytesIO(content))
        members = [info for info in self._archive.infolist() if not info.is_dir()]
        total = sum(info.file_size for info in members)
        if total > min(cfg.max_unpacked_bytes, max(BOMB_BYTES, MAX_ZIP_RATIO * len(content))):
            raise Reject("allocation_bomb", what="archive", claimed=total, available=len(content))
        # As when the archive is unpacked, the last one of two members with the same name counts.
        self._members = {part_name(info.filename): info for info in members}
        self._names = {folded(unquote(name)): name for name in self._members}
        self._names |= {folded(name): name for name in self._members}
        self._used: set[str] = set()

    def find(self, name: str, base: str = "") -> str | None:
        """Return the name of a part as `read` takes it, or None if there is none.

        Args:
            name: Absolute with a leading "/", otherwise relative to the folder of `base`. It may
                be percent-encoded.
            base: Name of the part that refers to it.
        """
        for spelling in (name, unquote(name)):
            found = self._names.get(folded(part_name(spelling, base)))
            if found is not None:
                return found
        return None

    def read(self, name: str) -> bytes:
        """Return the content of a part and mark it as used.

        Raises:
            Any of `MEMBER_ERRORS`: If the part is damaged.
        """
        self._used.add(name)
        return self._archive.read(self._members[name])

    @property
    def names(self) -> list[str]:
        """Names of all parts in the order of the file."""
        return list(self._members)

    def unused_names(self) -> list[str]:
        """Return the names of the parts that nobody has read, in the order of the file."""
        return [name for name in self._members if name not in self._used]


def part_name(name: str, base: str = "") -> str:
    """Return the plain name of a part: no leading slash, no "." and "..", no backslashes."""
    plain = name.strip().replace("\\", "/")
    if not plain.startswith("/"):
        plain = posixpath.join("/", posixpath.dirname(base), plain)
    return posixpath.normpath(plain).lstrip("/")
