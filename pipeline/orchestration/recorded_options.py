"""The options with which a build read its meshes, from its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.hashing import differences
from pipeline.core.provenance import READER_VERSION
from pipeline.curation.config import FilterConfig
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.orchestration.plan import Plan


def build_options(plan: Plan) -> BuildConfig:
    """Return the options with which a build read its meshes.

    Raises:
        UserError: If another version of the readers or options of another version made the build.
    """
    info, config = plan.info, plan.info.config
    if info.reader_version != READER_VERSION:
        raise UserError(
            f"{plan.out} was made by reader {info.reader_version} and this is reader "
            f"{READER_VERSION}, which reads some files differently; build again"
        )
    try:
        build = BuildConfig(
            out=plan.out,
            source=tuple(config["source"]),
            up=config["up"],
            topology_resolution=config["topology_resolution"],
            load=LoadConfig(**_as_options(config["load"])),
            normalize=NormalizeConfig(**_as_options(config["normalize"])),
            filter=FilterConfig(**_as_options(config["filter"])),
        )
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(
            f"the options of {plan.out} are not those of this version: {error}; use the version "
            f"that made it, commit {info.commit}"
        ) from error
    shared = build.shared()
    names = ("up", "topology_resolution", "load", "normalize", "filter", "topology")
    changes = differences({n: config[n] for n in names}, {n: shared[n] for n in names})
    if changes:
        raise UserError(
            f"{plan.out} was built with options that this version does not know: "
            f"{'; '.join(changes)}; use the version that made it, commit {info.commit}"
        )
    return build


def _as_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded options as arguments of their dataclass, whose sequences are tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()
    }
