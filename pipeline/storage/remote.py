"""Paths of builds: a local directory or a prefix in an object store (S3, GCS, Azure and others).

This is the only module that uses fsspec. Credentials come from the package of each store, for
example from the AWS configuration files.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self, TypeVar

from pipeline.core.errors import RunError, UserError
from pipeline.core.files import is_disk_full, write_atomically

log = logging.getLogger(__name__)

# In these stores an object appears whole or not at all. Elsewhere a file is written under a
# temporary name and then renamed.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
PART_BYTES = 16 << 20  # size of the parts in which a large object is sent or fetched
CONCURRENT_PARTS = 4  # together 64 MB of memory
CONCURRENT_REQUESTS = 64  # connections of a process to a store
MAX_PARTS = 10_000  # S3 accepts no more parts per object
RETRY_WAITS_S = (1.0, 5.0, 20.0, 60.0, 120.0)  # after the retries of the store's own package
_S3: dict[str, Any] = {
    "default_block_size": PART_BYTES,
    "max_concurrency": CONCURRENT_PARTS,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        # The package's default of 10 would limit a store with 100 ms latency to 100 answers a
        # second, whatever the number of threads that read.
        "max_pool_connections": CONCURRENT_REQUESTS,
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}
FILESYSTEM_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}
PACKAGES = {  # what to install for a scheme
    "s3": "sparse3d[s3]",
    "s3a": "sparse3d[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
STORE_ERRORS = (  # (module, class): what the packages raise besides OSError
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
PRECONDITION_FAILED = 412
VERSION_KEYS = ("ETag", "etag", "generation", "mtime", "created", "LastModified")
STOP_POLL_S = 0.2  # how often a read looks whether it is still wanted
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteObject:
    """Size and version of an object.

    Attributes:
        size: Number of bytes.
        version: What the store says of the version, such as the ETag. Empty if it says nothing.
    """

    size: int
    version: str

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> RemoteObject:
        """Return what fsspec's `info` or `find` says about an object."""
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
        return cls(size=int(info["size"]), version=version)


class _Changed(Exception):
    """An object has another version than expected."""


class ReadStop:
    """Ends the reads of a process from a store, although the store gives no answer.

    A copy in another process is a ReadStop of its own.
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def __reduce__(self) -> tuple[type[ReadStop], tuple[()]]:
        return ReadStop, ()

    def set(self) -> None:
        """End all reads that take place, and let later ones fail at once."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether nothing is to be read any more."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for `timeout_s` seconds, or until reads are ended. Return whether they are."""
        return self._event.wait(timeout_s)

    def result(self, future: Future[T]) -> T:
        """Return the result of a future, or cancel it when reads are ended.

        Raises:
            CancelledError: If reads are ended, besides the exceptions of the future.
        """
        while not self.is_set:
            try:
                return future.result(STOP_POLL_S)
            except TimeoutError:
                if future.done():  # just now, or the timeout is one of the request
                    return future.result()
        future.cancel()
        raise CancelledError

    def call(self, function: Callable[[], T]) -> T:
        """Return function(), which is left to itself when reads are ended.

        Raises:
            CancelledError: If reads are ended, besides the exceptions of the function.
        """
        if self.is_set:
            raise CancelledError
        future: Future[T] = Future()

        future.set_running_or_notify_cancel()  # it cannot be cancelled from now on

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  raised by the caller
                future.set_exception(error)

        threading.Thread(target=work, name="store", daemon=True).start()
        return self.result(future)


@dataclass(frozen=True)
class RemotePath:
    """A URL with the methods of `pathlib.Path` that the pipeline needs.

    Failed operations are retried after waits. Every method that talks to the store raises
    FileNotFoundError if it reads something that does not exist, RunError if the store cannot be
    reached or refuses the request, and UserError if the package for the scheme is not installed.

    Args:
        url: The URL without a slash at its end.
        retry_waits_s: Seconds to wait before each retry.
        stop: Ends reads early, which then raise RunError. None waits for the store.
    """

    # Neighbouring pieces of an object that together have about this size are one request. 0 makes
    # every request as large as what is asked for.
    unit_bytes: ClassVar[int] = 0

    url: str
    retry_waits_s: tuple[float, ...] = field(default=RETRY_WAITS_S, compare=False, repr=False)
    stop: ReadStop | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        """Return the URL without user name and password."""
        return _without_password(self.url)

    def __truediv__(self, name: str | PurePath) -> Self:
        relative = name if isinstance(name, str) else name.as_posix()
        return replace(self, url=f"{self.url}/{relative}")

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Self:
        """The path without its last part."""
        return replace(self, url=self.url.rpartition("/")[0])

    def with_name(self, name: str) -> Self:
        """Return the path with its last part replaced."""
        return self.parent / name

    @property
    def scheme(self) -> str:
        """The part before "://", such as "s3"."""
        return self.url.partition("://")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for fsspec that belong to the scheme."""
        return FILESYSTEM_OPTIONS.get(self.scheme, {})

    def exists(self) -> bool:
        """Return whether there is an object of this name or below this prefix."""
        return self._call("cannot be read", lambda fs, path: fs.exists(path))

    def iterdir(self) -> list[Self]:
        """List the objects and prefixes one level below, by name. Return [] if there are none."""
        try:
            entries, root = self._call(
                "cannot be listed", lambda fs, path: (fs.ls(path, detail=False), path)
            )
        except FileNotFoundError:
            return []
        names = {
            entry.rstrip("/").rpartition("/")[2]
            for entry in entries
            if entry.strip("/") != root.strip("/")
        }
        return [self / name for name in sorted(names)]

    def list_files(self) -> list[str]:
        """List all objects below at any depth, by their names relative to this path, sorted."""
        try:
            paths, root = self._call("cannot be listed", lambda fs, path: (fs.find(path), path))
        except FileNotFoundError:
            return []
        prefix = root.strip("/") + "/"
        return sorted(
            path.strip("/")[len(prefix) :] for path in paths if path.strip("/").startswith(prefix)
        )

    def list_objects(self) -> dict[str, RemoteObject]:
        """List all objects below at any depth, by their names relative to this path."""
        try:
            entries, root = self._call(
                "cannot be listed", lambda fs, path: (fs.find(path, detail=True), path)
            )
        except FileNotFoundError:
            return {}
        prefix = root.strip("/") + "/"
        return {
            name.strip("/")[len(prefix) :]: RemoteObject.from_info(entries[name])
            for name in sorted(entries)
            if name.strip("/").startswith(prefix)
        }

    def describe(self) -> RemoteObject:
        """Return the size and the version of the object."""
        return self._call("cannot be read", lambda fs, path: RemoteObject.from_info(fs.info(path)))

    def read_bytes(self, size: int | None = None) -> bytes:
        """Read the object, or only its first `size` bytes."""
        return self._call(
            "cannot be read", lambda fs, path: fs.cat_file(path, start=size and 0, end=size)
        )

    def read_range(self, start: int, size: int) -> bytes:
        """Read `size` bytes from offset `start`, or fewer if the object ends earlier."""
        return self._call(
            "cannot be read", lambda fs, path: fs.cat_file(path, start=start, end=start + size)
        )

    def read_range_of(self, version: RemoteObject, start: int, size: int) -> bytes:
        """Read a range of one version of the object.

        Raises:
            RunError: If the object has another version by now.
        """

        def read(fs: Any, path: str) -> bytes:
            if self.scheme in FILESYSTEM_OPTIONS:  # S3 checks the version in the same request
                data = _read_s3_range(fs, path, version, start, size, self.stop or ReadStop())
            else:
                data = fs.cat_file(path, start=start, end=start + size)
                if RemoteObject.from_info(fs.info(path)) != version:
                    raise _Changed
            if len(data) != size:
                raise OSError(f"got {len(data)} of {size} bytes")
            return data

        try:
            return self._call("cannot be read", read, ends_early=True)
        except (_Changed, FileNotFoundError) as error:
            raise RunError(
                f"{self} was changed or deleted while it was in use; run the same command again, "
                "and write to another prefix when you rebuild data that others read"
            ) from error

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the object as text, as `Path.read_text` does."""
        return self.read_bytes().decode(encoding)

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Read several objects below this path concurrently. Return them in the given order."""
        contents, root = self._call(
            "cannot be read", lambda fs, path: (fs.cat([f"{path}/{name}" for name in names]), path)
        )
        return [contents[f"{root}/{name}"] for name in names]

    def write_bytes(self, data: bytes) -> None:
        """Write one object. It replaces an existing one atomically."""
        self._write(lambda fs, path: fs.pipe_file(path, data))

    def upload(self, local: Path, *, last: str | None = None) -> None:
        """Upload a file as one object, or a directory as a tree of objects.

        Objects below this path that the local directory does not have are deleted.

        Args:
            local: The file or directory.
            last: The file of the directory that is uploaded after all others.
        """
        if not local.is_dir():
            size = local.stat().st_size
            # The package's default part size would exceed MAX_PARTS for the largest files.
            part_options = (
                {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS))}
                if self.scheme in FILESYSTEM_OPTIONS
                else {}
            )
            self._write(lambda fs, path: fs.put_file(str(local), path, **part_options))
            return
        names = sorted(list_files(local), key=lambda name: name == last)
        for name in names:
            (self / name).upload(local / name)
        # Stale objects are deleted last: another attempt at the same commit that is not yet known
        # to be dead may have uploaded the same files.
        self._delete_files(sorted(set(self.list_files()) - set(names)))

    def download(self, local: Path) -> None:
        """Download the object to a file. The directory of the file must exist."""
        self._call("cannot be downloaded", lambda fs, path: fs.get_file(path, str(local)))

    def download_files(self, local: Path, names: Sequence[str]) -> None:
        """Download several objects below this path concurrently to files below `local`."""
        for name in names:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
        targets = [str(local / name) for name in names]
        if names:
            self._call(
                "cannot be downloaded",
                lambda fs, path: fs.get([f"{path}/{name}" for name in names], targets),
            )

    def delete(self) -> None:
        """Delete the object and everything below this path. Do nothing if there is nothing."""
        if self.scheme not in OBJECT_STORES:  # these file systems have real directories
            self._call(
                "cannot be deleted",
                lambda fs, path: fs.rm(path, recursive=True) if fs.exists(path) else None,
            )
            return
        names = self.list_files()
        self._delete_files(names)
        if not names and self.exists():
            self._call("cannot be deleted", lambda fs, path: fs.rm_file(path))

    def _delete_files(self, names: Sequence[str]) -> None:
        if not names:
            return
        self._call(
            "cannot be deleted", lambda fs, path: fs.rm([f"{path}/{name}" for name in names])
        )
        # Bulk deletions do not report which objects the store refused to delete.
        remaining = set(self.list_files()) & set(names)
        if remaining:
            raise RunError(
                f"{self / min(remaining)} cannot be deleted; allow it and run the same command "
                "to resume"
            )

    def _write(self, write: Callable[[Any, str], object]) -> None:
        def write_atomically(fs: Any, path: str) -> None:
            if self.scheme in OBJECT_STORES:
                write(fs, path)
                return
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(fs, f"{path}.partial")
            fs.mv(f"{path}.partial", path)

        self._call("cannot be written", write_atomically, may_be_missing=False)

    def _call(
        self,
        failure: str,
        operation: Callable[[Any, str], T],
        may_be_missing: bool = True,
        ends_early: bool = False,
    ) -> T:
        """Return operation(file system, path), retried after each of the waits.

        Args:
            failure: What the error message says about this path, such as "cannot be read".
            operation: Called with fsspec's file system and the path in it.
            may_be_missing: Raise FileNotFoundError at once. False treats it as a failed attempt.
            ends_early: Whether the operation itself ends when `stop` is set.
        """
        stop = self.stop
        for wait_s in (*self.retry_waits_s, None):
            try:
                fs, path = self.filesystem()
                fs.invalidate_cache()  # other processes write there, too
                if stop is None or ends_early:
                    return operation(fs, path)
                return stop.call(partial(operation, fs, path))
            except CancelledError as error:
                raise RunError(f"{self} {failure}, because the run has ended") from error
            except _store_errors() as error:
                if isinstance(error, OSError) and is_disk_full(error):
                    raise
                if isinstance(error, FileNotFoundError) and may_be_missing:
                    raise
                reason = _describe(error)
                if wait_s is None or isinstance(error, PermissionError):
                    raise RunError(
                        f"{self} {failure} ({reason}); committed work is kept, run the same "
                        "command to resume"
                    ) from error
                if stop is not None and stop.is_set:
                    continue
                log.warning("%s %s (%s). Retrying in %.0f s.", self, failure, reason, wait_s)
                if stop is None:
                    time.sleep(wait_s)
                else:
                    stop.wait(wait_s)
        raise AssertionError("the last wait is None")

    def filesystem(self) -> tuple[Any, str]:
        """Return fsspec's file system, which fsspec caches per process, and the path in it.

        Raises:
            UserError: If the URL is malformed or the package for its scheme is not installed.
        """
        import fsspec  # readers of local files do not need it

        try:
            fs, path = fsspec.core.url_to_fs(self.url, **self.options)
        except ImportError as error:
            package = PACKAGES.get(self.scheme)
            advice = f"pip install '{package}'" if package else str(error)
            raise UserError(
                f"{self}: the package for {self.scheme}:// is missing; {advice}"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{self} cannot be used as a URL: {error}") from error
        return fs, path


def _read_s3_range(
    fs: Any, path: str, version: RemoteObject, start: int, size: int, stop: ReadStop
) -> bytes:
    """Read a range of an object in S3 on the condition that its ETag is the expected one."""
    bucket, key, _ = fs.split_path(path)

    async def read() -> bytes:
        response = await fs._call_s3(
            "get_object",
            Bucket=bucket,
            Key=key,
            Range=f"bytes={start}-{start + size - 1}",
            IfMatch=version.version,
        )
        return await response["Body"].read()

    try:
        return stop.result(asyncio.run_coroutine_threadsafe(read(), fs.loop))
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})
        if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == PRECONDITION_FAILED:
            raise _Changed from error
        raise


def stop_reading(*paths: StorePath) -> None:
    """End all reads below paths whose reads end early. Local paths have none."""
    for path in paths:
        if isinstance(path, RemotePath) and path.stop is not None:
            path.stop.set()


StorePath = Path | RemotePath
AnyStorePath = TypeVar("AnyStorePath", Path, RemotePath, StorePath)


def store_path(text: str | Path | RemotePath) -> StorePath:
    """Return a RemotePath for text that begins with "<scheme>://", and a Path for other text.

    file:// URLs become paths. Paths of either type are returned unchanged.

    Raises:
        ValueError: If a file:// URL names another machine.
    """
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
    return RemotePath(f"{scheme.lower()}://{rest.rstrip('/')}")


def list_children(path: StorePath) -> list[StorePath]:
    """List the entries one level below a path, by name. Return [] if it does not exist."""
    if isinstance(path, RemotePath):
        return list(path.iterdir())
    return list(sorted(path.iterdir())) if path.is_dir() else []


def list_files(path: StorePath) -> list[str]:
    """List all files below a path at any depth, by their names relative to it, sorted."""
    if isinstance(path, RemotePath):
        return path.list_files()
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def arrow_source(path: StorePath) -> Path | BytesIO:
    """Return what pyarrow can read a file from: the local path, or the bytes of the object.

    Raises:
        FileNotFoundError: If there is no such object.
    """
    return BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path


def read_files(root: StorePath, names: Sequence[str]) -> Iterable[bytes]:
    """Read the files `names` below `root`, in the given order."""
    if isinstance(root, RemotePath):
        return root.read_many(names)
    return ((root / name).read_bytes() for name in names)


def delete(path: StorePath) -> None:
    """Delete a directory or prefix and everything below it. Do nothing if it does not exist."""
    if isinstance(path, RemotePath):
        path.delete()
    else:
        shutil.rmtree(path, ignore_errors=True)


def delete_file(path: StorePath) -> None:
    """Delete one file or object. Do nothing if it does not exist."""
    if isinstance(path, RemotePath):
        path.delete()
    else:
        path.unlink(missing_ok=True)


def write_file(path: StorePath, data: bytes, *, several_writers: bool = False) -> None:
    """Write a file or object atomically. Missing parent directories are created.

    Args:
        path: The file or object.
        data: Its content.
        several_writers: Whether several processes may write the same file, see `replacing`.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
    else:
        write_atomically(path, data, several_writers=several_writers)


def check_writable(out: StorePath) -> None:
    """Check that a build can be written to a URL by writing, reading and deleting a few bytes.

    Local paths are not checked here, because `lock_output` reports errors about them.

    Raises:
        UserError: If the URL cannot be written to. The message gives the reason.
    """
    if isinstance(out, Path):
        return
    if out.scheme == "memory":
        raise UserError(f"{out} is visible to one process only; choose another --out")
    if not out.url.partition("://")[2].strip("/"):
        raise UserError(f"{out} names no bucket; choose another --out")
    probe = RemotePath(out.url, retry_waits_s=()) / ".scratch" / f"probe-{uuid.uuid4().hex}"
    try:
        out.filesystem()
        probe.write_bytes(b"sparse3d")
        unchanged = probe.read_bytes() == b"sparse3d"
        probe.delete()
    except (RunError, OSError, NotImplementedError) as error:
        reason = _describe(error.__cause__ or error)
        raise UserError(
            f"cannot write to {out}: {reason}; make it writable or choose another --out"
        ) from error
    if not unchanged:
        raise UserError(
            f"cannot write to {out}: reading returned other bytes than were written; "
            "choose another --out"
        )


def check_exists(directory: StorePath) -> None:
    """Check that a directory exists, or that there are objects below a URL.

    Raises:
        UserError: If there is nothing or it cannot be read.
    """
    if isinstance(directory, Path):
        if not directory.is_dir():
            found = f"{directory} is a file" if directory.exists() else f"no directory {directory}"
            raise UserError(f"{found}; give the output directory of a build")
        return
    try:
        directory.filesystem()
        entries = RemotePath(directory.url, retry_waits_s=()).iterdir()
    except (RunError, OSError, NotImplementedError) as error:
        reason = _describe(error.__cause__ or error)
        raise UserError(
            f"cannot read {directory}: {reason}; check the URL, the network and the credentials"
        ) from error
    if not entries:
        raise UserError(f"nothing at {directory}; give the output directory of a build")


def _describe(error: BaseException) -> str:
    """Return class and message of an error as one line of at most 300 characters."""
    return _without_password(" ".join(f"{type(error).__name__}: {error}".split()))[:300].rstrip(".")


def _without_password(text: str) -> str:
    """Remove user names and passwords from the URLs in a text."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _store_errors() -> tuple[type[BaseException], ...]:
    """Return the classes of errors that the imported store packages raise."""
    imported = [
        getattr(sys.modules[module], name) for module, name in STORE_ERRORS if module in sys.modules
    ]
    return (OSError, *imported)
