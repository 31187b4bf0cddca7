"""Log lines that say how many assets of each format the sources of a build read and skip."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pipeline.core.text import counted
from pipeline.curation.filters import NAMED_BY_USER
from pipeline.mesh_io.archive import ARCHIVE_FORMATS
from pipeline.mesh_io.formats import why_skipped
from pipeline.orchestration.plan import Plan
from pipeline.sources import Source

log = logging.getLogger(__name__)

KINDS_SHOWN = 12  # of formats in a line


def log_formats(plan: Plan, sources: Sequence[Source], blender: str) -> None:
    """Log for each source how many assets of each format are read, and which are skipped and why.

    Args:
        plan: The plan of the sources.
        sources: The sources, for the files that they leave out.
        blender: The option --load.blender.
    """
    groups = plan.table.group_by(["source", "format"]).aggregate([([], "count_all")]).to_pylist()
    for source in sources:
        counts = {
            group["format"]: group["count_all"]
            for group in groups
            if group["source"] == source.name
        }
        reasons = {name: _why_skipped(source, name, blender) for name in counts}
        read = {name: n for name, n in counts.items() if not reasons[name]}
        log.info(
            "The source %s has %s to read%s.",
            source.name,
            counted(sum(read.values()), "asset"),
            _listed(read),
        )
        for reason in sorted({reason for reason in reasons.values() if reason}):
            skipped = {name: n for name, n in counts.items() if reasons[name] == reason}
            total = counted(sum(skipped.values()), "asset")
            log.warning("It skips %s%s, because %s.", total, _listed(skipped), reason)
        left_out = getattr(source, "skipped", {})
        if left_out:
            log.info(
                "The source %s leaves out %s of other kinds%s.",
                source.name,
                counted(sum(left_out.values()), "file"),
                _listed(left_out),
            )


def _why_skipped(source: Source, name: str, blender: str) -> str:
    """Return why the assets of a format are skipped, "" if they are read."""
    if source.name in NAMED_BY_USER and name in ARCHIVE_FORMATS:
        return ""  # the meshes in archives are checked when they are unpacked
    return why_skipped(name, blender)


def _listed(counts: Mapping[str, int]) -> str:
    """Return ": 5 glb, 2 obj", the most frequent first. "" without any."""
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{n:,} {name or 'without extension'}" for name, n in kinds[:KINDS_SHOWN]]
    if len(kinds) > KINDS_SHOWN:
        words.append(f"{sum(n for _, n in kinds[KINDS_SHOWN:]):,} others")
    return f": {', '.join(words)}" if words else ""
