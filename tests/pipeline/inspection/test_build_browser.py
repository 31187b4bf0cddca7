"""Single assets of a build: search, originals in the frame of the bricks, surfaces and renders."""

import io
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.core.primitives.surface_distance import compare_surfaces
from pipeline.inspection.build_browser import BuildBrowser


@pytest.fixture(scope="module")
def browser(tiny_build):
    with closing(BuildBrowser(tiny_build)) as opened:
        yield opened


def done(browser):
    return next(row for row in browser.rows.values() if row.status == "done")


def test_the_original_and_the_bricks_are_one_surface_in_one_frame(browser):
    row = done(browser)
    original, bricks = browser.original(row.uid), browser.bricks(row.uid, 96)
    assert np.abs(original[0]).max() == pytest.approx(0.475, abs=1e-6)
    metrics = compare_surfaces(*bricks, *original, samples=5000)
    assert metrics.chamfer < 1 / 96
    with pytest.raises(KeyError):
        browser.bricks(row.uid, 128)
    with pytest.raises(KeyError):
        browser.original("folder-0")


def test_renders_are_the_stored_images(browser):
    row = done(browser)
    (cameras,) = browser.cameras
    assert browser.views(row.uid, cameras) == [0, 1]
    image = Image.open(io.BytesIO(browser.render(row.uid, cameras, 1)))
    assert image.size == (64, 64)
    with pytest.raises(KeyError):
        browser.render(row.uid, cameras, 2)


def test_rows_are_found_by_text_and_status(browser):
    row = done(browser)
    assert browser.resolutions == [64, 96]
    assert len(browser.find()) == len(browser.rows) == 12
    assert browser.find(row.uid.upper()) == [row]
    assert row in browser.find(status="done")
    assert browser.find(row.uid, "failed") == []


def test_a_directory_that_is_no_build_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a build"):
        BuildBrowser(tmp_path)


def test_warnings_have_their_meaning_and_examples(browser):
    row = done(browser)
    warned = replace(
        row,
        warnings=("truncated_data",),
        numbers={"load_warnings": ["truncated_data: bytes 12", "trailing_data: 3"]},
    )
    browser.rows[row.uid] = warned
    try:
        ((code, meaning, examples),) = browser.warnings(row.uid)
        assert browser.find("TRUNCATED") == [warned]
    finally:
        browser.rows[row.uid] = row
    assert (code, examples) == ("truncated_data", ["truncated_data: bytes 12"])
    assert meaning.startswith("The data ends before")
