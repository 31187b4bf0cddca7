"""Decode the names in archives that do not state their encoding, and compare names.

Old zip programs store names in the code page of their author's computer. One encoding is chosen
for all names of an archive: UTF-8 if they fit, otherwise the one whose characters are common.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable

# In the order of preference for names that fit several of them equally well.
LEGACY_ENCODINGS = ("gbk", "cp932", "cp437", "cp1252")


def folded(name: str) -> str:
    """Return a name so that spellings of equal names are equal.

    Upper and lower case are equal, and so are composed and decomposed characters: macOS stores
    "\u00e9" as "e" and an accent.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def common_encoding(names: Iterable[bytes]) -> str:
    """Return the encoding of names whose archive states none.

    Args:
        names: The names as stored.

    Returns:
        "utf-8" or one of `LEGACY_ENCODINGS`. The same names always give the same encoding.
    """
    joined = b"\n".join(names)
    if _decodes(joined, "utf-8"):
        return "utf-8"
    # max() takes the first one of equally good encodings. Code page 437 has all bytes.
    return max(
        (encoding for encoding in LEGACY_ENCODINGS if _decodes(joined, encoding)),
        key=lambda encoding: _share_of_common_characters(joined, encoding),
    )


def other_spellings(name: bytes, encoding: str) -> list[str]:
    """Return a name in the encodings that were not chosen.

    Files that refer to it may have been decoded in another way.

    Args:
        name: The name as stored.
        encoding: The chosen encoding.
    """
    chosen = name.decode(encoding)
    spellings = [
        name.decode(other)
        for other in ("utf-8", *LEGACY_ENCODINGS, "latin-1")
        if _decodes(name, other)
    ]
    return [spelling for spelling in dict.fromkeys(spellings) if spelling != chosen]


def _decodes(name: bytes, encoding: str) -> bool:
    try:
        name.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _share_of_common_characters(name: bytes, encoding: str) -> float:
    """Return the share of the characters beyond ASCII that names in an encoding often have."""
    is_common = _IS_COMMON[encoding]
    characters = [
        (character, code)
        for character in name.decode(encoding)
        if (code := character.encode(encoding)) >= b"\x80"
    ]
    common = sum(is_common(character, code) for character, code in characters)
    return common / max(len(characters), 1)


def _is_common_chinese(_: str, code: bytes) -> bool:
    """Return whether a character is of the first level of GB 2312."""
    return len(code) == 2 and 0xB0 <= code[0] <= 0xD7 and code[1] >= 0xA1


def _is_common_japanese(character: str, code: bytes) -> bool:
    """Return whether a character is full-width kana or of the first level of JIS X 0208."""
    is_kana = "\u3040" <= character <= "\u30ff"
    return is_kana or (len(code) == 2 and 0x88 <= code[0] <= 0x97)


def _is_letter(character: str, _: bytes) -> bool:
    return character.isalpha() and character < "\u0180"


_IS_COMMON: dict[str, Callable[[str, bytes], bool]] = {
    "gbk": _is_common_chinese,
    "cp932": _is_common_japanese,
    "cp437": _is_letter,
    "cp1252": _is_letter,
}
