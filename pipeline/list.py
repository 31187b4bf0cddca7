"""`python -m pipeline.list DIR`: write a list of the finished assets of a build, for `--ids`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.inspection.config import ListConfig

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Parse the options and write the list.

    Raises:
        UserError: If the directory is not a build, or the list would be empty.
    """
    cfg = parse(ListConfig, args, prog="python -m pipeline.list")
    # Imported here, because parsing the options must not load pyarrow.
    from pipeline.core.text import counted
    from pipeline.inspection.asset_list import list_rows, write_list
    from pipeline.storage.remote import check_exists

    check_exists(cfg.directory)
    rows = list_rows(cfg.directory, cfg.split)
    write_list(rows, cfg.output)
    log.info("%s lists %s.", cfg.output, counted(len(rows), "asset"))


if __name__ == "__main__":
    command(main)
