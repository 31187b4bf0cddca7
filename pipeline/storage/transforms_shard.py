"""Shards of transforms.json files: a tar file with `<uid>/transforms.json` for each asset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from pipeline.core.files import replacing

MEMBER = "transforms.json"


def write_transforms_shard(path: Path, entries: Sequence[tuple[str, bytes]]) -> None:
    """Write a shard atomically. The bytes depend on the entries alone.

    Args:
        path: The tar file.
        entries: A pair (uid, content of its transforms.json) for each asset.
    """
    with (
        replacing(path) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for uid, content in entries:
            header = tarfile.TarInfo(f"{uid}/{MEMBER}")
            header.size = len(content)
            tar.addfile(header, BytesIO(content))


def read_transforms_shard(path: Path) -> dict[str, dict[str, Any]]:
    """Read a shard.

    Returns:
        The content of the transforms.json of each asset, by uid in the order of the file.

    Raises:
        ValueError: If the file is not such a shard.
        OSError: If the file cannot be read.
    """
    contents = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                uid, _, name = member.name.partition("/")
                file = tar.extractfile(member)
                if name != MEMBER or file is None:
                    raise ValueError(f"{path} has the unexpected member {member.name}")
                contents[uid] = json.loads(file.read())
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return contents
