"""Lists of assets: a csv, json or parquet file that selects records and adds columns to them."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid, sha256_of, split_of
from pipeline.core.schema import Record
from pipeline.core.text import counted

log = logging.getLogger(__name__)

LISTED = "listed"  # key of the further columns in a record's metadata
SKETCHFAB = "https://sketchfab.com/3d-models/"
SHOWN = 3  # entries without an asset that the warning quotes
# Names of the columns that identify an asset. Case and underscores do not matter.
UID_NAMES = ("uid", "id", "assetid", "objectid")
SHA256_NAMES = ("sha256",)
KEY_NAMES = ("fileidentifier", "url", "path", "file")
SKETCHFAB_ID = re.compile(r"[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")
FORMATS = ("csv", "json", "parquet")
SPLITS = ("train", "val")  # values of the column that states the split


@dataclass(frozen=True, kw_only=True)
class ListEntry:
    """One row of a list.

    Args:
        number: Position in the list, from 0.
        keys: What names the asset: uids, file identifiers and URLs.
        sha256: Hash of the file's bytes, if the list states it.
        columns: All further columns by name.
    """

    number: int
    keys: tuple[str, ...]
    sha256: str | None
    columns: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class IdList:
    """The content of a list, by what names its assets.

    Args:
        path: The file.
        entries: Its rows in order.
    """

    path: Path
    entries: Sequence[ListEntry]
    _by_key: dict[str, ListEntry] = field(init=False, repr=False)
    _by_sha256: dict[str, ListEntry] = field(init=False, repr=False)

    def __post_init__(self):
        by_key: dict[str, ListEntry] = {}
        by_sha256: dict[str, ListEntry] = {}
        for entry in self.entries:
            for key in entry.keys:
                for name in _spellings(key):
                    by_key.setdefault(name, entry)
            if entry.sha256 is not None:
                by_sha256.setdefault(entry.sha256, entry)
        object.__setattr__(self, "_by_key", by_key)
        object.__setattr__(self, "_by_sha256", by_sha256)

    def uids(self, source: str) -> dict[str, ListEntry]:
        """Return the entries by the uids that their keys have in a source."""
        return {make_uid(source, key): entry for key, entry in self._by_key.items()}

    def entry_of_key(self, key: str) -> ListEntry | None:
        """Return the entry that names a uid, a file identifier or a URL."""
        return self._by_key.get(key)

    def entry_of_sha256(self, sha256: str | None) -> ListEntry | None:
        """Return the entry that states a hash."""
        return None if sha256 is None else self._by_sha256.get(sha256)

    @property
    def needs_hashes(self) -> bool:
        """Whether some entry is named by its hash alone."""
        return any(entry.sha256 is not None and not entry.keys for entry in self.entries)


@dataclass(frozen=True, kw_only=True)
class ListedAssets:
    """The assets of a source that a list names, in the order of the source.

    Records get the hash that the list states and its further columns. An asset whose source states
    another hash than the list is left out.

    Args:
        source: The source.
        ids: The list.
        matched: Receives the numbers of the entries that have an asset.
    """

    source: Any
    ids: IdList
    matched: set[int]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def skipped(self) -> dict[str, int]:
        """{extension: number of files} that the source left out."""
        return getattr(self.source, "skipped", {})

    def snapshot(self) -> str:
        """Return the hash of the source's catalogue and of the list."""
        own = getattr(self.source, "snapshot", None)
        of_source = "" if own is None else own()
        return f"{of_source}+{sha256_of(self.ids.path)}".lstrip("+")

    def records(self) -> Iterator[Record]:
        """Yield the listed assets."""
        uids = self.ids.uids(self.source.name)
        root = getattr(self.source, "root", None) if self.ids.needs_hashes else None
        for record in self.source.records():
            entry = (
                self.ids.entry_of_key(record.uid)
                or self.ids.entry_of_key(record.url)
                or uids.get(record.uid)
                or self.ids.entry_of_sha256(record.sha256)
            )
            if entry is None and root is not None and record.sha256 is None:
                entry = self.ids.entry_of_sha256(_hash_of_file(root / record.url))
            if entry is None or _other_file(record, entry):
                continue
            self.matched.add(entry.number)
            yield with_columns(replace(record, sha256=record.sha256 or entry.sha256), entry.columns)


def _other_file(record: Record, entry: ListEntry) -> bool:
    return None not in (record.sha256, entry.sha256) and record.sha256 != entry.sha256


def _hash_of_file(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None  # the build records that the file cannot be read


def with_columns(record: Record, columns: Mapping[str, Any]) -> Record:
    """Return the record with further columns of a list in its metadata."""
    if not columns:
        return record
    metadata = json.loads(record.metadata or "{}")
    metadata[LISTED] = {**metadata.get(LISTED, {}), **columns}
    return replace(record, metadata=json.dumps(metadata, sort_keys=True, ensure_ascii=False))


def listed_columns(metadata: str) -> dict[str, Any]:
    """Return the further columns of a list that a record carries."""
    return json.loads(metadata).get(LISTED, {}) if metadata else {}


def check_splits(ids: IdList, column: str) -> None:
    """Check that a column of a list states the split of every asset.

    Raises:
        UserError: If a row has another value than those of SPLITS, or none.
    """
    for entry in ids.entries:
        if entry.columns.get(column) not in SPLITS:
            raise UserError(
                f"{ids.path}: row {entry.number + 1} must have {' or '.join(SPLITS)} in the column "
                f"{column} of --split-column, got {entry.columns.get(column)!r}"
            )


def split_of_record(record: Record, *, val_percent: int, column: str | None) -> str:
    """Return the split of an asset, "train" or "val".

    Args:
        record: The asset.
        val_percent: Percentage of the assets in the validation split.
        column: Column of the list that states the split. None lets the hash of the uid, or of the
            group of copies, decide.
    """
    if column is not None:
        return str(listed_columns(record.metadata)[column])
    return split_of(record.split_key or record.uid, val_percent)


def warn_of_missing(ids: IdList, matched: set[int]) -> int:
    """Log the entries of a list that no asset has, and return their number.

    Raises:
        UserError: If no entry has an asset.
    """
    missing = [entry for entry in ids.entries if entry.number not in matched]
    if not missing:
        return 0
    examples = ", ".join(next(iter(entry.keys), entry.sha256 or "") for entry in missing[:SHOWN])
    total = counted(len(ids.entries), "row")
    if len(missing) == len(ids.entries):
        raise UserError(
            f"{ids.path} names no asset of the sources ({total}, such as {examples}); name a "
            "source that has them"
        )
    log.warning(
        "%s: %d of %s are no assets of the sources, such as %s.",
        *(ids.path, len(missing), total, examples),
    )
    return len(missing)


def read_id_list(path: Path) -> IdList:
    """Read a list of assets.

    A csv or parquet file has one row per asset and names its columns. A json file is a list of
    identifiers, a list of objects, or an object whose keys are identifiers. The columns uid,
    sha256, and file_identifier or url name the asset; all others are kept as they are.

    Args:
        path: The file. Its extension is csv, json or parquet.

    Raises:
        UserError: If the file cannot be read, or a row does not name an asset.
    """
    extension = path.suffix.lower().lstrip(".")
    if extension not in FORMATS:
        raise UserError(f"--ids must be a {', '.join(FORMATS[:2])} or parquet file, got {path}")
    try:
        rows = _READERS[extension](path)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; --ids must name an existing list") from error
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read the list {path}: {reason}; --ids must name a readable csv, json or "
            "parquet file"
        ) from error
    if not rows:
        raise UserError(f"{path} names no asset; --ids must name a list with at least one row")
    return IdList(
        path=path, entries=[_to_entry(path, number, row) for number, row in enumerate(rows)]
    )


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(1 << 30)  # captions are long
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number + 1} does not have as many values as there are columns")
    numeric = {
        name
        for name in (rows[0] if rows else ())
        if _plain(name) not in (*UID_NAMES, *SHA256_NAMES, *KEY_NAMES)
        and all(not row[name] or _number(row[name]) is not None for row in rows)
    }
    return [
        {
            name: (_number(text) if name in numeric else text) if text else None
            for name, text in row.items()
        }
        for row in rows
    ]


def _plain(name: object) -> str:
    """Return the name of a column without case, underscores and spaces."""
    return str(name).lower().replace("_", "").replace(" ", "")


def _number(text: str) -> float | int | None:
    """Return the number that a text states, None if it states none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _read_json(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(content) == 1 and lists:  # {"ids": [...]}
            content = lists[0]
        else:
            content = [
                {**(value if isinstance(value, dict) else {"value": value}), "uid": key}
                for key, value in content.items()
            ]
    if not isinstance(content, list):
        raise ValueError(f"it must hold a list or an object, it holds a {type(content).__name__}")
    rows = [{"uid": item} if isinstance(item, str) else item for item in content]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"item {number + 1} must be a text or an object, got {row!r:.40}")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


_READERS = {"csv": _read_csv, "json": _read_json, "parquet": _read_parquet}


def _to_entry(path: Path, number: int, row: Mapping[str, Any]) -> ListEntry:
    keys: list[str] = []
    sha256 = None
    columns: dict[str, Any] = {}
    for name, value in row.items():
        plain = _plain(name)
        text = str(value).strip() if value is not None else ""
        if plain in SHA256_NAMES:
            if text and not SHA256.fullmatch(text.lower()):
                raise UserError(f"{path}: row {number + 1} has the sha256 {text!r}, not 64 digits")
            sha256 = text.lower() or None
        elif plain in UID_NAMES or plain in KEY_NAMES:
            keys += [text] if text else []
        elif value is not None:
            columns[str(name)] = value
    if not keys and sha256 is None:
        raise UserError(
            f"{path}: row {number + 1} names no asset; it needs a uid, sha256, file_identifier or "
            f"url, it has {', '.join(map(str, row)) or 'nothing'}"
        )
    return ListEntry(number=number, keys=tuple(keys), sha256=sha256, columns=columns)


def _spellings(key: str) -> tuple[str, ...]:
    """Return a key as the sources may spell it.

    A Sketchfab id stands alone in Objaverse 1.0, at the end of a page's URL in Objaverse-XL, and
    before ".glb" in lists of files.
    """
    last = key.rstrip("/").rpartition("/")[2]
    sketchfab_id = last.removesuffix(".glb").lower()
    if SKETCHFAB_ID.fullmatch(sketchfab_id):
        return tuple(dict.fromkeys((key, sketchfab_id, SKETCHFAB + sketchfab_id)))
    return (key,)
