"""Find the rows of elements in a text with one row a line, even if declared counts are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog


def counts_that_fit(
    declared: Mapping[str, int], fits: Sequence[NDArray[np.bool_]], warnings: WarningLog
) -> list[int] | None:
    """Return how many lines each element has, if the lines can be told apart.

    The declared counts are taken if all lines fit them. Otherwise one of the counts may be wrong,
    first that of the last element. The last line may be incomplete.

    Args:
        declared: {name of the element: declared count}, in the order of the file.
        fits: For each element bool [L], whether a line can be a row of it.
        warnings: Receives "count_mismatch", "truncated_data" or "trailing_data".

    Returns:
        The counts, or None if no single count explains the lines.
    """
    names, counts = list(declared), list(declared.values())
    sums = [np.concatenate([[0], np.cumsum(fit)]) for fit in fits]
    num_lines = len(fits[0])

    def fit(numbers: list[int]) -> bool:
        ends = np.cumsum(numbers)
        if min(numbers) < 0 or ends[-1] > num_lines:
            return False
        return all(
            total[end] - total[end - number] == number
            for total, end, number in zip(sums, ends.tolist(), numbers, strict=True)
        )

    if sum(counts) == num_lines and fit(counts):
        return counts
    for lines in (num_lines, num_lines - 1):
        for index in reversed(range(len(counts))):
            numbers = counts.copy()
            numbers[index] += lines - sum(counts)
            if not fit(numbers):
                continue
            is_cut = index == len(counts) - 1 and numbers[index] < counts[index]
            detail = f"{counts[index]} {names[index]} declared, {numbers[index]} found"
            if is_cut:
                warnings.add("truncated_data", detail)
            elif numbers != counts:
                warnings.add("count_mismatch", detail)
            if lines < num_lines and not is_cut:
                warnings.add("trailing_data", "one line")
            return numbers
    if fit(counts):
        warnings.add("trailing_data", f"{num_lines - sum(counts)} lines")
        return counts
    return None
