"""Commit markers: the JSON files that make a product or a manifest of a shard count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.core.product import Product
from pipeline.storage.layout import marker_path
from pipeline.storage.remote import StorePath


@dataclass(frozen=True, kw_only=True)
class CommittedFile:
    """A file or a directory of a product.

    Args:
        path: POSIX path relative to the output directory.
        bytes: Size of the file, or of all files of the directory.
        sha256: The hash that `tree_sha256` returns.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CommitMarker:
    """What a commit marker says about a product of one shard.

    The fields from `format_version` on are None in the marker of a manifest, and `devices` and
    `renderers` are None for products without them. Fields that are None are not written.

    Args:
        shard: Name of the shard.
        product: Name of the product, or "manifest".
        counts: Numbers of assets, tokens and views. For a manifest, numbers of assets by status.
        bytes: Sum of the sizes of `files`.
        files: The files and directories of the product.
        format_version: Version of the file formats.
        config: The options that this product alone depends on.
        config_hash: Hash of all options that the product depends on.
        devices: Devices that computed the distances of SDF bricks.
        renderers: OpenGL renderers that drew the images.
    """

    shard: str
    product: str
    counts: dict[str, int]
    bytes: int
    files: tuple[CommittedFile, ...]
    format_version: int | None = None
    config: dict[str, Any] | None = None
    config_hash: str | None = None
    devices: tuple[str, ...] | None = None
    renderers: tuple[str, ...] | None = None

    def to_json(self) -> str:
        """Return the content of the marker's file."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> CommitMarker:
        """Parse the content of a marker's file. Fields of newer versions are ignored.

        Raises:
            ValueError: If `text` is not a commit marker.
        """
        try:
            content = json.loads(text)
            known = {item.name for item in fields(cls)}
            content = {name: value for name, value in content.items() if name in known}
            content["files"] = tuple(CommittedFile(**file) for file in content["files"])
            for name in ("devices", "renderers"):
                if name in content:
                    content[name] = tuple(content[name])
            return cls(**content)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"not a commit marker: {error}") from error


def read_marker(out: StorePath, shard: str, product: Product | str) -> CommitMarker:
    """Read a commit marker of a build.

    Args:
        out: Output directory of the build.
        shard: Name of the shard.
        product: The product, or MANIFEST.

    Raises:
        FileNotFoundError: If the product is not committed.
        ValueError: If the file is not a commit marker.
    """
    path = marker_path(out, shard, product)
    try:
        return CommitMarker.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def check_sizes(out: StorePath, shard: str, product: Product) -> None:
    """Check that the objects of a remote product have the sizes that its commit marker states.

    This costs one request for the marker and one for each file or directory, and reads no data.
    Local products are not checked.

    Raises:
        ValueError: If a size differs, or the marker is damaged.
        FileNotFoundError: If the product is not committed.
    """
    if isinstance(out, Path):
        return
    for file in read_marker(out, shard, product).files:
        path = out / file.path
        found = path.list_objects()  # a directory has objects below it, a file has none
        size = sum(item.size for item in found.values()) if found else path.describe().size
        if size != file.bytes:
            raise ValueError(f"{path} must have {file.bytes} bytes, got {size}")


def describe_files(out: Path, paths: Sequence[Path]) -> tuple[CommittedFile, ...]:
    """Measure and hash files or directories, given by their paths relative to `out`."""
    described = []
    for path in paths:
        size, digest = tree_sha256(out / path)
        described.append(CommittedFile(path=path.as_posix(), bytes=size, sha256=digest))
    return tuple(described)


def tree_sha256(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the sha256 of a file or a directory.

    The hash of a directory is the sha256 over one line "relative/path NUL sha256 newline" per file,
    sorted by path. NUL is the zero byte.
    """
    if path.is_file():
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    total = 0
    lines = []
    for child in sorted(path.rglob("*"), key=lambda child: child.relative_to(path).as_posix()):
        if child.is_file():
            size, digest = tree_sha256(child)
            total += size
            lines.append(f"{child.relative_to(path).as_posix()}\0{digest}\n")
    return total, hashlib.sha256("".join(lines).encode()).hexdigest()
