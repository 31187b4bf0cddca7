"""`python -m model.app --checkpoint DIR`: a local page that generates meshes from images."""

from __future__ import annotations

from collections.abc import Sequence

from model.app.config import AppConfig
from pipeline.core.cli import command, parse

PROG = "python -m model.app"


def main(args: Sequence[str]) -> None:
    """Parse the options and serve the page."""
    config = parse(AppConfig, args, prog=PROG)
    # Imported here, because parsing the options must not load torch or Gradio.
    from model.app.server import serve

    serve(config)


if __name__ == "__main__":
    command(main)
