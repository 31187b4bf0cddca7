"""A catalogue's annotation files: downloaded once, kept where the objaverse package keeps them, named by a hash."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

from pipeline.core.errors import Reject, UserError
from pipeline.core.hashing import sha256_of
from pipeline.download.fetch import FetchConfig, Wanted, fetch

MAX_BYTES = 16 << 30  # of one annotation file
WORDS, LETTERS = 32, 100  # tags of an asset, and letters of a name, that a plan keeps


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Files below `root`, each under the path that the objaverse package gives it; a missing one is downloaded."""

    root: Path | None = None  # None: where the package itself looks
    fetch: FetchConfig = field(default_factory=FetchConfig)

    @property
    def folder(self) -> Path:
        if self.root is not None:
            return self.root
        import objaverse  # only here: whoever brings annotations of their own does not need it

        return Path(objaverse.BASE_PATH)

    def file(self, name: str, url: str) -> Path:
        """The local file. UserError if it is not there and cannot be had."""
        path = self.folder / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return fetch(Wanted(url=url, max_bytes=MAX_BYTES), path, self.fetch)
        except Reject as verdict:
            raise UserError(
                f"cannot download the annotations {url} ({verdict}); put the file at {path}"
            ) from verdict

    def snapshot(self, names: Sequence[str]) -> str:
        """The sha256 over the sorted "name\\0sha256" lines of files that are there."""
        lines = [f"{name}\0{sha256_of(self.folder / name)}\n" for name in sorted(names)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """A gzipped JSON file. UserError, which names it, if it is damaged."""
    try:
        with gzip.open(path, "rb") as file:
            return json.load(file)
    except (OSError, EOFError, ValueError, ZlibError) as error:
        raise UserError(
            f"the annotation file {path} is damaged ({error}); delete it to download it again"
        ) from error


def to_metadata(**said: Any) -> str:
    """What a record keeps of its annotations: JSON without what is not said."""
    kept = {name: value for name, value in said.items() if value}
    for name, value in kept.items():
        if isinstance(value, str):
            kept[name] = value[:LETTERS]
        elif isinstance(value, list):
            kept[name] = [str(item)[:LETTERS] for item in value[:WORDS]]
    return json.dumps(kept, sort_keys=True, ensure_ascii=False) if kept else ""
