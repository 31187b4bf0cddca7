"""What a mesh reader gets beside the bytes of the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Scene
from pipeline.mesh_io.side_files import SideFiles


@dataclass(frozen=True, kw_only=True)
class ReaderContext:
    """What a mesh reader gets beside the bytes of the file.

    Attributes:
        path: The file, for its name and extension.
        cfg: Limits of faces, instances and unpacked bytes.
        side_files: Reads buffers, materials and images that the file refers to.
        warnings: Receives what the reader leaves out.
    """

    path: Path
    cfg: LoadConfig
    side_files: SideFiles
    warnings: WarningLog


class Reader(Protocol):
    """A reader of one format.

    It accounts for everything in the file: each element is used, or stands in
    `pipeline.mesh_io.ignored_elements`, or gives a warning. It allocates no more than a fixed
    multiple of the bytes that are there, whatever counts the file states.

    Raises:
        Reject: "unreadable", "allocation_bomb" or "too_many_faces".
        Exception: Any of `pipeline.mesh_io.load.PARSER_ERRORS`; the loader turns it into
            "unreadable".
    """

    def __call__(self, content: bytes, context: ReaderContext) -> Scene: ...
