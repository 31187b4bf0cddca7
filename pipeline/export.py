"""`python -m pipeline.export DIR -o OUT`: write training samples for other trainers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.conversion.config import ExportConfig
from pipeline.core.cli import command, parse

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Parse the options and export the assets of a build.

    Raises:
        UserError: If the directory is not a build, or the output directory holds something else.
        RunError: If no asset could be exported.
    """
    cfg = parse(ExportConfig, args, prog="python -m pipeline.export")
    # Imported here, because parsing the options must not load numba or pyarrow.
    from pipeline.conversion.vecset_export import export, summary
    from pipeline.storage.remote import check_exists

    check_exists(cfg.directory)
    log.info("%s", summary(export(cfg), cfg.output))


if __name__ == "__main__":
    command(main)
