"""The attribution of single assets: from the source, from its list, and from its address."""

import json

import pytest

from pipeline.core.schema import Record
from pipeline.inspection.asset_list import attribution_row

SKETCHFAB = "https://sketchfab.com/3d-models/8476c4170df24cf5bbe6967222d1a42d"
GITHUB = "https://github.com/owner/repo/blob/0123/meshes/chair.obj"


def row(url, licence="unknown", metadata=None):
    record = Record(
        uid="u",
        source="s",
        url=url,
        licence=licence,
        metadata=json.dumps(metadata) if metadata else "",
    )
    return list(attribution_row(record).values())[1:]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (("a/chair.obj",), ["", "chair.obj", "unknown", "a/chair.obj"]),
        ((GITHUB, "mit"), ["owner", "chair.obj", "mit", GITHUB]),
        (
            ("https://hub/x.glb", "by", {"page": SKETCHFAB, "name": "Chair", "author": "A"}),
            ["A", "Chair", "by", SKETCHFAB],
        ),
        (
            ("https://hub/x.glb", "by", {"page": SKETCHFAB}),
            ["", SKETCHFAB[-32:], "by", SKETCHFAB],
        ),
        (
            ("a.obj", "unknown", {"listed": {"Creator": "B", "License": "CC-BY 4.0", "title": 7}}),
            ["B", "7", "by", "a.obj"],
        ),
        (
            ("a.obj", "mit", {"author": "A", "listed": {"author": "B", "license": "cc0"}}),
            ["A", "a.obj", "mit", "a.obj"],
        ),
        (
            ("a.obj", "unknown", {"listed": {"page": GITHUB, "author": None}}),
            ["owner", "chair.obj", "unknown", GITHUB],
        ),
    ],
    ids=["path", "repository", "catalogue", "page", "list", "source before list", "listed page"],
)
def test_author_title_licence_and_page(record, expected):
    assert row(*record) == expected
