"""`python -m pipeline.build`: from meshes to verified shards of SDF bricks and renders."""

from __future__ import annotations

import logging
import os
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import PRESETS, BuildConfig
from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError, UserError
from pipeline.geometry.sdf_cuda import check_cuda
from pipeline.orchestration.catalogue import CATALOGUE, Catalogue, write_catalogue
from pipeline.orchestration.plan import make_plan, refuse_foreign
from pipeline.orchestration.runner import run
from pipeline.report import write_report
from pipeline.sources import Source, open_source
from pipeline.sources.shapenet import SHAPENET_LICENCE
from pipeline.storage.locks import lock_output
from pipeline.storage.remote import check_writable

log = logging.getLogger(__name__)

PROG = "python -m pipeline.build"


def configure(args: Sequence[str]) -> BuildConfig:
    """The preset that `args` name, with every other option laid over it. UserError, one line, for a bad one."""
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    name = first.parse_known_args(args)[0].preset or "smoke"
    default = PRESETS.get(name, PRESETS["smoke"])  # tyro itself refuses a name that is not there
    if any(arg.partition("=")[0] == "--source" for arg in args):
        default = replace(default, limit=None)  # the preset's limit is one of its own source
    return parse(BuildConfig, args, prog=PROG, default=default)


def build(cfg: BuildConfig, sources: Sequence[Source] | None = None) -> dict[str, int]:
    """Plan, run, report; goes on with what is there. Returns how many assets are done, rejected and failed.

    `sources` stands in for those that cfg.source names. UserError and RunError as the modules it calls.
    """
    started = time.monotonic()
    check_writable(cfg.out)
    if isinstance(cfg.out, Path):
        cfg = replace(
            cfg, out=cfg.out.absolute()
        )  # Ray's workers may have another working directory
    if cfg.device == "cuda" and not os.environ.get(
        "RAY_ADDRESS"
    ):  # a cluster's nodes are for the runner to ask
        check_cuda()
    sources = open_sources(cfg) if sources is None else sources
    with lock_output(cfg.out):
        total = make(cfg, sources)
        page = write_report(cfg.out)
    log.info(
        "%d done, %d rejected, %d failed in %.0f s", *total.values(), time.monotonic() - started
    )
    for what, where in (("bricks", "sdf"), ("renders", "renders"), ("manifest", "manifest")):
        log.info("%-8s %s", what, cfg.out / where)
    log.info("report   %s", page)
    if not total["done"] and total["failed"]:
        raise RunError(f"no asset came through, {total['failed']} failed; {page} says why")
    return total


def make(cfg: BuildConfig, sources: Sequence[Source]) -> dict[str, int]:
    """The passes of a build: where it ranks, a look at every asset; the products; more of them for the best."""
    chosen = sources if cfg.rank.target_count is None else [_screen(cfg, sources)]
    plan = make_plan(cfg, chosen)
    total: dict[str, int] = {}
    passes = [cfg, *([replace(cfg, run="best")] if cfg.rank.best_count else [])]
    for this in passes:
        names = " ".join(map(str, this.products))
        log.info(
            "%s: %d assets in %d shards, products %s", cfg.out, plan.assets, len(plan.shards), names
        )
        total = run(plan, this, sources)
    return total


def _screen(cfg: BuildConfig, sources: Sequence[Source]) -> Catalogue:
    """The first pass of a ranked build, in OUT/screen: looks at every asset, and says which ones are kept."""
    if (cfg.out / CATALOGUE).exists() and (cfg.out / "plan.json").exists():
        return Catalogue(path=cfg.out / CATALOGUE)
    refuse_foreign(cfg.out)
    first = replace(cfg, out=cfg.out / "screen", run="screen")
    plan = make_plan(first, sources)
    log.info("%s: screening %d assets", cfg.out, plan.assets)
    run(plan, first, sources)
    return write_catalogue(cfg, plan)


def open_sources(cfg: BuildConfig) -> list[Source]:
    """What cfg.source names. UserError as `open_source`, if two are of one kind, or if terms are not accepted."""
    local = cfg.out if isinstance(cfg.out, Path) else None
    sources = [
        open_source(spec, fetch=cfg.fetch, max_bytes=cfg.filter.max_bytes, out=local)
        for spec in dict.fromkeys(cfg.source)
    ]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two sources of the kind {name}: their assets could not be told apart; use two builds"
            )
    if SHAPENET_LICENCE in names and SHAPENET_LICENCE not in cfg.filter.licences:
        raise UserError(
            "ShapeNet's terms allow research, not commerce; to accept them: --license-allow shapenet"
        )
    return sources


def main(args: Sequence[str]) -> None:
    build(configure(args))


if __name__ == "__main__":
    command(main)
