"""Render shards: WebDataset tars in view-major order with an offset index, written, read and checked."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pipeline.cameras import SENSOR_MM, look_at_origin
from pipeline.render import ImageFormat, decode
from pipeline.schema import FORMAT_VERSION, View

HEADER = 512  # bytes of a tar member's header
TOLERANCE = 1e-9  # of a camera's numbers against the formula
INDEX = pa.schema([("key", pa.string()), ("member", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
META_KEYS = {"uid", "view", "width", "height", *look_at_origin(0, 0, 50).meta()}


def view_key(uid: str, view: int) -> str:
    """The members' common name, `<uid>-<view:02d>`. ValueError for a uid that would break it apart."""
    if not re.fullmatch(r"[a-z0-9-]{1,80}", uid):
        raise ValueError(f"uid must be 1 to 80 of a-z, 0-9 and '-', got {uid!r}")
    return f"{uid}-{view:02d}"


def index_path(path: Path) -> Path:
    """000123.tar -> 000123.index.parquet."""
    return path.with_suffix(".index.parquet")


def dump_meta(meta: Mapping[str, Any]) -> bytes:
    """The bytes of a view's json member."""
    return json.dumps(meta, sort_keys=True, allow_nan=False).encode()


def save_view(folder: Path, uid: str, view: int, data: bytes, meta: Mapping[str, Any], format: ImageFormat) -> None:
    """Put one encoded view into a scratch folder, for `Scratch` to find."""
    key = view_key(uid, view)
    (folder / f"{key}.{format}").write_bytes(data)
    (folder / f"{key}.json").write_bytes(dump_meta(meta))


@dataclass(frozen=True)
class Scratch(Sequence[tuple[bytes, dict[str, Any]]]):
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

    An entry is a uid and its views as (encoded image, meta); use `Scratch` so that one view at a time is in memory.
    The bytes depend on the entries alone. Both files appear whole or not at all, the tar last.
    ValueError if a uid comes twice, the view counts differ, or a meta is not its view's.
    """
    uids = [uid for uid, _ in entries]
    counts = {len(views) for _, views in entries}
    if len(set(uids)) != len(uids) or len(counts) > 1:
        raise ValueError(f"entries must be of different assets with equally many views, got {uids} with {counts}")
    rows: list[tuple[str, str, int, int]] = []
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for view in range(max(counts, default=0)):
            for uid, views in entries:
                data, meta = views[view]
                if (meta.get("uid"), meta.get("view")) != (uid, view):
                    raise ValueError(
                        f"meta must be of {uid} view {view}, got {meta.get('uid')} view {meta.get('view')}"
                    )
                key = view_key(uid, view)
                for member, content in ((f"{key}.{format}", data), (f"{key}.json", dump_meta(meta))):
                    header = tarfile.TarInfo(member)  # mtime, uid and gid 0, mode 0644
                    header.size = len(content)
                    rows.append((key, member, tar.offset + HEADER, len(content)))
                    tar.addfile(header, BytesIO(content))
    schema = INDEX.with_metadata({"format_version": str(FORMAT_VERSION)})
    columns = list(zip(*rows)) if rows else [()] * len(INDEX)
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, INDEX)], schema=schema)
    index = index_path(path)
    partial_index = index.with_name(f".{index.name}.partial")
    pq.write_table(table, partial_index, compression="zstd")
    partial_index.replace(index)
    partial.replace(path)


def read_index(path: Path) -> list[tuple[str, str, int, int]]:
    """Rows (key, member, offset, size) of the shard's index, in tar order. ValueError for another format_version."""
    index = index_path(path)
    table = pq.read_table(index)
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(FORMAT_VERSION):
        raise ValueError(f"format_version of {index} must be {FORMAT_VERSION}, got {version}")
    if table.schema.remove_metadata() != INDEX:
        raise ValueError(f"columns of {index} must be {INDEX.names}, got {table.schema.names}")
    return list(zip(*(column.to_pylist() for column in table.columns)))


class RenderShard:
    """Random access to a shard's views by seeking; holds the index, no open file. ValueError for another version."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        for key, member, offset, size in read_index(self.path):
            self._places.setdefault(key, {})[member.removeprefix(key + ".")] = (offset, size)

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
        return [int(view) for key in self._places for owner, _, view in [key.rpartition("-")] if owner == uid]

    def read_bytes(self, uid: str, view: int) -> tuple[bytes, dict[str, Any]]:
        """The encoded image and its meta. KeyError if the shard has no such view."""
        places = self._places[view_key(uid, view)]
        with self.path.open("rb") as file:
            data = {kind: _read_at(file, offset, size) for kind, (offset, size) in places.items()}
        meta = json.loads(data.pop("json"))
        (image,) = data.values()
        return image, meta

    def read(self, uid: str, view: int) -> View:
        """One decoded view. KeyError if the shard has no such view."""
        data, meta = self.read_bytes(uid, view)
        return View(rgba=decode(data), meta=meta)


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def check_render_shard(path: Path, uids: Sequence[str], views: int, image_size: int | None = None) -> list[str]:
    """Every breach of the contract, as "rule: what, where"; empty for a sound shard of these assets in this order.

    Images are checked by their checksums and headers, not decoded.
    """
    try:
        rows = read_index(path)
        tar = path.open("rb")
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"unreadable: {error}"]
    with tar:
        return list(_problems(path.name, tar, rows, [view_key(u, v) for v in range(views) for u in uids], image_size))


def _problems(name: str, tar: Any, rows: list[Any], keys: list[str], image_size: int | None) -> Iterator[str]:
    held = list(dict.fromkeys(key for key, *_ in rows))
    yield from (f"missing view: {name} lacks {key}" for key in keys if key not in set(held))
    yield from (f"unexpected view: {name} holds {key}" for key in held if key not in set(keys))
    common = [key for key in keys if key in set(held)]
    if [key for key in held if key in set(keys)] != common:
        yield f"order: {name} is not in view-major order"
    try:
        tar.seek(0)
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            found = [(member.name, member.offset_data, member.size) for member in archive]
    except tarfile.TarError as error:
        yield f"truncated tar: {name}: {error}"
        return
    if found != [(member, offset, size) for _, member, offset, size in rows]:
        yield f"index mismatch: {name} and its index list different members, offsets or sizes"
        return
    by_key: dict[str, dict[str, bytes]] = {}
    for key, member, offset, size in rows:
        content = _read_at(tar, offset, size)
        if len(content) != size:
            yield f"truncated tar: {name} ends within {member}"
            return
        by_key.setdefault(key, {})[member.removeprefix(key + ".")] = content
        if len(by_key[key]) == 2:
            yield from (f"{problem}: {name} {key}" for problem in _view_problems(key, by_key.pop(key), image_size))
    yield from (f"incomplete view: {name} {key} lacks its image or json" for key in by_key)


def _view_problems(key: str, content: dict[str, bytes], image_size: int | None) -> Iterator[str]:
    if "json" not in content or not set(content) & {"png", "webp"}:
        yield f"members must be an image and a json, not {sorted(content)}"
        return
    try:
        meta = json.loads(content.pop("json"))
    except ValueError as error:
        yield f"json does not parse ({error})"
        return
    (data,) = content.values()
    uid, _, view = key.rpartition("-")
    if not isinstance(meta, dict) or META_KEYS - set(meta):
        yield f"json lacks {sorted(META_KEYS - set(meta))}"
        return
    if (meta["uid"], meta["view"]) != (uid, int(view)):
        yield f"json is of {meta['uid']} view {meta['view']}"
    try:
        with Image.open(BytesIO(data)) as image:
            size, mode = image.size, image.mode
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        yield f"image is damaged ({error})"
        return
    if mode != "RGBA":
        yield f"image must be RGBA, is {mode}"
    if size != (meta["width"], meta["height"]) or (image_size is not None and size != (image_size, image_size)):
        yield f"image size is {size}, json says {(meta['width'], meta['height'])}, the build {image_size}"
    expected = look_at_origin(meta["azimuth_degrees"], meta["elevation_degrees"], meta["focal_mm"])
    for field, value in {**expected.meta(), "sensor_mm": SENSOR_MM}.items():
        if not np.allclose(meta[field], value, rtol=0, atol=TOLERANCE):
            yield f"camera {field} is {meta[field]}, the formula gives {value}"
