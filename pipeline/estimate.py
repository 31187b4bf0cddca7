"""`python -m pipeline.estimate DIR`: estimate the cost of a large build from a small one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.inspection.config import EstimateConfig

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Parse the options, log the estimate as a table and write the JSON file if asked for.

    Raises:
        UserError: If the directory is not a finished build, or the JSON file cannot be written.
    """
    cfg = parse(EstimateConfig, args, prog="python -m pipeline.estimate")
    # Imported here, because parsing the options must not load pyarrow.
    from pipeline.inspection.cost_estimate import (
        estimate_cost,
        measure_passes,
        table_lines,
        write_json,
    )
    from pipeline.storage.remote import check_exists

    check_exists(cfg.directory)
    if cfg.json is not None and not cfg.json.absolute().parent.is_dir():
        raise UserError(
            f"no directory {cfg.json.absolute().parent} to write --json to; create it or name "
            "another file"
        )
    passes = measure_passes(cfg.directory)
    estimate = estimate_cost(passes, cfg)
    for line in table_lines(estimate, passes, cfg):
        log.info("%s", line)
    if cfg.json is not None:
        write_json(cfg.json, estimate, passes)


if __name__ == "__main__":
    command(main)
