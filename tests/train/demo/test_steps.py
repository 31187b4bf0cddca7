"""The demo: its commands are ones that exist, lanes run and fail as they should, and the page is whole by itself."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import PRESETS, BuildConfig
from pipeline.core.cli import parse, parse_with_presets
from pipeline.core.cli import parse as parse_build
from pipeline.core.errors import RunError
from train.demo.charts import Curve, chart, curves_of, smoothed
from train.demo.page import StepTaken, write_page
from train.demo.steps import SIZES, DemoConfig, Plan, Step, plan, run
from train.encode import EncodeConfig
from train.evaluation.generation import GenerationEvaluation
from train.evaluation.vae import VAEEvaluation
from train.export import ExportConfig
from train.stages.dit.config import DIT_PRESETS
from train.stages.structure.config import STRUCTURE_PRESETS
from train.stages.vae.config import VAE_PRESETS


def read(command):
    """The config that a command's own options give."""
    module, *words = command
    presets = {
        "train.vae": VAE_PRESETS,
        "train.dit": DIT_PRESETS,
        "train.structure": STRUCTURE_PRESETS,
    }
    if module in presets:
        return parse_with_presets(presets[module], "tiny", words, prog=module)
    if module == "pipeline.build":
        return parse_build(BuildConfig, words, prog=module, default=PRESETS["smoke"])
    if module == "pipeline.verify":
        return words
    kinds = {"train.encode": EncodeConfig, "train.export": ExportConfig}
    if module == "train.evaluate":
        kinds[module] = {"vae": VAEEvaluation, "generation": GenerationEvaluation}[words.pop(0)]
    return parse(kinds[module], words, prog=module)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_every_command_is_one_that_exists_and_they_fit_together(size):
    steps = plan(DemoConfig(data=Path("d"), out=Path("o")), SIZES[size])
    configs = {
        step.name: read(step.command) for lanes in steps.phases for lane in lanes for step in lane
    }
    build, vae, dit, structure = (configs[name] for name in ("build", "vae", "dit", "structure"))
    assert dit.resolution == structure.resolution
    assert dit.resolution in build.resolutions
    assert dit.resolution in vae.bricks.resolutions
    assert configs["encode"].resolutions == (dit.resolution,)
    assert configs["encode"].vae == vae.out / "latest" == dit.vae
    assert configs["encode"].latents == dit.latents
    assert dit.held_out_views == structure.held_out_views == 2 < build.views
    assert configs["export"].dit == (dit.out / "latest",)
    assert configs["export"].structure == structure.out / "flow" / "latest"
    assert configs["evaluate generation"].checkpoint == configs["export"].out
    assert configs["evaluate generation"].view == -1  # which training left out
    assert vae.preset == dit.preset == structure.preset == ("small" if size == "gpu" else "tiny")


def sleep(name, seconds):
    return Step(
        name=name, command=("timeit", "-n", "1", "-r", "1", f"import time; time.sleep({seconds})")
    )


def test_lanes_run_side_by_side_and_phases_in_turn(tmp_path):
    first, second = (sleep("a", 0.6), sleep("b", 0.1)), (sleep("c", 0.7),)
    last = Step(name="the end", command=("timeit", "-n", "1", "-r", "1", "1"))
    started = time.monotonic()
    taken = run(Plan(phases=((first, second), ((last,),)), out=tmp_path))
    assert [step.name for step in taken] == ["a", "b", "c", "the end"]
    assert time.monotonic() - started < sum(step.seconds for step in taken) - 0.4
    assert taken[0].command.startswith("python -m timeit")
    assert taken[0].seconds >= 0.6 > taken[3].seconds - 5
    assert taken[0].peak_bytes > 1e6
    assert (tmp_path / "logs" / "the-end.log").read_text().startswith("1 loop")


def test_a_step_that_fails_ends_the_others_and_is_quoted(tmp_path):
    lanes = (
        (sleep("long", 60), sleep("never", 60)),
        (Step(name="bad", command=("json.tool", "no-such-file")),),
    )
    started = time.monotonic()
    with pytest.raises(RunError, match=r"bad ended with exit code [12] (.|\n)*no-such-file"):
        run(Plan(phases=(lanes,), out=tmp_path))
    assert time.monotonic() - started < 30
    assert not (tmp_path / "logs" / "never.log").exists()


def fake_outputs(out, build):
    """What the steps leave behind, by hand."""
    (build / "report").mkdir(parents=True)
    report = "<html><head><style>body{margin:0}</style></head><body><main><h1>smoke</h1><p>FUNNEL</p></main></body></html>"
    (build / "report" / "index.html").write_text(report)
    picture = Image.fromarray(np.full((8, 32, 3), 90, np.uint8))
    row = {
        "uid": "a-1", "view": 11, "chamfer": 0.0123, "iou": 0.87, "f1": {"0.005": 0.5, "0.001": 0.1}, "closed": True,
        "silhouette_iou": 0.93, "faces": 1234, "nearest_is_right": True, "seconds": 1.5,
    }  # fmt: skip
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
        "image_encoder": "stand-in <encoder>", "samples": 20000, "reference": "marching cubes",
        "sampling": {"steps": [20], "guidance": 2.0, "method": "euler"},
    }  # fmt: skip
    for name in ("generation", "unseen"):
        (out / name / "meshes").mkdir(parents=True)
        picture.save(out / name / "meshes" / "a-1.png")
        rows = [row, {**row, "uid": "b-2", "chamfer": None}]
        found = {
            "summary": {**summary, **dict.fromkeys(shares, 87.5)},
            "protocol": protocol,
            "rows": rows,
        }
        (out / name / "evaluation.json").write_text(json.dumps(found))
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
    (out / "reconstruction" / "evaluation.json").write_text(json.dumps(found))
    picture.save(out / "reconstruction" / "reconstructions.png")
    for name in ("vae", "structure/vae", "structure/flow", "dit"):
        (out / name / "latest").mkdir(parents=True)
        (out / name / "latest" / "config.json").write_text('{"model": "M"}')
        rows = [
            {"step": n, "loss": 1 / n, "bce": 1 / n, "dice": 0.5, "seconds": 0.5}
            for n in range(1, 21)
        ]
        rows.append({"step": 20, "event": "validation", "loss": 0.3})
        (out / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "structure" / "flow" / "samples" / "step-00000020").mkdir(parents=True)
    picture.save(out / "structure" / "flow" / "samples" / "step-00000020" / "cells.png")


class Links(HTMLParser):
    """What a page would load, and whether its tags are balanced."""

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


def test_the_page_holds_every_number_and_loads_nothing(tmp_path):
    fake_outputs(tmp_path / "o", tmp_path / "d")
    taken = [
        StepTaken(
            name="vae",
            command="python -m train.vae",
            seconds=61.0,
            cpu_seconds=77.0,
            peak_bytes=10**9,
        )
    ]
    page = write_page(tmp_path / "o", tmp_path / "d", taken, size="cpu", seconds=605.0)
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.loaded) >= 4
    assert all(value.startswith("data:image/webp;base64,") for value in links.loaded)
    assert not re.search(r"@import|url\((?!data:)", text)
    plain = re.sub(r"<[^>]+>", " ", text)
    words = (
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
    words += (
        "python -m train.vae",
        "77",
        "stand-in &lt;encoder&gt;",
        "held-out assets 0.300",
        "among 48 assets",
    )
    for word in words:
        assert word in plain, word
    assert text.count("<svg") == 4


def test_charts_draw_what_the_metrics_say(tmp_path):
    rows = [{"step": n, "loss": 10.0 ** (-n / 50)} for n in range(1, 101)] + [
        {"step": 9, "loss": float("nan")}
    ]
    rows.append({"step": 100, "event": "validation", "loss": 0.02})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = curves_of(tmp_path / "metrics.jsonl", ("loss", "absent"))
    assert [curve.name for curve in curves] == ["loss", "loss, held-out assets"]
    svg = chart(curves)
    (points,) = re.findall(r'polyline points="([^"]+)" fill="none" stroke="#3567b0"', svg)
    xy = np.array([pair.split(",") for pair in points.split()], float)
    assert len(xy) == 100
    assert (np.diff(xy[:, 1]) > 0).all(), "falls on the page as the loss falls"
    assert np.abs(np.diff(xy[5:, 1], n=2)).max() < 0.11, "a straight line on a logarithmic axis"
    assert ">0.1<" in svg
    assert chart([Curve(name="none", steps=[1], values=[0.0])]) == ""
    np.testing.assert_allclose(smoothed([1, 2, 3, 4], 2), [1, 1.5, 2.5, 3.5])
