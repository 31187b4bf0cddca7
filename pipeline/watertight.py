"""`python -m pipeline.watertight MESH`: turn one mesh file into a closed mesh."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.conversion.config import WatertightConfig
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)

BASIC = ("mesh", "output", "resolution", "thicken", "max_opening", "up", "report")


def main(args: Sequence[str]) -> None:
    """Parse the options, close the mesh, write it and log the report.

    Raises:
        UserError: If the file cannot be read or closed, or the output cannot be written.
    """
    cfg = parse(WatertightConfig, args, prog="python -m pipeline.watertight", basic=BASIC)
    output = Path(f"{cfg.mesh.stem}.closed.glb") if cfg.output is None else cfg.output
    # Imported here, because parsing the options must not load numba.
    from pipeline.conversion.closed_mesh import close_file, write_report
    from pipeline.mesh_io.mesh_export import FORMATS, write_mesh

    if output.suffix.lower() not in FORMATS:
        raise UserError(f"--output must end in one of {', '.join(FORMATS)}, got {output}")
    if output.resolve() == cfg.mesh.resolve():
        raise UserError(f"{cfg.mesh} would be replaced by its closed mesh; choose another --output")
    (vertices, faces), report = close_file(cfg)
    write_mesh(output, vertices, faces)
    if cfg.report is not None:
        write_report(cfg.report, report)
    for line in report.lines():
        log.info("%s", line)
    log.info("The closed mesh is %s.", output)


if __name__ == "__main__":
    command(main)
