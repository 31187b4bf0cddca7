"""Values derived from names alone: uids, splits, seeds, and hashes of configurations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.core.options import BEFORE

# Entry of a recorded configuration -> the option that decides it.
OPTION_OF = {
    "topology.resolution": "topology_resolution",
    "filter.licences": "license_allow",
    "format": "image_format",
}


def make_uid(source: str, key: str) -> str:
    """Return `<source>-<first 20 hex digits of sha256(key)>`.

    Args:
        source: Name of the source, such as "folder".
        key: The source's own identifier of the asset. For a folder it is the relative POSIX path.
    """
    return f"{source}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"


def split_of(key: str, val_percent: int) -> str:
    """Return "val" for about `val_percent` of all keys and "train" for the others.

    Args:
        key: The uid of the asset, or of a group of copies, so that copies share their split. The
            result depends on it alone, so an asset keeps its split in every build.
        val_percent: Percentage of the keys in the validation split.
    """
    number = int(hashlib.sha256(key.encode()).hexdigest(), 16)
    return "val" if number % 100 < val_percent else "train"


def seed_of(*parts: object) -> int:
    """Return a 64-bit seed derived from names and numbers, such as (uid, "camera", view).

    The seed is the same on every machine.
    """
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """Return the first 16 hex digits of the sha256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(value: Any) -> Any:
    """Return the value after a round trip through JSON: tuples become lists, paths strings."""
    return json.loads(json.dumps(value, default=str))


def options_of(config: Any) -> dict[str, Any]:
    """Return the options of a configuration as JSON values, to be recorded, hashed and compared.

    An option that `pipeline.core.options.added` declares is left out while it has the value that
    describes older files, so that those files keep their hashes.

    Args:
        config: An instance of a dataclass. Its fields may be dataclasses, too.
    """
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        recorded = options_of(value) if dataclasses.is_dataclass(value) else to_json(value)
        if BEFORE not in field.metadata or recorded != to_json(field.metadata[BEFORE]):
            options[field.name] = recorded
    return options


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List the entries in which two JSON values differ.

    Args:
        old: The recorded value.
        new: The value of now.
        prefix: Dotted name of the entry that `old` and `new` are. "" at the top.

    Returns:
        One "name=old, now new" per differing entry, with dotted names, in the order of the names.
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{prefix}={json.dumps(old)}, now {json.dumps(new)}"]
    changed = []
    for name in sorted({*old, *new}):
        inner = f"{prefix}.{name}" if prefix else name
        changed += differences(old.get(name), new.get(name), inner)
    return changed


def as_options(changes: Iterable[str]) -> list[str]:
    """Return the results of `differences` between options of a build as they are typed.

    "val_percent=12, now 3" becomes "--val-percent 12, now 3". The options that a camera set or the
    topology derive from them have the names of their sources and are listed once.
    """
    typed = {}
    for change in changes:
        name, _, values = change.partition("=")
        name = OPTION_OF.get(name, name)
        typed.setdefault(f"--{name.replace('_', '-')} {values}")
    return list(typed)
