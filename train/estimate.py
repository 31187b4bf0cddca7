"""`python -m train.estimate RUN ...`: GPU-days, cost and data of the paper's training.

The runs are short ones that were measured on one GPU or more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from pipeline.core.cli import command, parse
from train.costs.config import EstimateTraining

PROG = "python -m train.estimate"


def main(args: Sequence[str]) -> None:
    """Parse the options and write the table with its assumptions to standard output.

    Raises:
        UserError: If a run cannot be read, or was measured on an unknown device.
    """
    cfg = parse(EstimateTraining, args, prog=PROG)
    # Imported after the options are parsed, so that --help and errors come at once.
    from pipeline.core.files import write_atomically
    from train.costs.estimate import as_json, estimate, predicted_run, table_lines

    lines = predicted_run(cfg)
    if cfg.steps is None or cfg.json is not None:
        found, assumptions = estimate(cfg)
        lines += [*table_lines(found, cfg), "", "Assumptions:", *(f"- {a}" for a in assumptions)]
        if cfg.json is not None:
            content = json.dumps(as_json(found, assumptions), indent=1)
            write_atomically(cfg.json, content + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
