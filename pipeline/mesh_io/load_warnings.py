"""Warnings of mesh readers: fixed codes, with counts and examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

MAX_EXAMPLES = 3  # of one code
MAX_EXAMPLE_LENGTH = 120  # characters

# Code -> what it says about the asset. The codes are stored in manifests and named in
# --filter.reject-warnings, so they stay as they are.
WARNING_CODES = {
    # The file
    "count_mismatch": "The file states another number of elements than it contains.",
    "truncated_data": "The data ends before the declared end. What is there was read.",
    "trailing_data": "The file has data after its declared end. It was left out.",
    "unknown_element": "The file has an element that the reader does not know.",
    "unknown_attribute": "An element has an attribute that the reader does not know.",
    "unknown_extension": "The file uses an extension that the reader does not know.",
    "invalid_value": "A value is not what the format allows. The default was used.",
    "text_encoding": "Text of the file is not in the declared encoding.",
    "reference_unresolved": "A reference to a part of this or another file cannot be followed. "
    "What it would add was left out.",
    "converter_warning": "The program that converted the file warned about it.",
    # Geometry
    "index_out_of_range": "Polygons refer to vertices that do not exist. They were left out.",
    "primitive_unreadable": "A part of the geometry could not be read. It was left out.",
    "degenerate_polygon": "Polygons with fewer than three distinct corners were left out.",
    "polygon_not_simple": "An outline crosses itself or a hole leaves its outline. The "
    "triangulation may differ from what the author saw.",
    "points_left_out": "Points that belong to no polygon were left out.",
    "lines_left_out": "Lines that belong to no polygon were left out.",
    "curves_left_out": "Curves or free-form surfaces were left out.",
    "unsupported_primitive": "Geometry of a kind that the reader does not support was left out.",
    "support_left_out": "Support structures of a print were left out.",
    "hidden_left_out": "Geometry that the file marks as hidden was left out.",
    "transparent_left_out": "Faces that are fully transparent were left out.",
    "outline_hull_left_out": "An inverted single-sided hull that draws an outline was left out.",
    "unplaced_geometry": "Geometry that no node of the scene draws was left out.",
    "subdivision_cage": "A subdivision surface was drawn as the cage that controls it.",
    "node_cycle": "A node of the scene is its own descendant. The repetition was left out.",
    "skin_unreadable": "A skin could not be read. Its mesh is drawn without it.",
    "skin_approximated": "A skin asks for another method than linear weights, which were used.",
    "morph_unreadable": "A morph target could not be read. Its mesh is drawn without it.",
    # Appearance
    "side_file_missing": "A file that the asset refers to is missing or outside its source.",
    "material_missing": "A material that the geometry names does not exist.",
    "material_unreadable": "A material could not be read. The default material was used.",
    "image_unreadable": "An image is missing in the file or cannot be decoded.",
    "texture_without_uv": "A texture has no texture coordinates to be drawn with.",
    "attribute_mismatch": "Texture coordinates, colours or normals do not fit the geometry.",
    "black_vertex_colors": "All vertex colours of a textured part are black and hide its texture.",
    "appearance_ignored": "The file states a property of the look that is not drawn.",
}


@dataclass(frozen=True, kw_only=True)
class LoadWarning:
    """All warnings of one file with the same code.

    Attributes:
        code: A key of `WARNING_CODES`.
        count: How often it occurred.
        examples: Up to three distinct details, such as names.
    """

    code: str
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = self.code if self.count == 1 else f"{self.code} x{self.count}"
        return f"{text}: {'; '.join(self.examples)}" if self.examples else text


class WarningLog:
    """Collects the warnings of one file."""

    def __init__(self):
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, dict[str, None]] = {}

    def add(self, code: str, detail: str = "", count: int = 1) -> None:
        """Record a warning.

        Args:
            code: A key of `WARNING_CODES`.
            detail: What it is about, such as a name. A few of them are kept.
            count: Number of occurrences. 0 records nothing.

        Raises:
            KeyError: If the code is not in the table.
        """
        if code not in WARNING_CODES:
            raise KeyError(f"{code!r} is not in WARNING_CODES")
        if count < 1:
            return
        self._counts[code] += count
        examples = self._examples.setdefault(code, {})
        if detail and len(examples) < MAX_EXAMPLES:
            examples[
                ascii(detail[:MAX_EXAMPLE_LENGTH])[1:-1]
                if not detail.isprintable()
                else detail[:MAX_EXAMPLE_LENGTH]
            ] = None

    def items(self) -> tuple[LoadWarning, ...]:
        """Return the warnings, sorted by code."""
        return tuple(
            LoadWarning(code=code, count=count, examples=tuple(self._examples[code]))
            for code, count in sorted(self._counts.items())
        )
