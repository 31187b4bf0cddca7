"""Sources of assets: `open_source` turns a specification such as "folder:PATH" into a `Source`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs

from pipeline.core.errors import UserError
from pipeline.core.schema import Record
from pipeline.download.config import FetchConfig


class Listing(Protocol):
    """A list of assets. It yields the same records in the same order on every machine."""

    @property
    def name(self) -> str:
        """Name of the source, such as "folder". It is the prefix of the uids."""
        ...

    def records(self) -> Iterator[Record]:
        """Yield one record per asset."""
        ...


class Source(Listing, Protocol):
    """A list of assets and the way to get their files.

    A source can be pickled and is cheap to construct, because each worker gets a copy. A source may
    also have `skipped`, {extension: number of files that are no assets}, `snapshot()`, which
    returns a hash of the state of its catalogue, and `side_file_root`, the directory that holds the
    side files of assets that it does not write to a scratch directory.
    """

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Return a local file for a record. A file that has to be written is below `scratch`."""
        ...


def side_file_root(source: Source, path: Path, scratch: Path) -> Path:
    """Return the directory below which the side files of an asset are looked for.

    Args:
        source: The source.
        path: What `materialize` returned.
        scratch: The scratch directory that `materialize` was given. It holds one asset.

    Returns:
        The scratch directory if the asset lies in it, otherwise the source's `side_file_root`, or
        the directory of the asset.
    """
    if path.is_relative_to(scratch):
        return scratch
    return getattr(source, "side_file_root", path.parent)


def open_source(
    spec: str, fetch: FetchConfig | None = None, max_bytes: int = 1 << 30, out: Path | None = None
) -> Source:
    """Open the source that a specification names.

    Args:
        spec: `procedural` or `procedural:COUNT`, the embedded shapes; `folder:PATH`, a directory of
            mesh files; `objaverse` or `objaverse:ANNOTATIONS`; `objaverse-xl`, optionally followed
            by `:ANNOTATIONS` and by `?places=github,...`; `github:LIST`, a csv list of files of
            repositories, optionally followed by `?folder=DIR`; `shapenet:PATH`, optionally followed
            by `?categories=chair,03001627&splits=train`. ANNOTATIONS is a directory in the layout
            of the objaverse package. Without it the package's own directory is used.
        fetch: Options of downloads.
        max_bytes: Largest size of a downloaded file.
        out: Output directory of the build, which a folder source does not read.

    Raises:
        UserError: If the scheme or an option is unknown, or a directory lacks the expected content.
    """
    # Imported here, because pyarrow and the shapes take time to import and most commands do not
    # need them.
    from pipeline.sources.annotations import Annotations
    from pipeline.sources.folder import FolderSource
    from pipeline.sources.github_list import GitHubListSource
    from pipeline.sources.objaverse import ObjaverseSource
    from pipeline.sources.objaverse_xl import PLACES, ObjaverseXLSource
    from pipeline.sources.procedural import ProceduralSource
    from pipeline.sources.shapenet import ShapeNetSource

    fetch = fetch or FetchConfig()
    scheme, _, rest = spec.partition(":")
    if scheme == "procedural":
        if rest and not (rest.isdecimal() and int(rest)):
            raise UserError(
                f"COUNT in procedural:COUNT must be a number of shapes, 1 or more, got {rest!r}"
            )
        return ProceduralSource(count=int(rest)) if rest else ProceduralSource()
    if scheme == "folder" and rest:
        source = FolderSource(root=_absolute_path(rest), out=out)
        source.check()
        return source
    scheme, _, options = spec.partition("?")
    scheme, _, rest = scheme.partition(":")
    annotations = Annotations(root=_absolute_path(rest) if rest else None, fetch=fetch)
    if scheme == "objaverse" and not options:
        return ObjaverseSource(annotations=annotations, fetch=fetch, max_bytes=max_bytes)
    if scheme == "objaverse-xl":
        places = _parse_options(spec, options, "places").get("places", PLACES)
        if not set(places) <= set(PLACES):
            raise UserError(
                f"{spec}: places must be among {','.join(PLACES)}, got {','.join(places)}"
            )
        return ObjaverseXLSource(
            annotations=annotations, fetch=fetch, max_bytes=max_bytes, places=places
        )
    if scheme == "github" and rest:
        folders = _parse_options(spec, options, "folder").get("folder", ())
        if options and len(folders) != 1:
            raise UserError(f"{spec}: folder must name one directory, got {len(folders)}")
        source = GitHubListSource(
            path=_absolute_path(rest),
            folder=_absolute_path(folders[0]) if folders else None,
            fetch=fetch,
            max_bytes=max_bytes,
        )
        source.check()
        return source
    if scheme == "shapenet" and rest:
        chosen = _parse_options(spec, options, "categories", "splits")
        source = ShapeNetSource(
            root=_absolute_path(rest),
            categories=chosen.get("categories", ()),
            splits=chosen.get("splits", ()),
        )
        source.check()
        return source
    raise UserError(
        f"unknown source {spec!r}; use procedural[:COUNT], folder:PATH, objaverse, objaverse-xl, "
        "github:LIST or shapenet:PATH"
    )


def _absolute_path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"no home directory for {text.partition('/')[0]} of {text}; give the whole path"
        ) from error


def _parse_options(spec: str, text: str, *names: str) -> dict[str, tuple[str, ...]]:
    """Parse the options after the question mark: name=value,value joined by "&"."""
    options = parse_qs(text, keep_blank_values=True)
    for name in options:
        if name not in names:
            raise UserError(f"{spec}: unknown option {name!r}; use {' or '.join(names)}")
    return {
        name: tuple(word for word in ",".join(values).split(",") if word)
        for name, values in options.items()
    }
