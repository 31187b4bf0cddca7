"""The explanation of a rejection: what was measured, and the threshold that it fails."""

import json

import numpy as np
import pytest

from pipeline.config import BuildConfig
from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, Record
from pipeline.curation.config import FilterConfig
from pipeline.curation.filters import filter_geometry, filter_metadata
from pipeline.curation.reasons import as_options, explain

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float64)
FACES = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
OPTIONS = json.loads(json.dumps(BuildConfig().shared()))


def explained(check, *args):
    """Return the reason of a rule's verdict and its explanation."""
    with pytest.raises(Reject) as verdict:
        check(*args)
    numbers = json.loads(json.dumps(verdict.value.numbers))
    return verdict.value.reason, explain(verdict.value.reason, numbers, OPTIONS)


def test_a_flat_mesh_is_explained_by_its_thickness():
    tetrahedron = np.array([[0, 0, 0], [3, 0, 0], [0, 4, 0], [0, 0, 1e-5]])
    mesh = Mesh(vertices=tetrahedron, faces=np.array([[0, 1, 3], [0, 1, 2]], np.int32))
    reason, why = explained(filter_geometry, mesh, FilterConfig())
    assert reason == "flat"
    assert why == "thickness 2e-06, at least 1e-05 (--filter.min-thickness)"


def test_only_the_threshold_that_fails_is_stated():
    line = SQUARE * [1, 0, 0]
    assert explained(filter_geometry, Mesh(vertices=line, faces=FACES), FilterConfig()) == (
        "degenerate",
        "area 0, at least 0.0001 (--filter.min-area); width 0, at least 0.001 (--filter.min-width)",
    )
    numbers = {"faces": 10, "instances": 30_000, "max_instances": 20_000}
    assert explain("too_many_faces", numbers, OPTIONS) == (
        "instances 30000, at most 20000 (--load.max-instances)"
    )


def test_a_licence_is_stated_with_those_that_are_accepted():
    record = Record(uid="x", source="objaverse", url="x", format="glb", licence="by-nc-nd")
    reason, why = explained(filter_metadata, record, FilterConfig())
    assert reason == "licence"
    assert why.startswith("licence by-nc-nd, --filter.licences ")


def test_an_unknown_size_leaves_the_threshold_and_other_reasons_their_error():
    stopped = {"max_bytes": 500}
    assert explain("file_too_large", stopped, {"filter": {"max_bytes": 500}}) == (
        "at most 500 (--filter.max-bytes)"
    )
    assert explain("unreadable", {"bytes": 9, "error": "truncated"}, OPTIONS) == "truncated"
    assert explain("empty_scene", {"bytes": 9}, OPTIONS) == ""


def test_options_are_written_as_typed_and_long_lists_are_cut():
    options = {"filter.min_faces": 4, "filter.licences": list("abcdefgh")}
    assert as_options(options) == "--filter.min-faces 4, --filter.licences a b c d e f ..."
