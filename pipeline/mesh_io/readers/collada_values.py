"""Numbers, references and sources of COLLADA documents."""

from __future__ import annotations

import re
import warnings as python_warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.collada_schema import NAME_ARRAYS, VALUE_ARRAYS
from pipeline.mesh_io.xml_tree import Element

# Between two digits a comma may be a decimal point. The stated count decides.
COMMA = re.compile(r"(?<=\d),(?=\d)")


class Document:
    """A parsed document and its elements by id.

    Args:
        root: The <COLLADA> element.
        warnings: Receives what is wrong with numbers and references.
    """

    def __init__(self, root: Element, warnings: WarningLog):
        self.root = root
        self.warnings = warnings
        self.parents: dict[int, Element] = {}  # id(element): its parent
        self._by_id: dict[str, list[Element]] = {}
        self._values: dict[str, NDArray[np.float64] | None] = {}
        pending = [root]
        while pending:
            element = pending.pop()
            identifier = element.get("id")
            if identifier:
                self._by_id.setdefault(identifier, []).append(element)
            for child in reversed(element.children):
                self.parents[id(child)] = element
                pending.append(child)

    def find(self, reference: str, *names: str) -> Element | None:
        """Return the first element with one of these names that a URL or id refers to.

        Args:
            reference: "#id" or "id".
            names: Names of elements.
        """
        identifier = reference.strip().lstrip("#")
        # The parts of a URL may be percent-encoded, and an id may not.
        return next(
            (
                element
                for spelling in dict.fromkeys((identifier, unquote(identifier)))
                for element in self._by_id.get(spelling, ())
                if element.name in names
            ),
            None,
        )

    def all(self, name: str) -> Iterator[Element]:
        """Yield all elements with this name in the order of the document."""
        pending = [self.root]
        while pending:
            element = pending.pop()
            if element.name == name:
                yield element
            pending += reversed(element.children)

    def numbers(self, element: Element | None, count: int | None = None) -> NDArray[np.float64]:
        """Return the numbers in the text of an element.

        Args:
            element: None gives none.
            count: The stated number, which decides what a comma between digits means.
        """
        if element is None:
            return np.empty(0)
        return self._parsed(element, np.float64, count)

    def integers(self, element: Element | None) -> NDArray[np.int64]:
        """Return the whole numbers in the text of an element. What is no number is -1."""
        if element is None:
            return np.empty(0, dtype=np.int64)
        return self._parsed(element, np.int64, None)

    def integer(self, element: Element, attribute: str, default: int) -> int:
        """Return an attribute that is a number and not negative, or a default with a warning."""
        text = element.get(attribute)
        if not text:
            return default
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not 0 <= value < 2**31:
            self.warnings.add("invalid_value", f"{element.name}@{attribute} {text[:50]}")
            return default
        return value

    def _parsed(self, element: Element, dtype: Any, count: int | None) -> Any:
        text = element.text
        with python_warnings.catch_warnings():
            # numpy warns where the text ends before its end, and will raise in the future.
            python_warnings.simplefilter("error", DeprecationWarning)
            try:
                if not text.strip():
                    return np.empty(0, dtype=dtype)
                return np.fromstring(text, dtype=dtype, sep=" ")
            except (DeprecationWarning, ValueError):
                pass
        if "," in text:
            spaced = text.replace(",", " ")
            with_points = COMMA.sub(".", text).replace(",", " ")
            if count is not None and len(spaced.split()) != count == len(with_points.split()):
                spaced = with_points
            self.warnings.add("invalid_value", f"commas in {element.name}")
            text = spaced
        undefined = np.nan if dtype is np.float64 else -1
        parse = float if dtype is np.float64 else int
        invalid = 0
        values = np.empty(len(text.split()), dtype=dtype)
        for index, word in enumerate(text.split()):
            try:
                values[index] = parse(word)
            except (ValueError, OverflowError):
                values[index] = undefined
                invalid += 1
        self.warnings.add("invalid_value", f"no number in {element.name}", invalid)
        return values

    def values(self, reference: str, detail: str) -> NDArray[np.float64] | None:
        """Return a <source> as [rows, columns], or None with a warning.

        Columns without a name are left out, as the format says.

        Args:
            reference: The URL of the source.
            detail: What needs it, for warnings.
        """
        if reference not in self._values:
            self._values[reference] = self._read_values(reference)
        values = self._values[reference]
        if values is None:
            self.warnings.add("attribute_mismatch", f"{detail}: no source {reference[:50]}")
        return values

    def _read_values(self, reference: str) -> NDArray[np.float64] | None:
        source = self.find(reference, "source")
        common = None if source is None else source.first("technique_common")
        accessor = None if common is None else common.first("accessor")
        array = self._array(source, accessor, VALUE_ARRAYS)
        if array is None:
            return None
        stated = self.integer(array, "count", -1)
        data = self.numbers(array, stated)
        if len(data) != stated != -1:
            self.warnings.add("count_mismatch", f"{array.get('id')}: {len(data)} for {stated}")
        if accessor is None:
            self.warnings.add("invalid_value", f"{reference[:50]} has no accessor")
            return data.reshape(-1, 3) if len(data) % 3 == 0 else None
        params = list(accessor.all("param"))
        stride = max(self.integer(accessor, "stride", max(len(params), 1)), 1)
        offset = self.integer(accessor, "offset", 0)
        count = self.integer(accessor, "count", 0)
        available = max((len(data) - offset) // stride, 0)
        if not accessor.get("count"):
            count = available
        if count > available:
            self.warnings.add("count_mismatch", f"{reference[:50]}: {available} for {count}")
            count = available
        rows = data[offset : offset + count * stride].reshape(count, stride)
        named = [index for index, param in enumerate(params[:stride]) if param.get("name")]
        # A matrix has one parameter for its 16 numbers. Some writers name no parameters at all.
        if named and not any("x" in param.get("type") for param in params):
            rows = rows[:, named]
        return rows

    def names(self, reference: str) -> list[str] | None:
        """Return a <source> of names or references, or None if there is none."""
        source = self.find(reference, "source")
        common = None if source is None else source.first("technique_common")
        accessor = None if common is None else common.first("accessor")
        array = self._array(source, accessor, NAME_ARRAYS)
        return None if array is None else array.text.split()

    def _array(
        self, source: Element | None, accessor: Element | None, names: tuple[str, ...]
    ) -> Element | None:
        """Return the array that an accessor names, or else the one in the source."""
        if source is None:
            return None
        named = None if accessor is None else self.find(accessor.get("source"), *names)
        return named or source.first(*names)
