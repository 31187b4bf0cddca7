"""Render shards: WebDataset tars in view-major order with an offset index, written, read and checked."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.cameras import look_at_origin, sample_camera
from pipeline.core.image_codec import decode
from pipeline.core.options import CameraSet, ImageFormat
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import View
from pipeline.storage.remote import AnyStorePath, StorePath, arrow_source, store_path

HEADER = 512  # bytes of a tar member's header; members are padded to it
ATTEMPTS = 32  # redrawn cameras that a check recognises
TOLERANCE = 1e-9  # of a camera's numbers against the formula
INDEX = pa.schema(
    [("key", pa.string()), ("member", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
)
DRAWN = (
    "azimuth_degrees",
    "elevation_degrees",
    "focal_mm",
)  # a camera's free numbers; the rest follows
META_KEYS = {"uid", "view", "width", "height", *look_at_origin(0, 0, 50).meta()}


class Row(NamedTuple):
    """One member of the tar."""

    key: str
    member: str
    offset: int  # of its data, bytes
    size: int


def view_key(uid: str, view: int) -> str:
    """The members' common name, `<uid>-<view:02d>`. ValueError for a uid that would break it apart."""
    if not re.fullmatch(r"[a-z0-9-]{1,80}", uid):
        raise ValueError(f"uid must be 1 to 80 of a-z, 0-9 and '-', got {uid!r}")
    return f"{uid}-{view:02d}"


def index_path(path: AnyStorePath) -> AnyStorePath:
    """000123.tar -> 000123.index.parquet."""
    return path.with_name(path.name.removesuffix(".tar") + ".index.parquet")


def dump_meta(meta: Mapping[str, Any]) -> bytes:
    """The bytes of a view's json member."""
    return json.dumps(meta, sort_keys=True, allow_nan=False).encode()


def save_view(
    folder: Path, uid: str, view: int, data: bytes, meta: Mapping[str, Any], format: ImageFormat
) -> None:
    """Put one encoded view into a scratch folder, for `ViewFolder` to find."""
    key = view_key(uid, view)
    (folder / f"{key}.{format}").write_bytes(data)
    (folder / f"{key}.json").write_bytes(dump_meta(meta))


@dataclass(frozen=True)
class ViewFolder(Sequence[tuple[bytes, dict[str, Any]]]):
    """An asset's encoded views in a folder, read one at a time: an entry of `write_render_shard`."""

    folder: Path
    uid: str
    views: int
    format: ImageFormat = "png"

    def __len__(self) -> int:
        return self.views

    def __getitem__(self, view: int) -> tuple[bytes, dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= view < self.views:
            raise IndexError(view)
        key = view_key(self.uid, view)
        data = (self.folder / f"{key}.{self.format}").read_bytes()
        return data, json.loads((self.folder / f"{key}.json").read_bytes())


def write_render_shard(
    path: Path,
    entries: Sequence[tuple[str, Sequence[tuple[bytes, Mapping[str, Any]]]]],
    format: ImageFormat = "png",
) -> None:
    """Write `path` (a .tar) and its index: view 0 of every asset in the order given, then view 1, and so on.

    An entry is a uid and its views as (encoded image, meta); use `ViewFolder` so that one view at a time is in memory.
    The bytes depend on the entries alone. Both files appear whole or not at all, the tar last.
    ValueError if a uid comes twice, the view counts differ, or a meta is not its view's.
    """
    uids = [uid for uid, _ in entries]
    counts = {len(views) for _, views in entries}
    if len(set(uids)) != len(uids) or len(counts) > 1:
        raise ValueError(
            f"entries must be of different assets with equally many views, got {uids} with {counts}"
        )
    index = index_path(path)
    partial, partial_index = (file.with_name(f".{file.name}.partial") for file in (path, index))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = _write_tar(partial, entries, max(counts, default=0), format)
        columns = list(zip(*rows)) if rows else [()] * len(INDEX)
        schema = INDEX.with_metadata({"format_version": str(FORMAT_VERSION)})
        table = pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, INDEX)], schema=schema
        )
        pq.write_table(table, partial_index, compression="zstd")
        partial_index.replace(index)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)


def _write_tar(path: Path, entries: Sequence[Any], views: int, format: ImageFormat) -> list[Row]:
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for view in range(views):
            for uid, encoded in entries:
                data, meta = encoded[view]
                if (meta.get("uid"), meta.get("view")) != (uid, view):
                    raise ValueError(
                        f"meta must be of {uid} view {view}, got {meta.get('uid')} view {meta.get('view')}"
                    )
                key = view_key(uid, view)
                for member, content in (
                    (f"{key}.{format}", data),
                    (f"{key}.json", dump_meta(meta)),
                ):
                    header = tarfile.TarInfo(member)  # mtime, uid and gid 0, mode 0644
                    header.size = len(content)
                    rows.append(Row(key, member, tar.offset + HEADER, len(content)))
                    tar.addfile(header, BytesIO(content))
    return rows


def read_index(path: StorePath) -> list[Row]:
    """The shard's index, in tar order. ValueError for another format_version."""
    index = index_path(path)
    table = pq.read_table(arrow_source(index))
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(FORMAT_VERSION):
        raise ValueError(f"format_version of {index} must be {FORMAT_VERSION}, got {version}")
    if table.schema.remove_metadata() != INDEX:
        raise ValueError(f"columns of {index} must be {INDEX.names}, got {table.schema.names}")
    return [Row(*row) for row in zip(*(column.to_pylist() for column in table.columns))]


class RenderShard:
    """Random access to a shard's views, at a path or URL; holds the index, no open file.

    ValueError for another version.
    """

    def __init__(self, path: StorePath | str):
        self.path = store_path(path)
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        for row in read_index(self.path):
            self._places.setdefault(row.key, {})[row.member.removeprefix(row.key + ".")] = (
                row.offset,
                row.size,
            )

    @property
    def keys(self) -> list[str]:
        """`<uid>-<view>` of every view, in tar order."""
        return list(self._places)

    @property
    def uids(self) -> list[str]:
        """The assets, in row order."""
        return list(dict.fromkeys(key.rpartition("-")[0] for key in self._places))

    def views(self, uid: str) -> list[int]:
        """The views stored of an asset; empty for an unknown one."""
        return [
            int(view)
            for key in self._places
            for owner, _, view in [key.rpartition("-")]
            if owner == uid
        ]

    def read_bytes(self, uid: str, view: int) -> tuple[bytes, dict[str, Any]]:
        """The encoded image and its meta. KeyError if the shard has no such view."""
        places = self._places[view_key(uid, view)]
        data = {kind: self._bytes_at(offset, size) for kind, (offset, size) in places.items()}
        meta = json.loads(data.pop("json"))
        (image,) = data.values()
        return image, meta

    def read_images(self, view: int) -> dict[str, bytes]:
        """uid -> encoded image of every asset in that view, which lie together: one sequential read."""
        places = {}
        for key, parts in self._places.items():
            uid, _, number = key.rpartition("-")
            if int(number) == view:
                places[uid] = next(place for kind, place in parts.items() if kind != "json")
        first = min((offset for offset, _ in places.values()), default=0)
        last = max((offset + size for offset, size in places.values()), default=0)
        data = memoryview(self._bytes_at(first, last - first))
        return {uid: bytes(data[offset - first :][:size]) for uid, (offset, size) in places.items()}

    def read(self, uid: str, view: int) -> View:
        """One decoded view. KeyError if the shard has no such view."""
        data, meta = self.read_bytes(uid, view)
        return View(rgba=decode(data), meta=meta)

    def _bytes_at(self, offset: int, size: int) -> bytes:
        if isinstance(self.path, Path):
            with self.path.open("rb") as file:
                return _read_at(file, offset, size)
        data = self.path.read_range(offset, size) if size else b""
        if len(data) != size:
            raise ValueError(f"{size} bytes at {offset} reach past the end of the tar")
        return data


def _read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{size} bytes at {offset} reach past the end of the tar")
    return data


def check_render_shard(
    path: Path,
    uids: Sequence[str],
    views: int,
    image_size: int | None = None,
    cameras: CameraSet | None = None,
) -> list[str]:
    """Every breach of the contract as "rule: where"; empty for a sound shard of these assets, in this order.

    With `cameras` the views must also be of that set, drawn for their own uid and view. PNGs are checked by their
    checksums, not decoded.
    """
    try:
        rows = read_index(path)
        with path.open("rb") as tar:
            keys = [view_key(uid, view) for view in range(views) for uid in uids]
            return list(_problems(path.name, tar, rows, keys, image_size, cameras))
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"unreadable: {error}"]


def _problems(
    name: str,
    tar: IO[bytes],
    rows: list[Row],
    keys: list[str],
    image_size: int | None,
    cameras: CameraSet | None,
) -> Iterator[str]:
    held = list(dict.fromkeys(row.key for row in rows))
    known, present = set(keys), set(held)
    yield from (f"missing view: {name} lacks {key}" for key in keys if key not in present)
    yield from (f"unexpected view: {name} holds {key}" for key in held if key not in known)
    if [key for key in held if key in known] != [key for key in keys if key in present]:
        yield f"order: {name} is not in view-major order"
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            found = [(member.name, member.offset_data, member.size) for member in archive]
    except tarfile.TarError as error:
        yield f"truncated tar: {name}: {error}"
        return
    end = max((offset + size for _, offset, size in found), default=0)
    blocks = -(-end // HEADER) * HEADER + 2 * HEADER  # two empty ones close the archive
    if tar.seek(0, 2) != -(-blocks // tarfile.RECORDSIZE) * tarfile.RECORDSIZE:
        yield f"truncated tar: {name} has {tar.tell()} bytes, not whole records up to its end"
    listed = [(row.member, row.offset, row.size) for row in rows]
    if found != listed:
        first = next(
            (pair for pair in zip(found, listed) if pair[0] != pair[1]), (len(found), len(listed))
        )
        yield f"index mismatch: {name} has {first[0]} where its index has {first[1]}"
        return
    content: dict[str, dict[str, bytes]] = {key: {} for key in held}
    for row in rows:
        parts = content[row.key]
        parts[row.member.removeprefix(row.key + ".")] = _read_at(tar, row.offset, row.size)
        if len(parts) == 2:
            problems = _view_problems(row.key, content.pop(row.key), image_size, cameras)
            yield from (f"{problem}: {name} {row.key}" for problem in problems)
    yield from (f"incomplete view: {name} {key}" for key in content)


def _view_problems(
    key: str, parts: dict[str, bytes], image_size: int | None, cameras: CameraSet | None
) -> Iterator[str]:
    if "json" not in parts or not set(parts) & set(get_args(ImageFormat)):
        yield f"incomplete view: members {sorted(parts)}"
        return
    try:
        meta = json.loads(parts.pop("json"))
        missing = META_KEYS - set(meta)
        drawn = None if missing else look_at_origin(*(float(meta[name]) for name in DRAWN))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        yield f"json: {error}"
        return
    if drawn is None:
        yield f"json: lacks {sorted(missing)}"
        return
    uid, _, view = key.rpartition("-")
    if (meta["uid"], meta["view"]) != (uid, int(view)):
        yield f"json: is of {meta['uid']} view {meta['view']}"
    for field, value in drawn.meta().items():
        try:
            agrees = np.allclose(meta[field], value, rtol=0, atol=TOLERANCE)
        except (ValueError, TypeError):
            agrees = False
        if not agrees:
            yield f"camera: {field} is {meta[field]}, the formula gives {value}"
    if cameras is not None:
        again = (sample_camera(uid, int(view), cameras, attempt) for attempt in range(ATTEMPTS))
        if not any(all(getattr(c, name) == meta[name] for name in DRAWN) for c in again):
            yield f"camera: is not of the set {cameras!r} for this view"
    (data,) = parts.values()
    yield from _image_problems(data, (meta["width"], meta["height"]), image_size)


def _image_problems(data: bytes, stated: tuple[int, int], image_size: int | None) -> Iterator[str]:
    try:
        with Image.open(BytesIO(data)) as image:
            size, mode = image.size, image.mode
            if image.format == "PNG":
                image.verify()  # every chunk's checksum
            else:
                image.load()
    except (OSError, SyntaxError, ValueError) as error:
        yield f"image: {error}"
        return
    if mode != "RGBA":
        yield f"image: must be RGBA, is {mode}"
    if size != stated or (image_size is not None and size != (image_size, image_size)):
        yield f"image size: is {size}, json says {stated}, the build {image_size}"
