"""The report is a self-contained page with the numbers and pictures of the build."""

import base64
import io
import json
import re
import shutil
import struct
import time
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.core.product import Product
from pipeline.core.schema import Bricks
from pipeline.inspection.build_report import (
    axis_rows,
    cost_rows,
    drawing_progress,
    funnel_steps,
    human_bytes,
    human_seconds,
    read_build,
    summary,
    warning_rows,
    write_report,
)
from pipeline.inspection.config import ReportConfig
from pipeline.inspection.report_pictures import slice_picture
from pipeline.mesh_io.load_warnings import WARNING_CODES
from pipeline.storage.manifest import ManifestRow, read_manifest, write_manifest

KINDS = ("render", "bricks", "slice")


class Page(HTMLParser):
    """Collects links, images and text of a page, and checks that tags are closed as opened."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.links = []
        self.images = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.links += [
            value for name, value in attrs if name in ("src", "href", "action", "srcset")
        ]
        self.images += [dict(attrs) for _ in [0] if tag == "img"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open[-1] != tag and self.open[-1] in ("p", "td", "tr", "th"):
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tiny_build):
    return Page((tiny_build / "report" / "index.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_loads_nothing(page, tiny_build):
    assert page.open == []
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert "url(" not in (tiny_build / "report" / "index.html").read_text(encoding="utf-8")
    assert (tiny_build / "report" / "index.html").stat().st_size < 1_000_000


def test_every_finished_asset_has_its_original_and_its_bricks_in_3d(tiny_build):
    html = (tiny_build / "report" / "index.html").read_text(encoding="utf-8")
    rows = read_build(tiny_build).rows
    meshes = dict(re.findall(r'data-mesh="([^"]+)">([^<]+)</script>', html))
    assert set(meshes) == {f"{row.uid}/{kind}" for row in rows for kind in ("original", "bricks")}
    for data in meshes.values():
        packed = zlib.decompress(base64.b64decode(data))
        vertices, faces, groups = struct.unpack_from("<3I", packed)
        assert len(packed) == 12 + 16 * groups + 6 * vertices + 6 * faces
        assert faces <= 4000
    assert f"12 of {len(rows)} finished assets" in html
    entries = json.loads(re.search(r'id="asset-data">(.*?)</script>', html)[1])
    assert [entry["uid"] for entry in entries] == [row.uid for row in rows]
    assert {entry["tokens"] for entry in entries} == {row.tokens[96] for row in rows}


def test_every_asset_has_a_render_a_surface_and_a_slice(page, tiny_build):
    rows = [
        row for path in sorted((tiny_build / "manifest").iterdir()) for row in read_manifest(path)
    ]
    wanted = [f"{kind} of {row.uid}" for row in rows for kind in KINDS]
    assert [image["alt"] for image in page.images] == wanted
    pictures = {}
    for image in page.images:
        data = base64.b64decode(image["src"].partition(",")[2])
        pictures[image["alt"]] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    # The surface of the bricks covers the same pixels as the render, because frame and camera are
    # the same. The match is not exact, because the stored render has only 64 pixels a side.
    overlaps = []
    for row in rows:
        pair = [
            np.abs(pictures[f"{kind} of {row.uid}"] - [238, 241, 245]).max(axis=-1) > 8
            for kind in KINDS[:2]
        ]
        overlaps.append((pair[0] & pair[1]).sum() / (pair[0] | pair[1]).sum())
    assert np.median(overlaps) > 0.8
    assert min(overlaps) > 0.4


def test_the_page_shows_the_numbers_of_the_manifest(page, tiny_build):
    build = read_build(tiny_build)
    numbers = summary(build)
    tokens = [row.tokens[96] for row in build.rows]
    (row,) = [row for row in numbers["products"] if row["name"] == "sdf-96"]
    assert (row["assets"], row["max"]) == ("12", f"{max(tokens):,}")
    stored = sum(marker.bytes for marker in build.markers[Product.sdf(96)])
    assert row["cell"] == f"{stored / sum(tokens):.0f} B"
    assert row["cell"] in page.text
    assert f"{sum(tokens) / 12:,.0f}" in page.text


def test_text_of_assets_is_escaped_and_reasons_are_listed(tiny_build, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(tiny_build, out)
    path = out / "manifest" / "000001.parquet"
    rows = read_manifest(path)
    bad = {
        "status": "rejected",
        "stage": "load",
        "reason": "empty_file",
        "url": "<script>alert(1)</script>.obj",
    }
    write_manifest(path, [replace(rows[0], **bad), *rows[1:]], [64, 96])
    html = write_report(out, ReportConfig(directory=out, pictures=1, meshes=0)).read_text(
        encoding="utf-8"
    )
    assert html.count("<script") == 3  # the data and the two scripts of the list of assets
    assert "&lt;script&gt;" in html
    assert re.search(r"rejected</span></td>.*load</td>.*empty_file</td><td>1</td>", html)
    assert len(Page(html).images) == 3


def test_warnings_are_counted_with_their_meaning_and_examples(tiny_build, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(tiny_build, out)
    path = out / "manifest" / "000001.parquet"
    rows = [
        replace(
            row,
            url=f"{number}.obj",
            warnings=("trailing_data",) if number else ("trailing_data", "skin_unreadable"),
            numbers={"load_warnings": [f"trailing_data x2: <b>{number}</b>"]},
        )
        for number, row in enumerate(read_manifest(path))
    ]
    write_manifest(path, rows, [64, 96])
    listed = warning_rows(rows)
    assert [(row["code"], row["count"]) for row in listed] == [
        ("trailing_data", len(rows)),
        ("skin_unreadable", 1),
    ]
    assert listed[0]["meaning"] == WARNING_CODES["trailing_data"]
    assert listed[0]["examples"][0] == "0.obj (trailing_data x2: <b>0</b>)"
    assert len(listed[0]["examples"]) == min(3, len(rows))
    html = write_report(out, ReportConfig(directory=out, pictures=1, meshes=0)).read_text(
        encoding="utf-8"
    )
    assert "0.obj (trailing_data x2: &lt;b&gt;0&lt;/b&gt;)" in html
    assert WARNING_CODES["trailing_data"] in Page(html).text


def test_up_axes_are_counted_by_format_and_origin():
    rows = [
        ManifestRow(uid=str(k), status="done", format=name, up_axis=axis, up_origin=origin)
        for k, (name, axis, origin) in enumerate(
            [("glb", "y", "stated"), ("obj", "z", "option"), ("glb", "y", "stated")]
        )
    ]
    rows.append(ManifestRow(uid="3", status="rejected", format="obj"))
    assert axis_rows(rows) == [("glb", "y", "stated", 2), ("obj", "z", "option", 1)]


def test_an_unfinished_build_has_a_page(tiny_build, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(tiny_build, out)
    shutil.rmtree(out / "shards")
    html = write_report(out).read_text(encoding="utf-8")
    assert "4 not finished" in html
    assert Page(html).images == []


def test_another_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is not a build"):
        write_report(tmp_path)


def test_the_funnel_adds_up():
    def row(stage):
        return ManifestRow(uid="a", status="rejected" if stage else "done", stage=stage)

    rows = [row("")] * 5 + [row("load")] * 3 + [row("sdf-64")] * 2
    steps = [
        (step["stage"], step["left"], step["lost"])
        for step in funnel_steps(rows, ["sdf-64", "renders-paper"])
    ]
    assert steps == [("seen", 10, 0), ("load", 7, 3), ("sdf-64", 5, 2), ("renders-paper", 5, 0)]


def test_costs_are_listed_in_the_order_of_the_stages():
    stats = [
        {
            "stage_seconds": '{"renders-paper": 4, "sdf-512": 2, "sdf-64": 1, "load": 0.5}',
            "seconds": s,
            "peak_rss_bytes": 10**8,
        }
        for s in (1.0, 3.0)
    ]
    costs = {row["name"]: row["values"] for row in cost_rows(stats)}
    assert list(costs) == [
        "load",
        "sdf-64",
        "sdf-512",
        "renders-paper",
        "whole asset",
        "peak memory",
    ]
    assert costs["whole asset"] == ["2 s", "2 s", "2.9 s", "3 s", "4 s"]
    assert costs["peak memory"] == ["100 MB"] * 4 + [""]


def test_a_slice_is_blue_inside_and_orange_outside_with_y_up():
    ramp = np.linspace(-1, 1, 8)  # along x, from inside to outside
    values = np.broadcast_to(ramp[:, None, None], (8, 8, 8)).reshape(1, 512).astype(np.float16)
    cell = np.array([[0, 1, 1]], np.int16)  # top left of the middle plane of a 16^3 grid
    picture = slice_picture(
        Bricks(resolution=16, cells=cell, values=values, sharp=np.zeros((1, 64), np.uint8))
    )
    assert picture.shape == (16, 16, 3)
    assert (picture[8:] == 255).all()
    assert (picture[:, 8:] == 255).all()
    inside = picture[3, 0].astype(int)
    outside = picture[3, 7].astype(int)
    assert inside[2] > inside[0]
    assert outside[0] > outside[2]


def test_numbers_are_written_with_units():
    assert [human_bytes(n) for n in (0, 999, 1000, 1_234_567, 5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "5 TB",
    ]
    assert [human_seconds(s) for s in (0.0123, 1, 75.0, 7200)] == ["12.3 ms", "1 s", "75 s", "2 h"]


def test_a_report_says_how_many_assets_are_drawn(tmp_path, caplog):
    caplog.set_level("INFO")
    with drawing_progress(tmp_path, total=2, every_s=0.01):
        (tmp_path / "a-render.webp").touch()
        (tmp_path / "a-slice.webp").touch()  # the last picture of an asset
        deadline = time.monotonic() + 10
        while "pictures of 1 of 2 assets" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = len(caplog.records)
    assert "The report has pictures of 1 of 2 assets." in caplog.text
    time.sleep(0.05)
    assert len(caplog.records) == lines  # nothing is logged after the block
