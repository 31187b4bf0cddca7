"""The passes of a build: screening, the products of the kept assets, and more for the best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import BuildConfig
from pipeline.core.text import counted
from pipeline.curation.catalogue import Catalogue
from pipeline.curation.reasons import explain
from pipeline.orchestration.formats_of_sources import log_formats
from pipeline.orchestration.plan import Plan, check_unused, make_plan, with_values_of_plan
from pipeline.orchestration.runner import run
from pipeline.orchestration.screening_pass import rank_screened
from pipeline.sources import Source
from pipeline.storage.layout import CATALOGUE, PLAN, SCREENING, manifest_path
from pipeline.storage.manifest import read_manifest

log = logging.getLogger(__name__)

REJECTIONS_SHOWN = 5
SHARDS_READ = 10  # at most, to find them


def run_passes(cfg: BuildConfig, sources: Sequence[Source]) -> dict[str, int]:
    """Run all passes of a build. What is already committed is not made again.

    A build without a target count has one pass. A ranked build first screens every asset, then
    makes the products of those it keeps, and then more resolutions for the best of them.

    Returns:
        The number of assets for each status: "done", "rejected" and "failed".

    Raises:
        UserError: If the output directory holds something else, or the sources list no asset.
        RunError: If the run cannot continue.
    """
    cfg = with_values_of_plan(cfg)
    listings = sources if cfg.rank.target_count is None else [_screen(cfg, sources)]
    plan = make_plan(cfg, listings)
    if cfg.rank.target_count is None:
        log_formats(plan, sources, cfg.load.blender)
    total: dict[str, int] = {}
    passes = [cfg, *([replace(cfg, run="best")] if cfg.rank.best_count else [])]
    for pass_cfg in passes:
        log.info(
            "%s: %s in %s. The products are %s.",
            cfg.out,
            counted(plan.assets, "asset"),
            counted(len(plan.shards), "shard"),
            " ".join(map(str, pass_cfg.products)),
        )
        total = run(plan, pass_cfg, sources)
    if total["rejected"] or total["failed"]:
        _log_rejections(plan)
    return total


def _log_rejections(plan: Plan) -> None:
    """Log the first assets that are not done: the reason, what was measured and the threshold."""
    shown = 0
    for shard in plan.shards[:SHARDS_READ]:
        for row in read_manifest(manifest_path(plan.out, shard)):
            if row.status == "done":
                continue
            if shown == REJECTIONS_SHOWN:
                log.info("The report lists all reasons.")
                return
            shown += 1
            why = explain(row.reason, row.numbers, plan.info.config)
            end = f"{row.status} in {row.stage}"
            log.info("%s: %s (%s)", row.url, row.reason, f"{why}; {end}" if why else end)


def _screen(cfg: BuildConfig, sources: Sequence[Source]) -> Catalogue:
    """Screen every asset in OUT/screen and return the catalogue of those that are kept."""
    if (cfg.out / CATALOGUE).exists() and (cfg.out / PLAN).exists():
        return Catalogue(path=cfg.out / CATALOGUE)
    check_unused(cfg.out)
    screening = replace(cfg, out=cfg.out / SCREENING, run="screen")
    plan = make_plan(screening, sources)
    log_formats(plan, sources, cfg.load.blender)
    log.info("%s: screening %s.", cfg.out, counted(plan.assets, "asset"))
    run(plan, screening, sources)
    return rank_screened(cfg, plan)
