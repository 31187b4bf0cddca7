"""Licences as catalogues spell them, brought to one word each, and which of them are open."""

from __future__ import annotations

import re
from functools import lru_cache

# What may be changed and passed on, also for money. Copyleft software licences (GPL) are left to the user: what they
# ask of a data set is disputed.
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
SOFTWARE = {
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


@lru_cache(1 << 14)  # a catalogue says the same few things a million times
def licence_of(text: str | None) -> str:
    """One lower-case word for a licence: "cc0", "by-nc-sa", "mit", ...; "unknown" where nothing is said.

    What is not recognised stays as it is written, in lower case, and is on nobody's list.
    """
    words = re.sub(r"[\s_]+", " ", (text or "").strip().lower())
    if words in UNKNOWN:
        return "unknown"
    if re.search(
        r"publicdomain/zero|\bcc[- ]?0\b|(commons|cc) zero\b|public domain dedication", words
    ):
        return "cc0"
    if re.search(r"publicdomain/mark|public domain|\bpdm\b", words):
        return "public-domain"
    commons = re.search(r"creativecommons\.org/licenses/([a-z-]+)", words)
    if commons:
        return commons[1]
    software = next((name for pattern, name in SOFTWARE.items() if re.search(pattern, words)), "")
    short = re.fullmatch(r"(cc[- ]?)?by([- ](nc|nd|sa))*([- ]?\d\.\d)?", words)
    if software or not (short or re.search(r"\battribution\b", words)):
        return software or words
    terms = {
        "nc": r"\bnc\b|non[- ]?commercial",
        "nd": r"\bnd\b|no[- ]?deriv",
        "sa": r"\bsa\b|share[- ]?alike",
    }
    return "-".join(["by", *(name for name, pattern in terms.items() if re.search(pattern, words))])
