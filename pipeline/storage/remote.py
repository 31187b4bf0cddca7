"""Where a build lies: a directory, or a prefix in an object store behind a URL. Nobody else talks to fsspec."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pipeline.core.errors import RunError, UserError
from pipeline.core.files import is_disk_full

log = logging.getLogger(__name__)

# Here an object appears whole or not at all. Elsewhere it is written under another name, then renamed.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
PART_BYTES, PARTS = 16 << 20, 4  # of a large object, sent or fetched at once: 64 MB of memory
MAX_PARTS = 10_000  # of one object, S3's limit
WAITS_S = (
    1.0,
    5.0,
    20.0,
    60.0,
    120.0,
)  # before another try, once the store's package has given up
_S3: dict[str, Any] = {
    "default_block_size": PART_BYTES,
    "max_concurrency": PARTS,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}
OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}
EXTRAS = {
    "s3": "sparse3d[s3]",
    "s3a": "sparse3d[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
# What a store's package raises, next to OSError, once it has been imported.
ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Remote:
    """A place behind a URL, with what the pipeline needs of `Path`. Credentials are its package's business.

    Reading what is not there raises FileNotFoundError. A store that cannot be reached, or refuses, raises RunError
    after some waiting; UserError if the package for its scheme is missing.
    """

    url: str  # without a slash at its end
    waits_s: tuple[float, ...] = field(default=WAITS_S, compare=False, repr=False)

    def __str__(self) -> str:
        return _public(self.url)

    def __truediv__(self, name: str | PurePath) -> Remote:
        return Remote(
            f"{self.url}/{name if isinstance(name, str) else name.as_posix()}", self.waits_s
        )

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def with_name(self, name: str) -> Remote:
        return Remote(f"{self.url.rpartition('/')[0]}/{name}", self.waits_s)

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def options(self) -> dict[str, Any]:
        """What fsspec is given next to the URL."""
        return OPTIONS.get(self.scheme, {})

    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        return self._call("cannot be read", lambda fs, path: fs.exists(path))

    def iterdir(self) -> list[Remote]:
        """What is one level below, by name; [] if there is nothing."""
        try:
            found = self._call(
                "cannot be listed", lambda fs, path: (fs.ls(path, detail=False), path)
            )
        except FileNotFoundError:
            return []
        names = {
            entry.rstrip("/").rpartition("/")[2]
            for entry in found[0]
            if entry.strip("/") != found[1].strip("/")
        }
        return [self / name for name in sorted(names)]

    def files(self) -> list[str]:
        """Every object below, at any depth, relative to this place, by name."""
        try:
            found, root = self._call("cannot be listed", lambda fs, path: (fs.find(path), path))
        except FileNotFoundError:
            return []
        start = root.strip("/") + "/"
        return sorted(
            path.strip("/")[len(start) :] for path in found if path.strip("/").startswith(start)
        )

    def read_bytes(self, first: int | None = None) -> bytes:
        """The object, or its first so many bytes."""
        return self._call(
            "cannot be read", lambda fs, path: fs.cat_file(path, start=first and 0, end=first)
        )

    def read_range(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start`."""
        return self._call(
            "cannot be read", lambda fs, path: fs.cat_file(path, start=start, end=start + size)
        )

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Objects below this place, many at once, in order."""
        found, path = self._call(
            "cannot be read", lambda fs, path: (fs.cat([f"{path}/{name}" for name in names]), path)
        )
        return [found[f"{path}/{name}"] for name in names]

    def write_bytes(self, data: bytes) -> None:
        """One object, in place of what is there, whole or not at all."""
        self._write(lambda fs, path: fs.pipe_file(path, data))

    def put(self, local: Path) -> None:
        """A file as one object; a directory as a tree, of which nothing that was there before is left."""
        if not local.is_dir():
            size = local.stat().st_size
            part = (
                {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS))}
                if self.scheme in OPTIONS
                else {}
            )
            self._write(lambda fs, path: fs.put_file(str(local), path, **part))
            return
        names = sorted(
            path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()
        )
        for name in names:
            (self / name).put(local / name)
        # Last, not first: another attempt at the same commit, not yet known to be dead, may have put the same files.
        self._remove(sorted(set(self.files()) - set(names)))

    def fetch(self, local: Path) -> None:
        """The object as a file. Its folder must be there."""
        self._call("cannot be fetched", lambda fs, path: fs.get_file(path, str(local)))

    def fetch_tree(self, local: Path, names: Sequence[str]) -> None:
        """Objects below this place, many at once, as files below `local`."""
        for name in names:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
        targets = [str(local / name) for name in names]
        if names:
            self._call(
                "cannot be fetched",
                lambda fs, path: fs.get([f"{path}/{name}" for name in names], targets),
            )

    def remove(self) -> None:
        """The object, or all below it; nothing if there is nothing."""
        if self.scheme not in OBJECT_STORES:  # folders are real there
            self._call(
                "cannot be removed",
                lambda fs, path: fs.rm(path, recursive=True) if fs.exists(path) else None,
            )
            return
        names = self.files()
        self._remove(names)
        if not names and self.exists():
            self._call("cannot be removed", lambda fs, path: fs.rm_file(path))

    def _remove(self, names: Sequence[str]) -> None:
        if not names:
            return
        self._call(
            "cannot be removed", lambda fs, path: fs.rm([f"{path}/{name}" for name in names])
        )
        left = set(self.files()) & set(
            names
        )  # bulk deletions do not tell of those that were refused
        if left:
            raise RunError(
                f"{self / min(left)} cannot be removed; allow it, and run the same command to go on"
            )

    def _write(self, write: Callable[[Any, str], object]) -> None:
        def whole(fs: Any, path: str) -> None:
            if self.scheme in OBJECT_STORES:
                write(fs, path)
                return
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(fs, f"{path}.partial")
            fs.mv(f"{path}.partial", path)

        self._call("cannot be written", whole, missing=False)

    def _call(
        self, failed: str, operation: Callable[[Any, str], Answer], missing: bool = True
    ) -> Answer:
        """operation(filesystem, path), again after a while if it fails; `missing`: FileNotFoundError is an answer."""
        for wait_s in (*self.waits_s, None):
            try:
                fs, path = self.filesystem()
                fs.invalidate_cache()  # others write there, too
                return operation(fs, path)
            except _errors() as error:
                if isinstance(error, OSError) and is_disk_full(error):
                    raise
                if isinstance(error, FileNotFoundError) and missing:
                    raise
                reason = _said(error)
                if wait_s is None or isinstance(error, PermissionError):
                    raise RunError(
                        f"{self} {failed} ({reason}); nothing committed is lost, the same command goes on from there"
                    ) from error
                log.warning("%s %s (%s); trying again in %.0f s", self, failed, reason, wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last wait is None")

    def filesystem(self) -> tuple[Any, str]:
        """fsspec's file system, which it keeps for every process, and the path in it."""
        import fsspec  # not by readers of local files

        try:
            fs, path = fsspec.core.url_to_fs(self.url, **self.options)
        except ImportError as error:
            package = EXTRAS.get(self.scheme)
            how = f"pip install '{package}'" if package else str(error)
            raise UserError(
                f"{self}: the package for {self.scheme}:// is missing; {how}"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{self} is no URL that can be used: {error}") from error
        return fs, path


Location = Path | Remote


def location(text: str | Path | Remote) -> Location:
    """A path, or a URL if it begins like one; file:// is a path. ValueError for one with another machine's name."""
    if not isinstance(text, str):
        return text
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme.lower() in ("file", "local"):
        if not rest.startswith("/"):
            raise ValueError(
                f"a {scheme} URL must have three slashes and an absolute path, got {text}"
            )
        return Path(rest)
    return Remote(f"{scheme.lower()}://{rest.rstrip('/')}")


def children(place: Location) -> list[Location]:
    """What is one level below, by name; [] if there is nothing."""
    if isinstance(place, Remote):
        return list(place.iterdir())
    return list(sorted(place.iterdir())) if place.is_dir() else []


def files(place: Location) -> list[str]:
    """Every file below, relative to `place`, by name."""
    if isinstance(place, Remote):
        return place.files()
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


def readable(place: Location) -> Path | BytesIO:
    """What pyarrow can read from: the path, or the object's bytes. FileNotFoundError if there is no such object."""
    return BytesIO(place.read_bytes()) if isinstance(place, Remote) else place


def read_all(root: Location, names: Sequence[str]) -> Iterable[bytes]:
    """The content of files below `root`, in order."""
    if isinstance(root, Remote):
        return root.read_many(names)
    return ((root / name).read_bytes() for name in names)


def remove(place: Location) -> None:
    """A folder or prefix and all below it; nothing if it is not there."""
    if isinstance(place, Remote):
        place.remove()
    else:
        shutil.rmtree(place, ignore_errors=True)


def write_whole(place: Location, data: bytes) -> None:
    """A file that is there whole or not at all, with the folders above it."""
    if isinstance(place, Remote):
        place.write_bytes(data)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.partial")
    partial.write_bytes(data)
    partial.replace(place)


def check_output(out: Location) -> None:
    """UserError unless a build can be written to a URL, which is found out by writing a few bytes there."""
    if isinstance(out, Path):
        return
    if out.scheme == "memory":
        raise UserError(f"{out} is seen by one process alone; choose another --out")
    if not out.url.partition("://")[2].strip("/"):
        raise UserError(f"{out} names no bucket; choose another --out")
    probe = Remote(out.url, waits_s=()) / ".scratch" / f"probe-{uuid.uuid4().hex}"
    try:
        out.filesystem()
        probe.write_bytes(b"sparse3d")
        same = probe.read_bytes() == b"sparse3d"
        probe.remove()
    except (RunError, OSError, NotImplementedError) as error:
        reason = _said(error.__cause__ or error)
        raise UserError(
            f"cannot write to {out}: {reason}; make it writable, or choose another --out"
        ) from error
    if not same:
        raise UserError(
            f"cannot write to {out}: what was written is not what is read; choose another --out"
        )


def check_input(directory: Location) -> None:
    """UserError unless there is something at a path or URL."""
    if isinstance(directory, Path):
        if not directory.is_dir():
            raise UserError(f"no directory {directory}; give a build's output directory")
        return
    try:
        directory.filesystem()
        there = Remote(directory.url, waits_s=()).iterdir()
    except (RunError, OSError, NotImplementedError) as error:
        raise UserError(f"cannot read {directory}: {_said(error.__cause__ or error)}") from error
    if not there:
        raise UserError(f"nothing at {directory}; give a build's output directory")


def _said(error: BaseException) -> str:
    """One line of what a store's package raised."""
    return _public(" ".join(f"{type(error).__name__}: {error}".split()))[:300].rstrip(".")


def _public(text: str) -> str:
    """Without the name and password that a URL may carry."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _errors() -> tuple[type[BaseException], ...]:
    """What talking to a store may raise. Looked up in what is imported: only one of the packages is."""
    found = [getattr(sys.modules[module], name) for module, name in ERRORS if module in sys.modules]
    return (OSError, *found)
