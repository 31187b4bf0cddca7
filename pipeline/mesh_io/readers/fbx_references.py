"""Names of the image files that an FBX file refers to, for sources that download them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.fbx_tree import FbxElement, parse_fbx

NAMES = ("RelativeFilename", "FileName", "Filename")
GUESSED_FOLDERS = ("textures", "Textures", "../textures", "../Textures", "../Materials")


def image_names(content: bytes) -> list[str]:
    """Return the names of images that lie beside a file, as it states them.

    Images that the file contains are left out. A damaged file has no names.
    """
    try:
        root = parse_fbx(content, LoadConfig(), WarningLog()).root
    except Reject:
        return []
    objects = [item for top in root.all("Objects") for item in top.all("Texture", "Video")]
    embedded = {name for item in objects if _has_content(item) for name in _names(item)}
    names = (name for item in objects for name in _names(item))
    return [name for name in dict.fromkeys(names) if name not in embedded]


def guessed_names(names: list[str]) -> list[str]:
    """Return where images with these names may lie, the most probable places of all first.

    Writers state paths of their own machine. The image then often lies beside the file, or in a
    folder of textures.
    """
    bases = dict.fromkeys(posixpath.basename(name.replace("\\", "/")) for name in names)
    folders = ("", *GUESSED_FOLDERS)
    return [posixpath.join(folder, base) for folder in folders for base in bases if base]


def _has_content(item: FbxElement) -> bool:
    content = item.first("Content")
    return content is not None and any(content.values)


def _names(item: FbxElement) -> Iterator[str]:
    return (name for key in NAMES if (name := item.text_of(key)))
