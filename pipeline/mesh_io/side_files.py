"""Find the files that an asset refers to by name: buffers, materials, textures."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from pipeline.mesh_io.load_warnings import WarningLog
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


class _NamedFiles:
    """Warns once about each name without a file."""

    def __init__(self, warnings: WarningLog):
        self.warnings = warnings
        self._missing: set[str] = set()

    def _warn_missing(self, name: str) -> None:
        plain_name = unquote(name.strip()).replace("\\", "/")
        if plain_name not in self._missing:
            self._missing.add(plain_name)
            self.warnings.add("side_file_missing", plain_name)


class SideFiles(_NamedFiles):
    """Reads the side files of one asset.

    A name is tried as written and percent-decoded, with "/" or a backslash as separator, relative
    to the directory of the asset. If there is no such file, its last components are tried in the
    directory of the asset and in those above it, up to the root, and the last component alone in
    their texture directories (`TEXTURE_FOLDERS`). Upper and lower case are equal if no name fits
    exactly. A file outside the root is never read.

    Args:
        asset: The mesh file.
        root: Directory that holds all side files. None means the directory of the asset.
        warnings: Receives "side_file_missing" for each file that cannot be read.
    """

    def __init__(self, asset: Path, root: Path | None, warnings: WarningLog):
        super().__init__(warnings)
        self.folder = asset.parent.resolve()
        self.root = self.folder if root is None else root.resolve()
        if not self.folder.is_relative_to(self.root):
            raise ValueError(f"{asset} must lie below its root {root}")

    def read(self, name: str) -> bytes | None:
        """Return the content of a side file, or None with a warning if there is none."""
        path = self.find(name)
        if path is not None:
            try:
                return path.read_bytes()
            except OSError:
                pass
        self._warn_missing(name)
        return None

    def find(self, name: str) -> Path | None:
        """Return the path of a side file, or None if there is none below the root."""
        for path in spellings(name):
            found = self._existing(self.folder, path)
            if found is not None:
                return found
        for tail in tails(name):
            folder = self.folder
            while True:
                found = self._existing(folder, tail)
                if found is not None:
                    return found
                if folder == self.root:
                    break
                folder = folder.parent
        return None

    def _existing(self, folder: Path, name: str) -> Path | None:
        """Return the file `name` below `folder` if it exists and lies below the root."""
        try:
            exact = Path(os.path.normpath(folder / name))
            if exact.is_relative_to(self.root) and exact.is_file():
                resolved = exact.resolve()
                return resolved if resolved.is_relative_to(self.root) else None
            # Component by component, where upper and lower case are equal.
            if not exact.is_relative_to(self.root):
                return None
            path = self.root
            for part in exact.relative_to(self.root).parts:
                actual = part if (path / part).exists() else _names(path).get(part.casefold())
                if actual is None:
                    return None
                path /= actual
            resolved = path.resolve()
            return resolved if resolved.is_file() and resolved.is_relative_to(self.root) else None
        # The name is impossible for a file, or the path is a link to itself.
        except (OSError, ValueError, RuntimeError):
            return None


class PackageFiles(_NamedFiles):
    """Reads the side files of an asset that lies in a zipped package with them.

    Names are tried as by `SideFiles`. The root is the root of the package.

    Args:
        package: The package.
        asset: Name of the part with the asset.
        warnings: Receives "side_file_missing" for each file that cannot be read.
    """

    def __init__(self, package: ZipPackage, asset: str, warnings: WarningLog):
        super().__init__(warnings)
        self.package = package
        self.asset = asset

    def read(self, name: str) -> bytes | None:
        """Return the content of a side file, or None with a warning if there is none."""
        part = self.find(name)
        if part is not None:
            try:
                return self.package.read(part)
            except MEMBER_ERRORS:
                pass
        self._warn_missing(name)
        return None

    def find(self, name: str) -> str | None:
        """Return the name of the part with a side file, or None if there is none."""
        for path in spellings(name):
            found = self.package.find(path, self.asset)
            if found is not None:
                return found
        for tail in tails(name):
            base = self.asset
            while True:
                found = self.package.find(tail, base)
                if found is not None:
                    return found
                if "/" not in base:
                    break
                base = base.rpartition("/")[0]
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
    return {name.casefold(): name for name in names}
