"""`python -m pipeline.report DIR`: write a self-contained HTML page about a build."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.inspection.config import ReportConfig

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Parse the options and write the page.

    Raises:
        UserError: If the directory is not a build.
    """
    cfg = parse(ReportConfig, args, prog="python -m pipeline.report")
    # Imported here, because parsing the options must not load pyarrow.
    from pipeline.inspection.build_report import write_report
    from pipeline.storage.remote import check_exists

    check_exists(cfg.directory)
    page = write_report(cfg.directory, cfg)
    log.info("The report is %s.", page)


if __name__ == "__main__":
    command(main)
