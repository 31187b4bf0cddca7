"""Locks of output directories, and private work directories for builds that write to a URL."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from pipeline.core.errors import RunError, UserError
from pipeline.core.files import try_lock
from pipeline.storage.remote import RemotePath, StorePath

log = logging.getLogger(__name__)


@contextmanager
def lock_output(out: StorePath) -> Iterator[None]:
    """Hold the lock of an output directory, so that no other build writes there.

    The directory is created. The lock is on the directory itself, so no lock file remains, and it
    ends with this process. URLs are not locked.

    Raises:
        UserError: If another build holds the lock, or the directory cannot be created.
    """
    if not isinstance(out, Path):
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)  # processes that Ray starts do not inherit it
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; choose another output directory"
        ) from error
    try:
        try:
            locked = try_lock(descriptor)
        except OSError as error:  # some network file systems have no locks
            log.warning(
                "%s cannot be locked (%s). Do not start a second build there.", out, error.strerror
            )
        else:
            if not locked:
                raise UserError(
                    f"another build is running with --out {out}; wait for it or choose another"
                )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def workspace(out: StorePath, scratch: Path | None = None) -> Iterator[Path]:
    """Provide a local directory in which a task works for the build at `out`.

    For a local build this is `out` itself. For a URL it is a new directory on this node that is
    deleted at the end. Directories that killed tasks have left are deleted at the start.

    Args:
        out: Where the build lies.
        scratch: Where new directories are created. None takes the system's temporary directory.

    Raises:
        RunError: If the directory cannot be created.
    """
    if isinstance(out, Path):
        yield out
        return
    root = scratch_root(scratch)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _delete_orphans(root)
        lock_file, descriptor = _create_locked_file(root)
    except OSError as error:
        raise RunError(
            f"cannot work in {root}: {error.strerror}; choose another --scratch"
        ) from error
    folder = lock_file.with_suffix("")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def local_copy(out: StorePath, names: Iterable[str | PurePath]) -> Iterator[Path]:
    """Provide the directory of a build, or a local copy of parts of a build at a URL.

    Args:
        out: Where the build lies.
        names: The files and directories to download, relative to `out`. Missing ones are skipped.
    """
    with workspace(out) as folder:
        if isinstance(out, RemotePath):
            for name in names:
                _download(out / name, folder / name)
        yield folder


def _download(remote: RemotePath, local: Path) -> None:
    """Download an object, or all objects below a prefix. Do nothing if there are none."""
    names = remote.list_files()
    if names:
        remote.download_files(local, names)
    elif remote.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        remote.download(local)


@contextmanager
def sweep_on_exit(out: StorePath, scratch: Path | None) -> Iterator[None]:
    """Delete, at the end of the block, what tasks killed inside it have left on this node."""
    try:
        yield
    finally:
        if not isinstance(out, Path):
            _delete_orphans(scratch_root(scratch))


def scratch_root(scratch: Path | None) -> Path:
    """Return the directory on a node that holds the workspaces of this user."""
    return (scratch or Path(tempfile.gettempdir())).absolute() / f"sparse3d-{os.getuid()}"


def _create_locked_file(root: Path) -> tuple[Path, int]:
    """Create a lock file with a new name and lock it until its descriptor is closed."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=root, suffix=".lock")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if Path(name).exists():  # another process may have deleted it before it was locked
            return Path(name), descriptor
        os.close(descriptor)


def _delete_orphans(root: Path) -> None:
    """Delete the workspaces whose lock no process holds."""
    for lock_file in root.glob("*.lock"):
        try:
            descriptor = os.open(lock_file, os.O_RDWR)
        except FileNotFoundError:  # its task has just ended
            continue
        try:
            if try_lock(descriptor):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                lock_file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
