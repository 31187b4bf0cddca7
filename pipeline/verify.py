"""`python -m pipeline.verify DIR`: check a build and list every broken rule of the format."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError
from pipeline.inspection.config import VerifyConfig

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Parse the options and check the build.

    Raises:
        UserError: If the directory is not a build.
        RunError: If any rule is broken.
    """
    cfg = parse(VerifyConfig, args, prog="python -m pipeline.verify")
    # Imported here, because parsing the options must not load pyarrow or zarr.
    from pipeline.inspection.verification import verify
    from pipeline.storage.remote import check_exists

    check_exists(cfg.directory)
    breaches = verify(cfg.directory, cfg.workers)
    for breach in breaches:
        log.error("%s", breach)
    if breaches:
        raise RunError(f"breaches in {cfg.directory}: {len(breaches)}, listed above")
    log.info("%s is sound.", cfg.directory)


if __name__ == "__main__":
    command(main)
