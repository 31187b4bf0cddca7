"""`python -m pipeline.build`: turn 3D assets into verified shards of SDF bricks and renders."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import PRESETS, BuildConfig
from pipeline.core.cli import command, parse_with_presets
from pipeline.core.errors import RunError, UserError
from pipeline.core.text import counted

if TYPE_CHECKING:
    from pipeline.sources import Source

log = logging.getLogger(__name__)

PROG = "python -m pipeline.build"
BASIC = (  # the options that --help shows
    *("preset", "source", "out", "limit", "resolutions", "cameras", "views", "image_size"),
    *("workers", "device"),
)


def configure(args: Sequence[str]) -> BuildConfig:
    """Parse the options of a build, starting from the preset that they name.

    Raises:
        UserError: If an option is unknown or has a bad value.
    """
    presets = PRESETS
    if _is_given("--source", args):
        # The limit of a preset belongs to its own source.
        presets = {name: replace(preset, limit=None) for name, preset in PRESETS.items()}
    return parse_with_presets(presets, "smoke", args, prog=PROG, basic=BASIC)


def build(cfg: BuildConfig, sources: Sequence[Source] | None = None) -> dict[str, int]:
    """Run a build and write its report. An interrupted build resumes.

    Args:
        cfg: The configuration.
        sources: The sources to use. None opens those that `cfg.source` names.

    Returns:
        The number of assets for each status: "done", "rejected" and "failed".

    Raises:
        UserError: If the request cannot be fulfilled, for example because a source does not exist.
        RunError: If the run cannot continue, or every asset failed.
    """
    # Imported here, because parsing the options must not load torch, numba or Ray.
    from pipeline.geometry.sdf_cuda import check_cuda
    from pipeline.inspection.asset_list import write_attribution
    from pipeline.inspection.build_report import write_report
    from pipeline.orchestration.passes import run_passes
    from pipeline.orchestration.plan import read_plan
    from pipeline.storage.locks import lock_output
    from pipeline.storage.remote import check_writable

    started = time.monotonic()
    check_writable(cfg.out)
    if isinstance(cfg.out, Path):
        # Ray's workers may have another working directory.
        cfg = replace(cfg, out=cfg.out.absolute())
    earlier = (path.absolute() if isinstance(path, Path) else path for path in cfg.keep_splits_of)
    cfg = replace(cfg, keep_splits_of=tuple(earlier))
    for path in cfg.keep_splits_of:
        read_plan(path)  # raises if it is not a build
    if cfg.environment is not None:
        cfg = replace(cfg, environment=cfg.environment.absolute())
    on_cluster = cfg.executor == "ray" and os.environ.get("RAY_ADDRESS")
    if cfg.device == "cuda" and not on_cluster:
        check_cuda()  # on a cluster the runner checks the nodes instead
    sources = open_sources(cfg) if sources is None else sources
    with lock_output(cfg.out):
        total = run_passes(cfg, sources)
        page = None
        if cfg.report:
            log.info("Writing the report.")
            page = write_report(cfg.out)
        write_attribution(cfg.out)
    log.info(
        "%d assets are done, %d rejected and %d failed after %.0f s.",
        *total.values(),
        time.monotonic() - started,
    )
    contents = dict.fromkeys(product.kind for product in cfg.products if product.kind != "sdf")
    for content, folder in (("bricks", "sdf"), *zip(contents, contents), ("manifest", "manifest")):
        log.info("%-8s %s", content, cfg.out / folder)
    if page is not None:
        log.info("report   %s", page)
    if not total["done"] and total["failed"]:
        reasons = cfg.out / "manifest" if page is None else page
        raise RunError(
            f"no asset is done and {total['failed']} failed; see the reasons in {reasons}"
        )
    return total


def open_sources(cfg: BuildConfig) -> list[Source]:
    """Open the sources that a configuration names.

    Raises:
        UserError: If a source cannot be opened, two are of one kind, or terms are not accepted.
    """
    from pipeline.sources import open_source
    from pipeline.sources.shapenet import SHAPENET_LICENCE

    local_out = cfg.out if isinstance(cfg.out, Path) else None
    sources = [
        open_source(spec, fetch=cfg.fetch, max_bytes=cfg.filter.max_bytes, out=local_out)
        for spec in dict.fromkeys(cfg.source)
    ]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two sources are of the kind {name}, so their assets cannot be told apart; "
                "use two builds"
            )
    if SHAPENET_LICENCE in names and SHAPENET_LICENCE not in cfg.filter.licences:
        raise UserError(
            "the terms of ShapeNet allow research but no commercial use; to accept them, give "
            "--license-allow shapenet"
        )
    return sources


def main(args: Sequence[str]) -> None:
    """Parse the options and run the build."""
    cfg = configure(args)
    if _is_given("--source", args) and not _is_given("--preset", args):
        log.info(
            "No --preset is given, so the preset %s applies: %s. --preset full makes %s.",
            cfg.preset,
            _describe(cfg),
            _describe(PRESETS["full"]),
        )
    build(cfg)


def _is_given(option: str, args: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == option for word in args)


def _describe(cfg: BuildConfig) -> str:
    """Return what a build makes of each asset."""
    *resolutions, last = map(str, cfg.resolutions)
    numbers = f"{', '.join(resolutions)} and {last}" if resolutions else last
    size = cfg.image_size
    return f"SDFs at {numbers}, {counted(cfg.views, 'view')} of {size} x {size} pixels"


if __name__ == "__main__":
    command(main)
