"""The demo's page shows the outputs of all commands and needs no other file."""

import json
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from train.demo.held_out import HeldOutRow, write_held_out_page
from train.demo.page import write_page
from train.demo.runner import CommandCost


def fake_outputs(out, build):
    """Write small files like those that the demo's commands write."""
    (build / "report").mkdir(parents=True)
    report = (
        "<html><head><style>body{margin:0}</style></head>"
        "<body><main><h1>smoke</h1><p>FUNNEL</p></main></body></html>"
    )
    (build / "report" / "index.html").write_text(report, encoding="utf-8")
    picture = Image.fromarray(np.full((8, 32, 3), 90, np.uint8))
    row = {
        "uid": "a-1",
        "view": 11,
        "chamfer": 0.0123,
        "iou": 0.87,
        "closed": True,
        "f1": {"0.005": 0.5, "0.001": 0.1},
        "silhouette_iou": 0.93,
        "faces": 1234,
        "nearest_is_right": True,
        "seconds": 1.5,
    }
    shares = (
        "f1_0.005",
        "f1_0.001",
        "normal_consistency",
        "iou",
        "silhouette_iou",
        "nearest_is_right",
        "closed",
    )
    summary = {
        "name": "train assets",
        "assets": 2,
        "empty": 1,
        "candidates": 48,
        "chamfer": 12.3,
        "seconds": 1.5,
    }
    protocol = {
        "image_encoder": "stand-in <encoder>",
        "samples": 20000,
        "reference": "marching cubes",
        "sampling": {"steps": [20], "guidance": 2.0, "method": "euler"},
    }
    for name in ("generation", "unseen"):
        (out / name / "meshes").mkdir(parents=True)
        picture.save(out / name / "meshes" / "a-1.png")
        rows = [row, {**row, "uid": "b-2", "chamfer": None}]
        found = {
            "summary": {**summary, **dict.fromkeys(shares, 87.5)},
            "protocol": protocol,
            "rows": rows,
        }
        (out / name / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    (out / "reconstruction").mkdir()
    line = {
        "name": "R = 64, val",
        "assets": 9,
        "chamfer": 7.77,
        "normal_consistency": 95.0,
        "iou": 91.0,
    }
    line |= {"f1_0.005": 60.0, "f1_0.001": 20.0}
    paper = {
        "name": "Direct3D-S2, 512 (paper)",
        "chamfer": 13.59,
        "f1_0.005": 99.98,
        "f1_0.001": 41.11,
    }
    found = {"summaries": [line], "paper": [paper]}
    (out / "reconstruction" / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    picture.save(out / "reconstruction" / "reconstructions.png")
    for name in ("vae", "structure/vae", "structure/flow", "dit"):
        (out / name / "latest").mkdir(parents=True)
        (out / name / "latest" / "config.json").write_text('{"model": "M"}', encoding="utf-8")
        rows = [
            {"step": n, "loss": 1 / n, "bce": 1 / n, "dice": 0.5, "seconds": 0.5}
            for n in range(1, 21)
        ]
        rows.append({"step": 20, "event": "validation", "loss": 0.3})
        (out / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    (out / "structure" / "flow" / "samples" / "step-00000020").mkdir(parents=True)
    picture.save(out / "structure" / "flow" / "samples" / "step-00000020" / "cells.png")


class Links(HTMLParser):
    """Collect the addresses that a page would load, and check that its tags are balanced."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag not in ("meta", "img", "br", "link", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # <path/>

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_every_number_and_loads_no_other_file(tmp_path):
    fake_outputs(tmp_path / "o", tmp_path / "d")
    costs = [
        CommandCost(
            name="vae",
            command_line="python -m train.vae",
            seconds=61.0,
            cpu_seconds=77.0,
            peak_bytes=10**9,
        )
    ]
    page = write_page(tmp_path / "o", tmp_path / "d", costs, [], size="cpu", seconds=605.0)
    text = page.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.loaded) >= 4
    assert all(value.startswith("data:image/webp;base64,") for value in links.loaded)
    assert not re.search(r"@import|url\((?!data:)", text)
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    texts = (
        "10.1 min",
        "IoU 0.87",
        "CD 12.3",
        "7.8",
        "13.6",
        "nothing was generated",
        "FUNNEL",
        "steps 20",
        "1.00",
    )
    texts += (
        "python -m train.vae",
        "77",
        "stand-in &lt;encoder&gt;",
        "loss of held-out assets 0.300",
        "among 48 assets",
        "does not have the shipped weights props",
    )
    for expected in texts:
        assert expected in plain, expected
    assert text.count("<svg") == 4


def held_out_row(name, *, live, **changed):
    numbers = {"chamfer": 0.0321, "iou": 0.61, "seconds": 4.0, "nearest_training": "pack/keg.glb"}
    numbers |= {"silhouette_iou": 0.83, "closed": True, "faces": 4321, **changed}
    images = ("data:image/webp;base64,AAAA",) * 4
    return HeldOutRow(name=name, live=live, images=images, **numbers)


def test_the_page_labels_meshes_of_this_run_and_stored_results(tmp_path):
    fake_outputs(tmp_path / "o", tmp_path / "d")
    rows = [held_out_row("01-keg", live=True), held_out_row("02-arrow", live=False)]
    rows.append(held_out_row("03-sack", live=False, faces=0, chamfer=None))
    page = write_page(tmp_path / "o", tmp_path / "d", [], rows, size="cpu", seconds=605.0)
    alone = write_held_out_page(tmp_path / "alone.html", rows)
    for path in (page, alone):
        text = path.read_text(encoding="utf-8")
        links = Links()
        links.feed(text)
        assert links.open == []
        assert all(value.startswith("data:image/webp;base64,") for value in links.loaded)
        plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
        before, _, stored = plain.partition("Stored results: 2 further pictures")
        assert "Generated by this run: 1 pictures" in before
        assert "01-keg" in before
        assert "IoU 0.83" in before
        assert "CD" not in before  # a stored number does not describe a mesh of this run
        assert "02-arrow" in stored
        assert "CD 32.1 nearest training asset: pack/keg.glb" in stored
        assert "nothing was generated 03-sack" in stored
    assert "does not have the shipped weights" not in page.read_text(encoding="utf-8")
