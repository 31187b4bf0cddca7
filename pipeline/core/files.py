"""Local files: atomic replacement, durable writes, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: OSError) -> bool:
    """Return whether a write failed because the disk or the quota is full.

    Some libraries put the reason into the message alone and leave `errno` unset.
    """
    return error.errno in NO_ROOM or os.strerror(errno.ENOSPC) in str(error)


@contextmanager
def replacing(
    path: Path, *, several_writers: bool = False, durable: bool = False
) -> Iterator[Path]:
    """Write a file or directory under a temporary name and rename it to `path` at the end.

    Readers see the old content or the new content, never a part. If the block raises, `path` is
    unchanged and the temporary file or directory is deleted. Where a directory replaces another
    one, `path` does not exist for a moment.

    Args:
        path: The final name. Its parent directories are created.
        several_writers: Put the process id into the temporary name, so that processes that write
            the same file do not disturb each other.
        durable: Force the content to the disk before the rename.

    Yields:
        The temporary name, in the same directory as `path`. Nothing exists there yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    middle = f".{os.getpid()}" if several_writers else ""
    partial = path.with_name(f".{path.name}{middle}.partial")
    _delete(partial)
    try:
        yield partial
        if durable:
            sync(partial)
        _publish(partial, path)
    finally:
        _delete(partial)


def _publish(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`.

    A directory cannot be renamed over another one, so the old one is moved away first. A link is
    renamed over a link at once, also if both lead to directories.
    """
    if partial.is_symlink() or not partial.is_dir() or not path.is_dir():
        partial.replace(path)
        return
    old = partial.with_name(f"{partial.name}.old")
    _delete(old)
    path.rename(old)
    try:
        partial.replace(path)
    except OSError:
        old.rename(path)
        raise
    _delete(old)


def write_atomically(
    path: Path, content: bytes | str, *, several_writers: bool = False, durable: bool = False
) -> None:
    """Write a whole file as `replacing` does. Text is encoded as UTF-8."""
    with replacing(path, several_writers=several_writers, durable=durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Force a file, or every file of a directory, to the disk."""
    for file in (
        [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]
    ):
        _fsync(file)


def sync_directory(path: Path) -> None:
    """Force the entries of a directory to the disk, so that a rename in it survives a power cut."""
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file without waiting.

    The lock ends when the descriptor is closed, also by the end of the process.

    Returns:
        Whether the lock was taken. False means that another process has it.

    Raises:
        OSError: If the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def lock_one_of(paths: Sequence[Path], *, timeout_s: float, delete: bool = False) -> Iterator[Path]:
    """Hold the lock of one of several lock files, whichever is free first.

    A process that dies releases its lock.

    Args:
        paths: The lock files. They are created where they are missing; their directories exist.
        timeout_s: Seconds to wait for a free one.
        delete: Delete the lock file at the end, so that no file stays for a lock nobody holds.

    Yields:
        The path whose lock is held.

    Raises:
        TimeoutError: If no lock became free in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        for path in random.sample(paths, len(paths)):
            with path.open("wb") as file:
                if try_lock(file.fileno()) and _is_at(path, file.fileno()):
                    try:
                        yield path
                    finally:
                        if delete:
                            path.unlink()
                    return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{paths[0].parent} had no free lock for {timeout_s} s")
        time.sleep(random.uniform(0.02, 0.15))


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether `path` still names the open file: its last holder may have deleted it."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
