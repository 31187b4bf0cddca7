"""Render shards: WebDataset tar files with an index of byte offsets, written, read and checked.

The views of a shard are stored in view-major order: view 0 of every asset, then view 1, and so on.
Each view has two members, `<uid>-<view>.png` (or another extension) and `<uid>-<view>.json`.
"""

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
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.cameras import (
    Camera,
    look_at_origin,
    orthographic_camera,
    sample_camera,
)
from pipeline.core.files import replacing
from pipeline.core.image_codec import decode, decode_any
from pipeline.core.options import CameraSet, ImageFormat
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import View
from pipeline.storage.layout import index_path
from pipeline.storage.remote import StorePath, arrow_source, store_path

HEADER_BYTES = 512  # size of a tar header; the data of members is padded to a multiple of it
MAX_CAMERA_ATTEMPTS = 32  # attempts of `sample_camera` among which a check looks for a camera
CAMERA_TOLERANCE = 1e-9  # largest error of a stored camera number
INDEX_SCHEMA = pa.schema(
    [("key", pa.string()), ("member", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
)
SAMPLED_NUMBERS = (
    "azimuth_degrees",
    "elevation_degrees",
    "focal_mm",
)  # the others follow from them
META_KEYS = {"uid", "view", "width", "height", *look_at_origin(0, 0, 50).meta()}


class IndexRow(NamedTuple):
    """One member of the tar file, as its index lists it."""

    key: str  # <uid>-<view>, the common name of the members of a view
    member: str  # the full name of the member
    offset: int  # of the member's data in the tar file, in bytes
    size: int  # of the member's data, in bytes

    @property
    def kind(self) -> str:
        """The extension of the member: "png", "webp" or "json"."""
        return self.member.removeprefix(self.key + ".")


def view_key(uid: str, view: int) -> str:
    """Return the common name of a view's members: `<uid>-<view>`, the view with two digits.

    Raises:
        ValueError: If the uid has other characters than a-z, 0-9 and "-", or more than 80.
    """
    if not re.fullmatch(r"[a-z0-9-]{1,80}", uid):
        raise ValueError(f"uid must be 1 to 80 of a-z, 0-9 and '-', got {uid!r}")
    return f"{uid}-{view:02d}"


def dump_meta(meta: Mapping[str, Any]) -> bytes:
    """Return the content of a view's json member."""
    return json.dumps(meta, sort_keys=True, allow_nan=False).encode()


def save_view(
    folder: Path, uid: str, view: int, data: bytes, meta: Mapping[str, Any], format: str
) -> None:
    """Write one encoded view into a directory from which `ViewFolder` reads it.

    Args:
        folder: An existing directory.
        uid: The asset.
        view: Number of the view.
        data: The encoded image.
        meta: The content of the view's json member.
        format: What follows `<uid>-<view>.` in the name of the image, such as "png".
    """
    key = view_key(uid, view)
    (folder / f"{key}.{format}").write_bytes(data)
    (folder / f"{key}.json").write_bytes(dump_meta(meta))


@dataclass(frozen=True)
class ViewFolder(Sequence[tuple[bytes, dict[str, Any]]]):
    """The encoded views of one asset in a directory. Each is read when it is asked for.

    Items are (encoded image, meta), as `write_render_shard` takes them.
    """

    folder: Path
    uid: str
    views: int
    format: str = "png"

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
    format: str = "png",
) -> None:
    """Write a shard and its index atomically, the tar file last.

    The bytes depend on the entries alone. One view at a time is in memory if the views of the
    entries are `ViewFolder`s.

    Args:
        path: The tar file.
        entries: A pair (uid, views) for each asset. The views are pairs (encoded image, meta).
        format: What follows `<uid>-<view>.` in the names of the images.

    Raises:
        ValueError: If a uid occurs twice, the numbers of views differ, or the meta of a view names
            another asset or view.
    """
    uids = [uid for uid, _ in entries]
    counts = {len(views) for _, views in entries}
    if len(set(uids)) != len(uids) or len(counts) > 1:
        raise ValueError(
            f"entries must be of different assets with equally many views, got {uids} with {counts}"
        )
    with replacing(path) as partial, replacing(index_path(path)) as partial_index:
        rows = _write_tar(partial, entries, max(counts, default=0), format)
        columns = list(zip(*rows)) if rows else [()] * len(INDEX_SCHEMA)
        table = pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA)],
            schema=INDEX_SCHEMA.with_metadata({"format_version": str(FORMAT_VERSION)}),
        )
        pq.write_table(table, partial_index, compression="zstd")


def _write_tar(path: Path, entries: Sequence[Any], views: int, format: str) -> list[IndexRow]:
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for view in range(views):
            for uid, encoded_views in entries:
                data, meta = encoded_views[view]
                if (meta.get("uid"), meta.get("view")) != (uid, view):
                    raise ValueError(
                        f"meta must be of {uid} view {view}, "
                        f"got {meta.get('uid')} view {meta.get('view')}"
                    )
                key = view_key(uid, view)
                for member, content in (
                    (f"{key}.{format}", data),
                    (f"{key}.json", dump_meta(meta)),
                ):
                    header = tarfile.TarInfo(member)  # mtime, uid and gid 0, mode 0644
                    header.size = len(content)
                    rows.append(IndexRow(key, member, tar.offset + HEADER_BYTES, len(content)))
                    tar.addfile(header, BytesIO(content))
    return rows


def read_index(path: StorePath) -> list[IndexRow]:
    """Read the index of a shard.

    Args:
        path: The tar file.

    Returns:
        One row per member, in the order of the tar file.

    Raises:
        ValueError: If the index has another format version or other columns.
    """
    index = index_path(path)
    table = pq.read_table(arrow_source(index))
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(FORMAT_VERSION):
        raise ValueError(f"format_version of {index} must be {FORMAT_VERSION}, got {version}")
    if table.schema.remove_metadata() != INDEX_SCHEMA:
        raise ValueError(
            f"columns of {index} must be {INDEX_SCHEMA.names}, got {table.schema.names}"
        )
    return [IndexRow(*row) for row in zip(*(column.to_pylist() for column in table.columns))]


class RenderShard:
    """Random access to the views of a render shard at a path or URL.

    The index is held in memory. No file stays open.

    Args:
        path: The tar file `renders/<cameras>/<shard>.tar` of a build.

    Raises:
        ValueError: If the shard has another format version.
    """

    def __init__(self, path: StorePath | str):
        self.path = store_path(path)
        self._members: dict[str, dict[str, IndexRow]] = {}  # key -> kind -> member
        for row in read_index(self.path):
            self._members.setdefault(row.key, {})[row.kind] = row

    @property
    def keys(self) -> list[str]:
        """The key `<uid>-<view>` of every view, in the order of the tar file."""
        return list(self._members)

    @property
    def uids(self) -> list[str]:
        """The assets of the shard, in the order of the plan."""
        return list(dict.fromkeys(key.rpartition("-")[0] for key in self._members))

    def views(self, uid: str) -> list[int]:
        """Return the numbers of the views of an asset. The list is empty for an unknown asset."""
        return [
            int(view)
            for key in self._members
            for owner, _, view in [key.rpartition("-")]
            if owner == uid
        ]

    def read_bytes(self, uid: str, view: int) -> tuple[bytes, dict[str, Any]]:
        """Read the encoded image of a view and its meta.

        Raises:
            KeyError: If the shard has no such view.
        """
        data = {
            kind: self._bytes_at(row.offset, row.size)
            for kind, row in self._members[view_key(uid, view)].items()
        }
        meta = json.loads(data.pop("json"))
        (image,) = data.values()
        return image, meta

    def read_images(self, view: int) -> dict[str, bytes]:
        """Read one view of every asset with a single sequential read.

        Returns:
            The encoded image of each asset, by uid.
        """
        images = {}
        for key, members in self._members.items():
            uid, _, number = key.rpartition("-")
            if int(number) == view:
                images[uid] = next(row for kind, row in members.items() if kind != "json")
        start = min((row.offset for row in images.values()), default=0)
        end = max((row.offset + row.size for row in images.values()), default=0)
        data = memoryview(self._bytes_at(start, end - start))
        return {uid: bytes(data[row.offset - start :][: row.size]) for uid, row in images.items()}

    def read(self, uid: str, view: int) -> View:
        """Read and decode one view.

        Raises:
            KeyError: If the shard has no such view.
        """
        data, meta = self.read_bytes(uid, view)
        return View(rgba=decode(data), meta=meta)

    def read_array(self, uid: str, view: int) -> tuple[NDArray[Any], dict[str, Any]]:
        """Read one view as it is stored: depth, normals, albedo, or whatever the product has.

        Returns:
            pixels: [height, width] of a mask, otherwise [height, width, C].
            meta: The content of the view's json.

        Raises:
            KeyError: If the shard has no such view.
        """
        data, meta = self.read_bytes(uid, view)
        (extension,) = set(self._members[view_key(uid, view)]) - {"json"}
        return decode_any(data, extension), meta

    def _bytes_at(self, offset: int, size: int) -> bytes:
        if isinstance(self.path, Path):
            with self.path.open("rb") as file:
                return _read_at(file, offset, size)
        data = self.path.read_range(offset, size) if size else b""
        return _require_size(data, offset, size)


def _read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return _require_size(file.read(size), offset, size)


def _require_size(data: bytes, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise ValueError(f"{size} bytes at {offset} reach past the end of the tar file")
    return data


def check_render_shard(
    path: Path,
    uids: Sequence[str],
    views: int,
    image_size: int | None = None,
    cameras: CameraSet | None = None,
    given: Sequence[Camera] = (),
    extension: str = "",
) -> list[str]:
    """Check a shard of views against the format.

    PNG images are verified by their checksums, not decoded.

    Args:
        path: The tar file.
        uids: The assets that the shard must have, in this order.
        views: Number of views that each asset must have.
        image_size: Width and height that every image must have. None accepts the size in its json.
        cameras: The camera set that every view must be of. None accepts any camera.
        given: The cameras of a file that the views must have, in order, instead of a set.
        extension: What must follow `<uid>-<view>.` in the names of the images. "" accepts PNG and
            WebP images.

    Returns:
        Every problem as "rule: where". Empty if the shard is sound.
    """
    try:
        rows = read_index(path)
        with path.open("rb") as tar:
            keys = [view_key(uid, view) for view in range(views) for uid in uids]
            check = _ViewCheck(
                image_size=image_size,
                cameras=cameras,
                given=tuple(given),
                extensions=frozenset([extension] if extension else get_args(ImageFormat)),
            )
            return list(_shard_problems(path.name, tar, rows, keys, check))
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"unreadable: {error}"]


def _shard_problems(
    name: str,
    tar: IO[bytes],
    rows: list[IndexRow],
    keys: list[str],
    check: _ViewCheck,
) -> Iterator[str]:
    # The views that the index lists must be the expected ones.
    listed_keys = list(dict.fromkeys(row.key for row in rows))
    expected = set(keys)
    listed = set(listed_keys)
    yield from (f"missing view: {name} lacks {key}" for key in keys if key not in listed)
    yield from (
        f"unexpected view: {name} holds {key}" for key in listed_keys if key not in expected
    )
    if [key for key in listed_keys if key in expected] != [key for key in keys if key in listed]:
        yield f"order: {name} is not in view-major order"
    # The tar file must be complete and agree with its index.
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            members = [(member.name, member.offset_data, member.size) for member in archive]
    except tarfile.TarError as error:
        yield f"truncated tar: {name}: {error}"
        return
    end = max((offset + size for _, offset, size in members), default=0)
    padded_end = -(-end // HEADER_BYTES) * HEADER_BYTES
    archive_bytes = padded_end + 2 * HEADER_BYTES  # two empty headers close the archive
    if tar.seek(0, 2) != -(-archive_bytes // tarfile.RECORDSIZE) * tarfile.RECORDSIZE:
        yield f"truncated tar: {name} has {tar.tell()} bytes, which are not whole records"
    index = [(row.member, row.offset, row.size) for row in rows]
    if members != index:
        first = next(
            (pair for pair in zip(members, index) if pair[0] != pair[1]), (len(members), len(index))
        )
        yield f"index mismatch: {name} has {first[0]} where its index has {first[1]}"
        return
    # Every view must have its two members, and they must be sound.
    incomplete: dict[str, dict[str, bytes]] = {key: {} for key in listed_keys}
    for row in rows:
        members_of_view = incomplete.get(row.key)
        if members_of_view is None or row.kind in members_of_view:
            yield f"unexpected member: {name} has {row.member} beside the two of its view"
            continue
        members_of_view[row.kind] = _read_at(tar, row.offset, row.size)
        if len(members_of_view) == 2:
            problems = _view_problems(row.key, incomplete.pop(row.key), check)
            yield from (f"{problem}: {name} {row.key}" for problem in problems)
    yield from (f"incomplete view: {name} {key}" for key in incomplete)


@dataclass(frozen=True, kw_only=True)
class _ViewCheck:
    """What every view of a shard must have, see `check_render_shard`."""

    image_size: int | None
    cameras: CameraSet | None
    given: tuple[Camera, ...]
    extensions: frozenset[str]


def _stored_camera(meta: Mapping[str, Any], given: Sequence[Camera]) -> Camera:
    """Return the camera that the json of a view states."""
    if given:
        return given[int(meta["view"])]
    angles = float(meta["azimuth_degrees"]), float(meta["elevation_degrees"])
    if meta.get("projection") == "orthographic":
        return orthographic_camera(*angles)
    return look_at_origin(*angles, float(meta["focal_mm"]))


def _view_problems(key: str, members: dict[str, bytes], check: _ViewCheck) -> Iterator[str]:
    if "json" not in members or not set(members) & check.extensions:
        yield f"incomplete view: members {sorted(members)}"
        return
    try:
        meta = json.loads(members.pop("json"))
        missing_keys = META_KEYS - set(meta)
        stored_camera = None if missing_keys else _stored_camera(meta, check.given)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        yield f"json: {error}"
        return
    if stored_camera is None:
        yield f"json: lacks {sorted(missing_keys)}"
        return
    uid, _, view = key.rpartition("-")
    if (meta["uid"], meta["view"]) != (uid, int(view)):
        yield f"json: is of {meta['uid']} view {meta['view']}"
    # The matrix and the derived numbers must follow from azimuth, elevation and focal length.
    for field, value in stored_camera.meta().items():
        try:
            agrees = meta[field] == value or np.allclose(
                meta[field], value, rtol=0, atol=CAMERA_TOLERANCE
            )
        except (ValueError, TypeError, LookupError):
            agrees = False
        if not agrees:
            yield f"camera: {field} is {meta.get(field)}, the formula gives {value}"
    cameras = None if check.given else check.cameras
    if cameras is not None:
        attempts = (
            sample_camera(uid, int(view), cameras, attempt)
            for attempt in range(MAX_CAMERA_ATTEMPTS)
        )
        if not any(
            all(getattr(camera, name) == meta[name] for name in SAMPLED_NUMBERS)
            for camera in attempts
        ):
            yield f"camera: is not of the set {cameras!r} for this view"
    ((extension, data),) = members.items()
    size_in_json = meta["width"], meta["height"]
    yield from _image_problems(data, extension, size_in_json, check.image_size)


def _image_problems(
    data: bytes, extension: str, size_in_json: tuple[int, int], image_size: int | None
) -> Iterator[str]:
    expected_mode = "L" if extension == "mask.png" else "RGBA"
    try:
        if extension.endswith("exr"):
            pixels = decode_any(data, extension)
            if pixels.shape[1::-1] != size_in_json:
                yield f"image size: is {pixels.shape[1::-1]}, the json says {size_in_json}"
            if not np.isfinite(pixels).all():
                yield "image: has values that are not finite"
            return
        with Image.open(BytesIO(data)) as image:
            size = image.size
            mode = image.mode
            if image.format == "PNG":
                image.verify()  # compares the checksum of every chunk
            else:
                image.load()
    except (OSError, SyntaxError, ValueError) as error:
        yield f"image: {error}"
        return
    if mode != expected_mode:
        yield f"image: must be {expected_mode}, is {mode}"
    if size != size_in_json or (image_size is not None and size != (image_size, image_size)):
        yield f"image size: is {size}, the json says {size_in_json}, the build {image_size}"
