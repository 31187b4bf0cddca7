"""The type of options that take a local path or a URL."""

from __future__ import annotations

from typing import Annotated

import tyro

from pipeline.storage.remote import StorePath, store_path

PathOrUrl = Annotated[
    StorePath,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: store_path(words[0]),
        is_instance=lambda value: isinstance(value, StorePath),
        str_from_instance=lambda value: [str(value)],
    ),
]
