"""Licences in the spellings of Sketchfab, Thingiverse, GitHub and the Smithsonian."""

import pytest

from pipeline.curation.licences import OPEN_LICENCES, licence_of

SPELLINGS = {
    "by": [
        "by",
        "BY",
        "CC BY 4.0",
        "cc-by-4.0",
        "Creative Commons - Attribution",
        "Creative Commons Attribution 3.0",
    ],
    "by-sa": [
        "Creative Commons - Attribution - Share Alike",
        "https://creativecommons.org/licenses/by-sa/4.0/",
        "by-sa",
    ],
    "by-nc-sa": [
        "by-nc-sa",
        "Attribution-NonCommercial-ShareAlike 4.0 International",
        "CC BY-NC-SA 4.0",
    ],
    "by-nc": ["Creative Commons - Attribution - Non-Commercial", "cc by-nc"],
    "by-nd": ["Creative Commons - Attribution - No Derivatives", "cc-by-nd-4.0"],
    "by-nc-nd": ["Attribution - Non-Commercial - No Derivatives"],
    "cc0": [
        "cc0",
        "cc0-1.0",
        "http://creativecommons.org/publicdomain/zero/1.0/",
        "Creative Commons Zero v1.0 Universal",
        "Creative Commons - Public Domain Dedication",
    ],
    "public-domain": ["PDM", "Public Domain", "https://creativecommons.org/publicdomain/mark/1.0/"],
    "mit": ["MIT License", "mit", "MIT No Attribution"],
    "apache-2.0": ["Apache License 2.0"],
    "bsd": ['BSD 3-Clause "New" or "Revised" License', "BSD License"],
    "gpl": ["GNU General Public License v3.0", "GNU - GPL", "gpl-2.0"],
    "lgpl": ["GNU Lesser General Public License v2.1", "GNU - LGPL"],
    "agpl": ["GNU Affero General Public License v3.0"],
    "unlicense": ["The Unlicense"],
    "unknown": ["", None, "None", "Other", " unknown ", "NOASSERTION"],
    "all rights reserved": ["All Rights  Reserved"],
    "by somebody": ["by Somebody"],
    "permit": ["permit"],  # not mit
}


@pytest.mark.parametrize(
    ("word", "text"), [(word, text) for word, texts in SPELLINGS.items() for text in texts]
)
def test_every_spelling_gives_one_word(word, text):
    assert licence_of(text) == word


def test_normalised_words_do_not_change():
    for word in (*OPEN_LICENCES, *SPELLINGS):
        assert licence_of(word) == word


def test_licences_that_forbid_changes_or_commercial_use_are_not_open():
    closed = {"by-nc", "by-nd", "by-nc-sa", "by-nc-nd", "unknown", "gpl", "all rights reserved"}
    assert not closed & set(OPEN_LICENCES)
    assert {"by", "by-sa", "cc0", "mit"} <= set(OPEN_LICENCES)
