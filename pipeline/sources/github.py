"""A file of a GitHub repository at a pinned commit, git LFS resolved, with the side files that it names."""

from __future__ import annotations

import json
import posixpath
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.core.errors import Reject, Transient
from pipeline.download.fetch import FetchConfig, LfsPointer, Wanted, fetch, remembered
from pipeline.download.http import post_json

LFS_JSON = "application/vnd.git-lfs+json"
SIDE_FILES, SIDE_BYTES = 64, 1 << 28  # of one asset
MAPS = re.compile(rb"(?im)^[ \t]*(?:map_\w+|bump|disp|norm|refl|decal)[ \t]+(.+?)[ \t\r]*$")


@dataclass(frozen=True, kw_only=True)
class GitHub:
    """Where GitHub is."""

    site: str = "https://github.com"
    files: str = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class Blob:
    """SITE/<owner>/<repository>/blob/<commit>/<path>, the path as git spells it."""

    repository: str  # owner/name
    commit: str
    path: str

    def url(self, hosts: GitHub) -> str:
        return f"{hosts.files}/{self.repository}/{self.commit}/{quote(self.path)}"


def fetch_blob(want: Wanted, folder: Path, cfg: FetchConfig, hosts: GitHub) -> Path:
    """The file at want.url, an address of a blob, below `folder`, beside its side files.

    Reject and Transient as `fetch`, "not_pinned" for an address without a whole commit, "lfs_missing" if the object is
    not on the server. Side files that are missing stay missing: `load` says so.
    """
    blob = parse_blob(want.url, hosts)
    folder.mkdir()
    main = (
        folder
        / f"{posixpath.splitext(posixpath.basename(blob.path))[0][:50] or 'file'}.{want.format}"
    )
    _fetch(want, blob, main, cfg, hosts)
    partial = folder / ".side-file"
    pending, known, room = deque(references(main)), set[str](), SIDE_BYTES
    while pending and len(known) < SIDE_FILES and room > 0:
        name = pending.popleft()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(blob.path), name))
        if name in known or path.startswith(("../", "/")):
            continue
        known.add(name)
        target = _beside(folder, name)
        if target == main:
            continue
        try:
            _fetch(Wanted(url="", max_bytes=room), replace(blob, path=path), partial, cfg, hosts)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
        except Transient:
            raise
        # The last three: a name that is one file's and another one's folder's.
        except (Reject, FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
        room -= target.stat().st_size
        pending += references(target)
    partial.unlink(missing_ok=True)
    return main


def parse_blob(url: str, hosts: GitHub) -> Blob:
    found = re.fullmatch(rf"{re.escape(hosts.site)}/([^/]+/[^/]+)/blob/([0-9a-f]{{40}})/(.+)", url)
    if found is None or ".." in found[3].split("/"):
        raise Reject("not_pinned", url=url[:200])
    return Blob(repository=found[1], commit=found[2], path=found[3])


def references(path: Path) -> list[str]:
    """Names of the files that a gltf, obj, mtl or dae refers to, relative to it; [] if it cannot be read."""
    kind = path.suffix[1:].lower()
    if kind not in ("gltf", "obj", "mtl", "dae"):
        return []
    names = [name.replace("\\", "/") for name in _references(path, kind)]
    return [name for name in dict.fromkeys(names) if _is_relative(name)]


def _is_relative(name: str) -> bool:
    parts = name.split("/")
    possible = name.isprintable() and all(
        len(part.encode("utf-8", "replace")) <= 200 for part in parts
    )
    return bool(name) and possible and "://" not in name and not name.startswith(("data:", "/"))


def _references(path: Path, kind: str) -> Iterator[str]:
    content = path.read_bytes()
    if kind == "gltf":
        try:
            document = json.loads(content)
            entries = [*document.get("buffers", ()), *document.get("images", ())]
            yield from (
                unquote(entry["uri"]) for entry in entries if isinstance(entry.get("uri"), str)
            )
        except (ValueError, AttributeError, TypeError):
            return
    elif kind == "obj":
        for line in re.findall(rb"(?m)^[ \t]*mtllib[ \t]+(.+?)[ \t\r]*$", content):
            yield from (line.decode("utf-8", "replace"), *line.decode("utf-8", "replace").split())
    elif kind == "mtl":
        for line in MAPS.findall(content):
            words = line.decode("utf-8", "replace")
            yield from (words, words.rpartition(" ")[2]) if " " in words else (words,)
    else:
        for line in re.findall(rb"<init_from>\s*(?:<ref>)?\s*([^<>]+?)\s*<", content):
            yield unquote(line.decode("utf-8", "replace").removeprefix("file://"))


def _fetch(want: Wanted, blob: Blob, target: Path, cfg: FetchConfig, hosts: GitHub) -> None:
    plain = replace(want, url=blob.url(hosts))
    try:
        fetch(plain, target, cfg)
    except LfsPointer as pointer:
        with remembered(f"{pointer.oid[:20]}{plain.key[:20]}", cfg):
            fetch(_lfs_object(plain, pointer, blob, cfg, hosts), target, cfg)


def _lfs_object(
    want: Wanted, pointer: LfsPointer, blob: Blob, cfg: FetchConfig, hosts: GitHub
) -> Wanted:
    """Where git LFS's batch interface says that an object is."""
    if want.sha256 not in (None, pointer.oid):
        raise Reject("wrong_sha256", expected=want.sha256, sha256=pointer.oid)
    if pointer.size > want.max_bytes:
        raise Reject("file_too_large", bytes=pointer.size, max_bytes=want.max_bytes)
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
        return replace(want, url=str(action["href"]), sha256=pointer.oid, headers=headers)
    except (LookupError, TypeError, AttributeError) as error:
        raise Reject("lfs_missing", oid=pointer.oid) from error


def _beside(folder: Path, name: str) -> Path:
    """Where the loader looks for a side file: under its relative path, or, where that climbs out, under its name."""
    plain = posixpath.normpath(name)
    return folder / (posixpath.basename(plain) if plain.startswith("..") else plain)
