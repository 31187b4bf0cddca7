"""Why assets are rejected: the options that decide about a reason, and what was measured."""

from __future__ import annotations

from typing import Any

LIST_LENGTH = 6  # values of a list that are written
ERROR_LENGTH = 100  # characters of an error's text that are written
# The options that decide about a reason code. Other reason codes have no threshold.
THRESHOLDS: dict[str, tuple[str, ...]] = {
    "unsupported_format": (),
    "missing_extra": (),
    "missing_blender": (),
    "licence": ("filter.licences",),
    "age_restricted": ("filter.age_restricted",),
    "animated": ("filter.max_animations",),
    "banned_word": ("filter.banned_words",),
    "file_too_small": ("filter.min_bytes",),
    "file_too_large": ("filter.max_bytes",),
    "too_few_faces": ("filter.min_faces",),
    "too_many_faces": ("filter.max_faces", "load.max_faces", "load.max_instances"),
    "degenerate": ("filter.min_area", "filter.min_width"),
    "flat": ("filter.min_thickness",),
    "degenerate_faces": ("filter.max_degenerate_share",),
    "load_warning": ("filter.reject_warnings",),
    "translucent": ("filter.max_translucent_share",),
    "too_thin": ("filter.max_thin_share",),
    "too_many_components": ("filter.max_components",),
    "allocation_bomb": ("load.max_unpacked_bytes",),
    "plain_box": ("rank.max_solid_fraction",),
    "leaks": ("rank.max_leak_fraction",),
    "hollow": ("rank.min_solid_fraction",),
    "too_few_tokens": ("rank.min_tokens",),
    "too_many_tokens": ("rank.max_tokens",),
    "low_coverage": ("rank.min_coverage",),
    "dark": ("rank.min_brightness",),
    "washed_out": ("rank.max_white",),
    "monotonous": ("rank.min_contrast",),
    "missing_files": ("rank.max_missing_files",),
    "duplicate_bytes": (),
    "duplicate_geometry": ("rank.dedup.shape_tolerance",),
    "low_listed_value": ("rank.min_listed",),
    "high_listed_value": ("rank.max_listed",),
    "over_share": ("rank.max_share",),
    "below_target": ("rank.target_count",),
}
# Where the verdict's numbers name a measured value otherwise than the option does.
RECORDED_NAMES = {
    "area": "relative_area",
    "unpacked_bytes": "claimed",
    "degenerate_share": "share",
    "translucent_share": "share",
    "thin_share": "share",
    "licences": "licence",
    "banned_words": "word",
}
EXTENTS = {"thickness": 2, "width": 1}  # axis whose extent is measured, relative to the longest


def thresholds(reason: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that decide about a reason code, with their values.

    Args:
        reason: A reason code.
        options: The configuration as JSON, with one object per section.

    Returns:
        {dotted name: value}. {} if the reason has no threshold.
    """
    values = {}
    for name in THRESHOLDS.get(reason, ()):
        value: Any = options
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            values[name] = value
    return values


def as_options(options: dict[str, Any]) -> str:
    """Write options as on a command line. Lists are cut after six values."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            more = " ..." if len(value) > LIST_LENGTH else ""
            value = " ".join(map(str, value[:LIST_LENGTH])) + more
        words.append(f"--{name.replace('_', '-')} {value}")
    return ", ".join(words)


def explain(reason: str, numbers: dict[str, Any], options: dict[str, Any]) -> str:
    """State what was measured of a rejected asset, and the thresholds that it fails.

    Args:
        reason: A reason code.
        numbers: The measured values of the asset's manifest row.
        options: The configuration as JSON, with one object per section.

    Returns:
        For example "thickness 0.0001, at least 0.001 (--filter.min-thickness)", or the text of an
        error, or what was left out of an empty scene. "" if nothing of the kind is recorded.
    """
    parts = []
    for name, limit in thresholds(reason, options).items():
        option = name.rpartition(".")[2]
        kind, _, quantity = option.partition("_")
        is_bound = kind in ("min", "max")
        value = _measured(quantity if is_bound else option, numbers)
        if not is_bound:
            recorded = RECORDED_NAMES.get(option, option)
            measured = "" if value is None else f"{recorded} {value}, "
            parts.append(f"{measured}{as_options({name: limit})}")
        elif value is None:
            if option in numbers:
                parts.append(_bound(name, kind, limit))
        elif value < limit if kind == "min" else value > limit:
            parts.append(f"{quantity} {_number(value)}, {_bound(name, kind, limit)}")
    if not parts and "error" in numbers:
        parts.append(str(numbers["error"])[:ERROR_LENGTH])
    if not parts and reason == "empty_scene":
        parts += [str(warning)[:ERROR_LENGTH] for warning in numbers.get("warnings", ())]
    return "; ".join(parts)


def _measured(quantity: str, numbers: dict[str, Any]) -> Any:
    """Return the recorded value that a threshold is compared with, or None."""
    extents = numbers.get("extents")
    if quantity in EXTENTS and extents:
        return extents[EXTENTS[quantity]] / extents[0] if extents[0] > 0 else 0.0
    return numbers.get(RECORDED_NAMES.get(quantity, quantity))


def _bound(name: str, kind: str, limit: float) -> str:
    words = "at least" if kind == "min" else "at most"
    return f"{words} {_number(limit)} (--{name.replace('_', '-')})"


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
