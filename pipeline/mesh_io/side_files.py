"""Find the files that an asset refers to by name: buffers, materials, textures."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import unquote

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.member_names import folded
from pipeline.mesh_io.zip_package import MEMBER_ERRORS, ZipPackage

MAX_NAME_LENGTH = 2000  # characters; longer names are no file names
MAX_TAIL = 8  # components of a path of the author's machine

# Where exporters and package layouts keep textures, if the mesh names only the file.
TEXTURE_FOLDERS = (
    "textures",
    "texture",
    "tex",
    "materials/textures",
    "materials",
    "images",
    "image",
    "img",
    "maps",
)


Place = TypeVar("Place", Path, str)


class _NamedFiles(ABC, Generic[Place]):
    """Reads the side files of one asset and warns once about each name without a file.

    A name is tried as written and percent-decoded, with "/" or a backslash as separator, relative
    to the asset. If there is no such file, its last components are tried in the directory of the
    asset and in those above it, up to the root, and the last component alone in their texture
    directories (`TEXTURE_FOLDERS`). Upper and lower case, and composed and decomposed characters,
    are equal if no name fits exactly. A file outside the root is never read.

    Args:
        bases: Where names are tried: at the asset, and in the directories above it up to the root.
        warnings: Receives "side_file_missing" for each file that cannot be read.
    """

    def __init__(self, bases: Sequence[Place], warnings: WarningLog):
        self.bases = bases
        self.warnings = warnings
        self._missing: set[str] = set()
        self._num_own_bases = 1  # of those at the beginning, where names are tried as written

    def read(self, name: str) -> bytes | None:
        """Return the content of a side file, or None with a warning if there is none."""
        place = self.find(name)
        content = None if place is None else self._content(place)
        if content is None:
            plain_name = unquote(name.strip()).replace("\\", "/")
            if plain_name not in self._missing:
                self._missing.add(plain_name)
                self.warnings.add("side_file_missing", plain_name)
        return content

    def find(self, name: str) -> Place | None:
        """Return the place of a side file, or None if there is none below the root."""
        at_the_asset = (
            (path, base) for base in self.bases[: self._num_own_bases] for path in spellings(name)
        )
        for path, base in chain(at_the_asset, product(tails(name), self.bases)):
            place = self._existing(base, path)
            if place is not None:
                return place
        return None

    @abstractmethod
    def _existing(self, base: Place, path: str) -> Place | None:
        """Return the place of the file `path` relative to `base` if it lies below the root."""

    @abstractmethod
    def _content(self, place: Place) -> bytes | None:
        """Return the content of a file, or None if it cannot be read."""


class SideFiles(_NamedFiles[Path]):
    """Reads the side files of one asset in a directory.

    Args:
        asset: The mesh file.
        root: Directory that holds all side files. None means the directory of the asset.
        warnings: Receives "side_file_missing" for each file that cannot be read.
    """

    def __init__(self, asset: Path, root: Path | None, warnings: WarningLog):
        folder = asset.parent.resolve()
        self.root = folder if root is None else root.resolve()
        if not folder.is_relative_to(self.root):
            raise ValueError(f"{asset} must lie below its root {root}")
        above = [base for base in folder.parents if base.is_relative_to(self.root)]
        super().__init__([folder, *above], warnings)

    def beside(self, place: Path) -> SideFiles:
        """Return the same files for a side file that refers to others, such as a material library.

        Names are tried relative to the side file first, and then relative to the asset.

        Args:
            place: The side file, as `find` returned it.
        """
        if place.parent == self.bases[0]:
            return self
        nested = copy(self)  # which shares the names that are known to be missing
        nested.bases = [place.parent, *(base for base in self.bases if base != place.parent)]
        nested._num_own_bases = 2
        return nested

    def _content(self, place: Path) -> bytes | None:
        try:
            return place.read_bytes()
        except OSError:
            return None

    def _existing(self, base: Path, path: str) -> Path | None:
        try:
            exact = Path(os.path.normpath(base / path))
            if exact.is_relative_to(self.root) and exact.is_file():
                resolved = exact.resolve()
                return resolved if resolved.is_relative_to(self.root) else None
            # Component by component, where upper and lower case are equal.
            if not exact.is_relative_to(self.root):
                return None
            actual_path = self.root
            for part in exact.relative_to(self.root).parts:
                actual = (
                    part if (actual_path / part).exists() else _names(actual_path).get(folded(part))
                )
                if actual is None:
                    return None
                actual_path /= actual
            resolved = actual_path.resolve()
            return resolved if resolved.is_file() and resolved.is_relative_to(self.root) else None
        # The name is impossible for a file, or the path is a link to itself.
        except (OSError, ValueError, RuntimeError):
            return None


class PackageFiles(_NamedFiles[str]):
    """Reads the side files of an asset that lies in a zipped package with them.

    Places are the names of parts. The root is the root of the package.

    Args:
        package: The package.
        asset: Name of the part with the asset.
        warnings: Receives "side_file_missing" for each file that cannot be read.
    """

    def __init__(self, package: ZipPackage, asset: str, warnings: WarningLog):
        self.package = package
        bases = [asset]
        while "/" in bases[-1]:
            bases.append(bases[-1].rpartition("/")[0])
        super().__init__(bases, warnings)

    def _existing(self, base: str, path: str) -> str | None:
        return self.package.find(path, base)

    def _content(self, place: str) -> bytes | None:
        try:
            return self.package.read(place)
        except MEMBER_ERRORS:
            return None


def spellings(name: str) -> list[str]:
    """Return a name as written and percent-decoded, with backslashes and with slashes.

    Names that cannot be those of a file have no spellings.
    """
    if not name.strip() or len(name) > MAX_NAME_LENGTH or "\0" in name:
        return []
    plain = [name.strip(), unquote(name.strip())]
    plain += [spelling.replace("\\", "/") for spelling in plain]
    return list(dict.fromkeys(spelling.removeprefix("file://") for spelling in plain))


def tails(name: str) -> list[str]:
    """Return the last components of a path of the author's machine, the longest tail first.

    The last component in each of `TEXTURE_FOLDERS` follows.
    """
    paths = spellings(name)
    parts = [part for part in (paths or [""])[-1].split("/") if part not in ("", ".", "..")]
    longest = max(0, len(parts) - MAX_TAIL)
    ends = ["/".join(parts[start:]) for start in range(longest, len(parts))]
    return ends + [f"{folder}/{parts[-1]}" for folder in TEXTURE_FOLDERS if parts]


@lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, str]:
    """Return {name in one case: name} of the entries of a directory, the first of several."""
    if not folder.is_dir():
        return {}
    names = sorted((path.name for path in folder.iterdir()), reverse=True)
    return {folded(name): name for name in names}
