"""The manifest of a shard: one row for every asset with its verdict, geometry and position."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import replacing
from pipeline.core.product import is_product_name, resolution_of_column, tokens_column
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.storage.remote import StorePath, arrow_source

STATUSES = ("done", "rejected", "failed")
COLUMNS_BEFORE_TOKENS = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "source", "url", "licence", "sha256", "format")),
        *((name, pa.string()) for name in ("status", "stage", "reason", "numbers")),
        *((name, pa.int64()) for name in ("faces", "vertices", "components")),
        *((name, pa.float64()) for name in ("area", "volume")),
        ("sign_path", pa.string()),
    ]
)
COLUMNS_AFTER_TOKENS = pa.schema(
    [
        ("center", pa.list_(pa.float64(), 3)),
        ("scale", pa.float64()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("split", pa.string()),
    ]
)
# Columns that older manifests do not have. They were added in this order.
LATER_COLUMNS = pa.schema(
    [
        ("up_axis", pa.string()),
        ("up_origin", pa.string()),
        ("warnings", pa.list_(pa.string())),
        ("listed", pa.string()),
        ("visible_moments", pa.binary()),
        ("face_moments", pa.binary()),
    ]
)
LATER_COLUMNS_BY_VERSION = (0, 3, 4, len(LATER_COLUMNS))  # how many of them a manifest may have


def thin_share_name(resolution: int) -> str:
    """Return the name in `numbers` of the share that is too thin at a resolution."""
    return f"thin_share_{resolution}"


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """What a build knows about one asset.

    The geometry is None if the asset ended before it was measured.

    Args:
        uid: Name of the asset in every build.
        source: Name of the source, such as "folder".
        url: Path, URL or key of the asset in its source.
        licence: Licence of the asset, "unknown" if the source states none.
        sha256: Hash of the file's bytes.
        format: Extension of the file without the dot.
        status: "done", "rejected" or "failed".
        stage: The stage or the product that ended the asset. "" if it is done.
        reason: A fixed word for the cause. "" if it is done.
        numbers: Measured values of the stages and of the verdict, by name.
        faces: Number of triangles.
        vertices: Number of vertices.
        components: Number of connected components.
        area: Surface area of the normalised mesh.
        volume: Signed volume of the normalised mesh.
        sign_path: How inside and outside were decided.
        tokens: {resolution: number of tokens, or None if the asset has no bricks there}.
        center: Centre of the file's bounding box. The normalised vertex is (v - center) * scale.
        scale: Factor of the normalisation.
        shard: Name of the shard.
        row: Position in the shard.
        split: "train" or "val". "" while it is not decided, and for copies of assets of both.
        up_axis: The axis of the file that points up. None if the asset ended before it was read,
            or was read by a reader that did not record it.
        up_origin: Where that axis comes from: "stated" by the file or its format, "option", or
            "convention".
        warnings: Codes of the reader's warnings, sorted. `numbers` has counts and examples.
        listed: The further columns of the list that named the asset, by name.
        visible_moments: `surface_moments` of the visible surface, float32. None if the asset ended
            before its topology was known, or was built by a version that did not find copies so.
        face_moments: The same of all faces.
    """

    uid: str
    source: str = ""
    url: str = ""
    licence: str = "unknown"
    sha256: str | None = None
    format: str = ""
    status: str
    stage: str = ""
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    faces: int | None = None
    vertices: int | None = None
    components: int | None = None
    area: float | None = None
    volume: float | None = None
    sign_path: str | None = None
    tokens: dict[int, int | None] = field(default_factory=dict)
    center: tuple[float, float, float] | None = None
    scale: float | None = None
    shard: str = ""
    row: int = 0
    split: str = ""
    up_axis: str | None = None
    up_origin: str | None = None
    warnings: tuple[str, ...] = ()
    listed: dict[str, Any] = field(default_factory=dict)
    visible_moments: bytes | None = None
    face_moments: bytes | None = None

    @property
    def ended_before_products(self) -> bool:
        """Whether the asset was turned away before any product, so that none can be made of it."""
        return self.status != "done" and not is_product_name(self.stage)

    def to_columns(self) -> dict[str, Any]:
        """Return the row as {column: value}."""
        columns = dict(vars(self))
        tokens = columns.pop("tokens")
        columns |= {tokens_column(resolution): count for resolution, count in tokens.items()}
        columns["numbers"] = json.dumps(self.numbers, sort_keys=True)
        columns["listed"] = json.dumps(self.listed, sort_keys=True) if self.listed else ""
        return columns

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> ManifestRow:
        """Return the row that `to_columns` wrote.

        Raises:
            ValueError: If `numbers` is not JSON.
        """
        values: dict[str, Any] = {"tokens": {}}
        for name, value in columns.items():
            resolution = resolution_of_column(name)
            if resolution is None:
                values[name] = value
            else:
                values["tokens"][resolution] = value
        values["numbers"] = json.loads(values["numbers"] or "{}")
        if values["center"] is not None:
            values["center"] = tuple(values["center"])
        values["warnings"] = tuple(values.get("warnings") or ())
        values["listed"] = json.loads(values.get("listed") or "{}")
        return cls(**values)


def manifest_schema(resolutions: Iterable[int]) -> pa.Schema:
    """Return the columns of a manifest. Resolutions have `tokens_<R>` columns, sorted by R."""
    tokens = [pa.field(tokens_column(resolution), pa.int64()) for resolution in sorted(resolutions)]
    return pa.schema(
        [*COLUMNS_BEFORE_TOKENS, *tokens, *COLUMNS_AFTER_TOKENS, *LATER_COLUMNS],
        metadata={"format_version": str(FORMAT_VERSION)},
    )


def write_manifest(path: Path, rows: Sequence[ManifestRow], resolutions: Iterable[int]) -> None:
    """Write the manifest of one shard and replace an older one.

    The same rows give the same bytes.

    Args:
        path: Where the manifest is written.
        rows: The rows of the shard's assets in plan order.
        resolutions: The resolutions that get a column of token counts.
    """
    with replacing(path) as partial:
        partial.write_bytes(encode_manifest(rows, resolutions))


def encode_manifest(rows: Sequence[ManifestRow], resolutions: Iterable[int]) -> bytes:
    """Return the content of a manifest's file, see `write_manifest`."""
    columns = [row.to_columns() for row in rows]
    table = pa.Table.from_pylist(columns, manifest_schema(resolutions))
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    return content.getvalue()


def read_manifest(path: StorePath) -> list[ManifestRow]:
    """Read the manifest of one shard.

    Raises:
        ValueError: If the file is not a manifest of this format version.
    """
    return parse_manifest(path, arrow_source(path))


def parse_manifest(path: StorePath, content: Path | io.BytesIO) -> list[ManifestRow]:
    """Parse the manifest of one shard.

    Args:
        path: Where the manifest lies, for errors.
        content: The path again, or the file's content.

    Raises:
        ValueError: If the file is not a manifest of this format version.
    """
    try:
        table = pq.read_table(content)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a readable manifest: {error}") from error
    check_version(path, table.schema)
    resolutions = [resolution_of_column(name) for name in table.column_names]
    expected = manifest_schema(resolution for resolution in resolutions if resolution is not None)
    old = len(expected) - len(LATER_COLUMNS)
    lengths = [old + later for later in LATER_COLUMNS_BY_VERSION]
    if not any(table.schema.equals(pa.schema(list(expected)[:end])) for end in lengths):
        raise ValueError(
            f"{path} must have the columns {expected.names}, it has {table.column_names}"
        )
    try:
        return [ManifestRow.from_columns(columns) for columns in table.to_pylist()]
    except ValueError as error:
        raise ValueError(f"{path} must be a readable manifest: numbers: {error}") from error


def check_version(path: StorePath, schema: pa.Schema) -> None:
    """Check the format version of a manifest.

    Raises:
        ValueError: If the manifest has another format version than this code reads.
    """
    version = (schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format_version {version}, this code reads {FORMAT_VERSION}: rebuild it"
        )


def count_reasons(rows: Iterable[ManifestRow]) -> list[tuple[str, str, str, int]]:
    """Count assets by verdict.

    Returns:
        (status, stage, reason, number of assets), the finished assets first, then by falling
        number.
    """
    counts = Counter((row.status, row.stage, row.reason) for row in rows)
    return sorted(
        ((*key, count) for key, count in counts.items()),
        key=lambda item: (item[0] != "done", -item[3], item[:3]),
    )
