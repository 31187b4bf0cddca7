"""Shared steps of the readers of text formats: line ends, numbers, names."""

from __future__ import annotations

import codecs
import os
import re
import warnings as python_warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import MAX_EXAMPLES, WarningLog
from pipeline.mesh_io.side_files import SideFiles

# Encodings of names in files that do not state one, in the order in which they are tried.
NAME_ENCODINGS = ("utf-8", "gbk", "shift_jis", "cp1252", "latin-1")

CHUNK_BYTES = 1 << 22  # of the text that is looked at at once

# Every control character is a blank, and a carriage return is a line end.
_BLANKS = bytes(10 if byte in (10, 13) else max(byte, 32) for byte in range(256))


def plain_text(content: bytes) -> bytes:
    r"""Return a text without byte order mark, with "\n" as line end and " " as the only blank."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", errors="replace").encode()
    if b"\r\n" in content:
        content = content.replace(b"\r\n", b"\n")
    return content.removeprefix(codecs.BOM_UTF8).translate(_BLANKS)


def parse_numbers(
    text: bytes,
    warnings: WarningLog,
    dtype: type[np.generic] = np.float64,
    count: int | None = None,
) -> NDArray[Any]:
    """Return all numbers of a text, separated by blanks and line ends.

    Args:
        text: The text, as `plain_text` returns it.
        warnings: Receives "invalid_value" for each word that is not a number.
        dtype: float64 or int64. An integer may be written as 3.0, but 3.5 is no integer.
        count: Number of words of the text, if it is known.

    Returns:
        [N] with one entry for each word. A word that is not a number is NaN, or the smallest
        integer.
    """
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        try:
            values = np.fromstring(text, dtype=dtype, sep=" ")
            # A word such as "1-2" is read as two numbers.
            if len(values) == (count_words(text) if count is None else count):
                return values
        except (DeprecationWarning, ValueError):
            pass
    words = text.split()
    numbers = np.full(len(words), np.nan)
    invalid = []
    for index, word in enumerate(words):
        number = _number(word)
        if number is None or (dtype is not np.float64 and not number.is_integer()):
            invalid.append(word)
        else:
            numbers[index] = number
    for word in invalid[:MAX_EXAMPLES]:
        warnings.add("invalid_value", word.decode("latin-1"))
    warnings.add("invalid_value", count=len(invalid) - len(invalid[:MAX_EXAMPLES]))
    if dtype is np.float64:
        return numbers
    is_usable = np.abs(numbers) < 2**62
    return np.where(
        is_usable, np.where(is_usable, numbers, 0).astype(np.int64), np.iinfo(np.int64).min
    )


def _number(word: bytes) -> float | None:
    """Return the value of a word, or None. A decimal comma is accepted."""
    for spelling in (word, word.replace(b",", b".")):
        try:
            if b"_" not in spelling:
                return float(spelling)
        except ValueError:
            continue
    return None


def _word_counts(text: bytes) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield a text in chunks, with the number of words that begin up to each byte."""
    total = 0
    previous_is_blank = True
    for start in range(0, len(text), CHUNK_BYTES):
        chunk = np.frombuffer(text, np.uint8, min(CHUNK_BYTES, len(text) - start), start)
        is_blank = chunk <= 32
        begins = ~is_blank
        begins[1:] &= is_blank[:-1]
        begins[0] &= previous_is_blank
        counts = np.cumsum(begins, dtype=np.int32) + np.int64(total)
        total, previous_is_blank = int(counts[-1]), bool(is_blank[-1])
        yield chunk, counts


def count_words(text: bytes) -> int:
    """Return the number of words of a text."""
    total = 0
    for _, counts in _word_counts(text):
        total = int(counts[-1])
    return total


def count_words_of_lines(text: bytes, *, with_blank_lines: bool = False) -> NDArray[np.int64]:
    """Return the number of words of each line."""
    ends = [np.zeros(1, dtype=np.int64)]
    ends += [counts[chunk == 10] for chunk, counts in _word_counts(text + b"\n")]
    words = np.diff(np.concatenate(ends))
    return words if with_blank_lines else words[words > 0]


def ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenated ranges starts[i] to starts[i] + counts[i]."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def spellings(name: bytes) -> list[str]:
    """Return the texts that the bytes of a name can mean, the most probable first."""
    found: dict[str, None] = {}
    for encoding in NAME_ENCODINGS:
        try:
            found[name.decode(encoding)] = None
        except UnicodeDecodeError:
            continue
    found[os.fsdecode(name)] = None  # names of files that are not in the system's encoding
    return list(found)


def find_spelling(name: bytes, side_files: SideFiles) -> str | None:
    """Return the spelling of a name for which a side file exists, or None."""
    if re.fullmatch(rb"\s*", name):
        return None
    return next((text for text in spellings(name) if side_files.find(text) is not None), None)
