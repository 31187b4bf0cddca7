"""Download a file of a GitHub repository at a fixed commit, with git LFS and its side files."""

from __future__ import annotations

import posixpath
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.core.errors import Reject, Transient
from pipeline.download.config import FetchConfig
from pipeline.download.fetch import DownloadRequest, LfsPointer, download, negative_cache
from pipeline.download.http import post_json
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.fbx_references import guessed_names, image_names
from pipeline.mesh_io.readers.gltf_document import parse_container

LFS_JSON = "application/vnd.git-lfs+json"
MAX_NAME_BYTES = 200  # of one component of a path
MAX_SIDE_FILES = 64  # of one asset
MAX_SIDE_BYTES = 1 << 28  # of all side files of one asset
MATERIAL_LIBRARY = re.compile(rb"(?m)^[ \t]*mtllib[ \t]+(.+?)[ \t\r]*$")
TEXTURE_MAP = re.compile(rb"(?im)^[ \t]*(?:map_\w+|bump|disp|norm|refl|decal)[ \t]+(.+?)[ \t\r]*$")
USD_ASSET = re.compile(rb"@@@(.+?)@@@|@([^@\n]+)@")
DRIVE = re.compile(r"[A-Za-z]:")
COLLADA_IMAGE = re.compile(rb"<init_from>\s*(?:<ref>)?\s*([^<>]+?)\s*<")


@dataclass(frozen=True, kw_only=True)
class GitHub:
    """URLs of GitHub: the site itself and the server of raw files."""

    site: str = "https://github.com"
    files: str = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file of a repository at a commit: SITE/<owner>/<name>/blob/<commit>/<path>."""

    repository: str  # owner/name
    commit: str  # 40 hex digits
    path: str  # as git spells it, not percent-encoded

    def page(self, hosts: GitHub) -> str:
        """Return the URL of the file's page, which `parse_blob` parses."""
        return f"{hosts.site}/{self.repository}/blob/{self.commit}/{self.path}"

    def url(self, hosts: GitHub) -> str:
        """Return the URL of the raw file."""
        return f"{hosts.files}/{self.repository}/{self.commit}/{quote(self.path)}"


def download_blob(wanted: DownloadRequest, folder: Path, cfg: FetchConfig, hosts: GitHub) -> Path:
    """Download a file of a repository and the side files that it refers to.

    Side files, such as materials and textures, are found recursively. They may lie anywhere in the
    repository. Images of FBX files, which state paths of the author's machine, are also looked for
    beside the file and in folders of textures. Locally the files have the same directories as
    there, so that relative paths such as "../textures/a.png" lead to them. A missing side file is
    skipped, and the loader reports it.

    Args:
        wanted: The file. Its URL is that of a blob at a commit.
        folder: Directory for the files. It must not exist.
        cfg: Options of downloads.
        hosts: URLs of GitHub.

    Returns:
        The path of the file itself.

    Raises:
        Reject: As `download`, "not_pinned" if the URL has no full commit hash, "lfs_missing" if the
            LFS server does not have the object, "bad_answer" if it does not send JSON.
        Transient: As `download`.
    """
    blob = parse_blob(wanted.url, hosts)
    folder.mkdir()
    stem = posixpath.splitext(posixpath.basename(blob.path))[0][:50] or "file"
    main = _local_path(folder, posixpath.dirname(blob.path)) / f"{stem}.{wanted.format}"
    main.parent.mkdir(parents=True, exist_ok=True)
    _download_raw(wanted, blob, main, cfg, hosts)
    # Breadth-first search of side files within the limits of count and bytes.
    partial = folder / ".side-file"
    pending = deque(_paths_in_repository(main, blob.path, blob.path))
    guesses = deque(_guessed_paths(main, blob.path))
    visited: set[str] = {blob.path}
    downloaded: set[str] = set()  # the last components of paths
    free_bytes = MAX_SIDE_BYTES
    while (pending or guesses) and len(visited) <= MAX_SIDE_FILES and free_bytes > 0:
        is_guess = not pending
        path = (pending or guesses).popleft()
        target = _local_path(folder, path)
        if path in visited or target == main:
            continue
        if is_guess and posixpath.basename(path) in downloaded:
            continue
        visited.add(path)
        try:
            side_file = DownloadRequest(url="", max_bytes=free_bytes)
            _download_raw(side_file, replace(blob, path=path), partial, cfg, hosts)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
        except Transient:
            raise
        # The last three: the name of one file is the directory of another.
        except (Reject, FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
        downloaded.add(posixpath.basename(path))
        free_bytes -= target.stat().st_size
        pending += _paths_in_repository(target, path, blob.path)
    partial.unlink(missing_ok=True)
    return main


def _paths_in_repository(file: Path, path: str, main_path: str) -> Iterator[str]:
    """Yield the paths in the repository that a file may mean by the names that it refers to.

    Names are relative to the directory of the file, or to that of the asset. Paths out of the
    repository are left out.

    Args:
        file: The downloaded file.
        path: Its path in the repository.
        main_path: The path of the asset in the repository.
    """
    folders = dict.fromkeys((posixpath.dirname(path), posixpath.dirname(main_path)))
    for name in find_references(file):
        yield from _joined(folders, name)


def _guessed_paths(file: Path, path: str) -> Iterator[str]:
    """Yield paths in the repository where images of an FBX file may lie beside its own names."""
    if file.suffix.lower() == ".fbx":
        for name in guessed_names(image_names(file.read_bytes())):
            if _is_relative(name):
                yield from _joined([posixpath.dirname(path)], name)


def _joined(folders: Iterable[str], name: str) -> Iterator[str]:
    """Yield the paths of a name in folders that do not lead out of the repository."""
    for folder in folders:
        candidate = posixpath.normpath(posixpath.join(folder, name))
        if candidate != ".." and not candidate.startswith(("../", "/")):
            yield candidate


def parse_blob(url: str, hosts: GitHub) -> Blob:
    """Parse the URL of a blob.

    Raises:
        Reject: "not_pinned" if the URL does not name a full commit hash.
    """
    match = re.fullmatch(rf"{re.escape(hosts.site)}/([^/]+/[^/]+)/blob/([0-9a-f]{{40}})/(.+)", url)
    if match is None or ".." in match[3].split("/"):
        raise Reject("not_pinned", url=url[:200])
    return Blob(repository=match[1], commit=match[2], path=match[3])


def find_references(path: Path) -> list[str]:
    """Find the names of the files that a mesh or material file refers to.

    Returns:
        Relative paths with "/" as separator, without repetitions. Absolute paths, URLs and names
        that no file can have are left out. [] for other formats and for damaged files.
    """
    extension = path.suffix[1:].lower()
    if extension not in ("gltf", "glb", "obj", "mtl", "dae", "usd", "usda", "usdc", "fbx"):
        return []
    names = [name.replace("\\", "/") for name in _references(path, extension)]
    return [name for name in dict.fromkeys(names) if _is_relative(name)]


def _is_relative(name: str) -> bool:
    is_possible = name.isprintable() and all(
        len(part.encode("utf-8", "replace")) <= 200 for part in name.split("/")
    )
    is_absolute = "://" in name or name.startswith(("data:", "/")) or DRIVE.match(name) is not None
    return bool(name) and is_possible and not is_absolute


def _references(path: Path, extension: str) -> Iterator[str]:
    content = path.read_bytes()
    if extension in ("gltf", "glb"):
        try:
            # A glb file may name textures beside it, too.
            document = parse_container(content, WarningLog()).root.data
            entries = [*document.get("buffers", ()), *document.get("images", ())]
            yield from (
                unquote(entry["uri"]) for entry in entries if isinstance(entry.get("uri"), str)
            )
        except (Reject, ValueError, AttributeError, TypeError, struct.error):
            return
    elif extension == "obj":
        # The argument is one name with blanks or several names, so both readings are yielded.
        for match in MATERIAL_LIBRARY.findall(content):
            argument = match.decode("utf-8", "replace")
            yield from (argument, *argument.split())
    elif extension == "mtl":
        # Options such as "-s 1 1 1" may precede the name, which may contain blanks itself.
        for match in TEXTURE_MAP.findall(content):
            argument = match.decode("utf-8", "replace")
            yield argument
            if " " in argument:
                yield argument.rpartition(" ")[2]
    elif extension == "fbx":
        yield from image_names(content)
    elif extension.startswith("usd"):
        if content.startswith(b"PXR-USDC"):
            names = _names_in_binary_layer(path)
        else:
            found = USD_ASSET.findall(content)
            names = [(long or short).decode("utf-8", "replace") for long, short in found]
        for name in names:
            # The part of a package, and arguments of the file format, follow the name.
            yield name.partition(":SDF_FORMAT_ARGS:")[0].partition("[")[0]
    else:
        for match in COLLADA_IMAGE.findall(content):
            yield unquote(match.decode("utf-8", "replace").removeprefix("file://"))


def _names_in_binary_layer(path: Path) -> list[str]:
    """Return the names in a binary layer of USD. [] if it is damaged or USD is not installed."""
    try:
        from pxr import Tf, UsdUtils
    except ImportError:
        return []
    try:
        return [name for kind in UsdUtils.ExtractExternalReferences(str(path)) for name in kind]
    except Tf.ErrorException:
        return []


def _download_raw(
    wanted: DownloadRequest, blob: Blob, target: Path, cfg: FetchConfig, hosts: GitHub
) -> None:
    """Download one file of a repository, from the LFS server if the repository has a pointer."""
    raw = replace(wanted, url=blob.url(hosts))
    try:
        download(raw, target, cfg)
    except LfsPointer as pointer:
        with negative_cache(f"{pointer.oid[:20]}{raw.cache_key[:20]}", cfg):
            download(_locate_lfs_object(raw, pointer, blob, cfg, hosts), target, cfg)


def _locate_lfs_object(
    wanted: DownloadRequest, pointer: LfsPointer, blob: Blob, cfg: FetchConfig, hosts: GitHub
) -> DownloadRequest:
    """Ask the batch API of git LFS for the URL of an object."""
    if wanted.sha256 not in (None, pointer.oid):
        raise Reject("wrong_sha256", expected=wanted.sha256, sha256=pointer.oid)
    if pointer.size > wanted.max_bytes:
        raise Reject("file_too_large", bytes=pointer.size, max_bytes=wanted.max_bytes)
    answer = post_json(
        f"{hosts.site}/{blob.repository}.git/info/lfs/objects/batch",
        {
            "operation": "download",
            "transfers": ["basic"],
            "objects": [{"oid": pointer.oid, "size": pointer.size}],
        },
        {"Accept": LFS_JSON, "Content-Type": LFS_JSON},
        cfg,
    )
    try:
        action = answer["objects"][0]["actions"]["download"]
        headers = {str(name): str(value) for name, value in (action.get("header") or {}).items()}
        return replace(wanted, url=str(action["href"]), sha256=pointer.oid, headers=headers)
    except (LookupError, TypeError, AttributeError) as error:
        raise Reject("lfs_missing", oid=pointer.oid) from error


def _local_path(folder: Path, path: str) -> Path:
    """Return where a file of the repository is stored: below `folder` with the same directories.

    A component that is too long for a file name, or not printable, is replaced by its hash.
    """
    return folder.joinpath(
        *(
            part
            if part.isprintable() and len(part.encode()) <= MAX_NAME_BYTES
            else sha256(part.encode("utf-8", "replace")).hexdigest()[:16]
            for part in path.split("/")
            if part
        )
    )
