"""Normalise the licences of catalogues to one word each, and list the open ones."""

from __future__ import annotations

import re
from functools import lru_cache

# Licences that allow changes and redistribution, also commercially. Copyleft software licences such
# as the GPL are missing, because their consequences for a data set are disputed.
OPEN_LICENCES = (
    *("cc0", "public-domain", "by", "by-sa", "odc-by", "odbl"),
    *("0bsd", "apache-2.0", "bsd", "bsl-1.0", "isc", "mit", "unlicense", "wtfpl", "zlib"),
)
UNKNOWN = (
    "",
    "unknown",
    "none",
    "null",
    "nan",
    "other",
    "noassertion",
    "n/a",
    "no license",
    "no licence",
)
SOFTWARE_PATTERNS = {  # the first match counts
    r"\bapache\b": "apache-2.0",
    r"\b0bsd\b|zero[- ]clause bsd": "0bsd",
    r"\bbsd\b": "bsd",
    r"\bmit\b|\bexpat\b": "mit",
    r"\bisc\b": "isc",
    r"\bunlicense\b": "unlicense",
    r"\bboost\b|\bbsl-1": "bsl-1.0",
    r"\bzlib\b": "zlib",
    r"\bwtfpl\b|do what the f": "wtfpl",
    r"\bagpl\b|affero": "agpl",
    r"\blgpl\b|lesser general": "lgpl",
    r"\bgpl\b|gnu general|\bgpl-?[23]": "gpl",
    r"\bmpl\b|mozilla public": "mpl-2.0",
    r"\bodbl\b": "odbl",
    r"\bodc-by\b": "odc-by",
}


@lru_cache(1 << 14)  # a catalogue repeats the same few texts a million times
def licence_of(text: str | None) -> str:
    """Normalise the text of a licence.

    Args:
        text: A name, an SPDX identifier or a URL, as a catalogue states it.

    Returns:
        A lower-case word such as "cc0", "by-nc-sa" or "mit". "unknown" if the text states nothing.
        A text that is not recognised is returned in lower case.
    """
    licence = re.sub(r"[\s_]+", " ", (text or "").strip().lower())
    if licence in UNKNOWN:
        return "unknown"
    if re.search(
        r"publicdomain/zero|\bcc[- ]?0\b|(commons|cc) zero\b|public domain dedication", licence
    ):
        return "cc0"
    if re.search(r"publicdomain/mark|public domain|\bpdm\b", licence):
        return "public-domain"
    commons = re.search(r"creativecommons\.org/licenses/([a-z-]+)", licence)
    if commons:
        return commons[1]
    matches = (name for pattern, name in SOFTWARE_PATTERNS.items() if re.search(pattern, licence))
    software = next(matches, "")
    if software:
        return software
    # Creative Commons, as "by-nc" or in words. The terms follow in a fixed order.
    short = re.fullmatch(r"(cc[- ]?)?by([- ](nc|nd|sa))*([- ]?\d\.\d)?", licence)
    if not short and not re.search(r"\battribution\b", licence):
        return licence
    patterns = {
        "nc": r"\bnc\b|non[- ]?commercial",
        "nd": r"\bnd\b|no[- ]?deriv",
        "sa": r"\bsa\b|share[- ]?alike",
    }
    terms = [name for name, pattern in patterns.items() if re.search(pattern, licence)]
    return "-".join(["by", *terms])
