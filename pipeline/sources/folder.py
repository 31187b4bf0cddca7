"""A local directory of mesh files and archives as a source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.mesh_io.archive import ARCHIVE_FORMATS, ArchiveLimits, archive_format, unpack_mesh
from pipeline.mesh_io.formats import MESH_FORMATS

# Files that belong to a mesh, such as textures. They are not counted as skipped.
SIDE_FORMATS = frozenset(
    {"mtl", "bin", "png", "jpg", "jpeg", "webp", "bmp", "tga", "tif", "tiff", "gif", "ktx2", "dds"}
)

BUILD_FILES = frozenset({"plan.json", "plan.parquet"})  # a directory with both is a build


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Every mesh file below a directory, ordered by relative POSIX path, which keys the uid.

    A zip or tar archive counts as one asset: the mesh with the shortest path in it, and its side
    files. A link to a file inside the directory counts. A link to a directory or out of the
    directory does not. Outputs of builds are skipped, because their renders are tar files. The
    licence is "unknown", and the licence filter accepts it because the user named the directory.

    Args:
        root: The directory.
        licence: Licence of all assets.
        out: Output directory of the current build, which is skipped.
        archives: Limits of archives.
    """

    root: Path
    licence: str = "unknown"
    out: Path | None = None
    archives: ArchiveLimits = field(default_factory=ArchiveLimits)

    @property
    def name(self) -> str:
        return "folder"

    @property
    def side_file_root(self) -> Path:
        """Directory that holds all side files."""
        return self.root

    @property
    def skipped(self) -> dict[str, int]:
        """{extension: number of files that are neither meshes nor side files}."""
        files = [path for path in self._files() if not _is_mesh(path)]
        counts = Counter(_extension(path) if _is_utf8(path) else "(not UTF-8)" for path in files)
        return {name: n for name, n in counts.items() if name not in SIDE_FORMATS}

    def check(self) -> None:
        """Check that the directory can be read and holds a mesh file.

        Raises:
            UserError: If it is missing, not a directory, unreadable or without mesh files.
        """
        if not self.root.exists():
            raise UserError(f"no folder {self.root}; give an existing one as folder:PATH")
        if not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give its folder as folder:PATH")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise UserError(
                f"cannot read the folder {self.root}; allow your user to list and read it"
            )
        if next(self.records(), None) is None:
            formats = " ".join(sorted(MESH_FORMATS) + list(ARCHIVE_FORMATS))
            raise UserError(f"no mesh file in {self.root}; the supported formats are {formats}")

    def records(self) -> Iterator[Record]:
        """Yield one record per mesh file and archive."""
        for path in self._files():
            if _is_mesh(path):
                yield Record(
                    uid=make_uid("folder", path),
                    source=self.name,
                    url=path,
                    licence=self.licence,
                    format=_extension(path),
                )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Return the mesh file itself, or unpack the mesh of an archive below `scratch`.

        Raises:
            FileNotFoundError: If the file is gone or leads out of the directory by now.
            PermissionError: If the file cannot be read.
            Reject: If an archive is damaged, too large, or does not hold exactly one mesh.
        """
        path = readable_file(self.root, record.url)
        if record.format not in ARCHIVE_FORMATS:
            return path
        folder = scratch / "archive"
        folder.mkdir()
        return unpack_mesh(path, folder, self.archives)

    def _files(self) -> list[str]:
        top = self.root.resolve()
        out = None if self.out is None else self.out.resolve()
        excluded = None
        if out is not None and top in out.parents:
            excluded = self.root / out.relative_to(top)
        return _list_files(self.root, excluded)


def readable_file(root: Path, name: str) -> Path:
    """Return the path of a file below a directory.

    Args:
        root: The directory.
        name: Relative POSIX path of the file.

    Raises:
        FileNotFoundError: If the file is missing or leads out of the directory.
        PermissionError: If the file cannot be read.
    """
    path = root / name
    try:
        is_inside = path.resolve().is_relative_to(root.resolve())
    except RuntimeError as error:  # a link to itself
        raise FileNotFoundError(f"{name} is a link to itself") from error
    if not is_inside:
        raise FileNotFoundError(f"{name} leads out of the folder {root}")
    with path.open("rb"):  # raises if the file cannot be read
        return path


def _is_mesh(path: str) -> bool:
    """Return whether a path is that of a mesh or archive.

    A name that is not UTF-8 does not count: it can be neither hashed into a uid nor stored.
    """
    return _extension(path) in (*MESH_FORMATS, *ARCHIVE_FORMATS) and _is_utf8(path)


def _is_utf8(path: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in path)


def _extension(path: str) -> str:
    """Return the extension of a path in lower case, "" without one. It may be double: tar.gz."""
    return archive_format(path) or (path.rpartition(".")[2].lower() if "." in path else "")


def _list_files(root: Path, excluded: Path | None) -> list[str]:
    """Return the sorted relative POSIX paths of all regular files outside builds.

    A link to a file counts if that file is inside `root`. A link to a directory never counts,
    because what it shows inside `root` is listed in its own place.
    """
    top = root.resolve()
    files = []
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            continue  # the files of an unreadable directory cannot be listed
        if folder == excluded or BUILD_FILES.issubset(entry.name for entry in entries):
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif _is_file_inside(top, entry):
                files.append(Path(entry.path).relative_to(root).as_posix())
    return sorted(files)


def _is_file_inside(top: Path, entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a regular file or a link to one below `top`."""
    if not entry.is_symlink():
        return entry.is_file()
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):  # a broken link, or a link to itself
        return False
    return target.is_file() and target.is_relative_to(top)
