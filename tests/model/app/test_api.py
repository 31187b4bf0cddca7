"""The HTTP API: from images to a mesh file, cancel, bad requests, limits, and other sites."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest
import trimesh
from PIL import Image

from model.app.config import AppConfig
from tests.child_python import ROOT, run_python
from tests.model.app.ball_generator import BallGenerator
from tests.model.app.local_server import served
from tests.model.tiny_models import disc_image

pytest.importorskip("fastapi", reason="the page's library Gradio is not installed")

from fastapi.testclient import TestClient

from model.app.api import build_server
from model.app.service import REMOVE_COLOR, RESTORE_COLOR, Service
from pipeline.core.errors import UserError

CONFIG = AppConfig(checkpoint="unused", max_upload_mb=1, max_megapixels=1, max_queue=1)


@contextmanager
def client_of(generator, config=CONFIG):
    with closing(Service(config, generator)) as service:
        yield TestClient(build_server(config, service, None), base_url="http://127.0.0.1:7860")


def png(image=None):
    data = io.BytesIO()
    (image or disc_image()).save(data, "PNG")
    return data.getvalue()


def images(*files):
    return [("images", (f"view_{n}.png", data)) for n, data in enumerate(files or [png()])]


def request(url):
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def finished(client, job, timeout_s=20):
    end = time.monotonic() + timeout_s
    while job["state"] in ("queued", "running"):
        assert time.monotonic() < end
        time.sleep(0.01)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def test_an_image_becomes_a_mesh_in_every_format():
    generator = BallGenerator()
    with client_of(generator) as client:
        options = {"seed": 7, "resolution": 64, "steps": "3", "guidance": 2.5, "faces": 500}
        answer = client.post("/api/jobs", files=images(), data=options)
        assert answer.status_code == 202
        job = finished(client, answer.json())
        assert (job["state"], job["fraction"], job["position"]) == ("done", 1.0, 0)
        assert job["stages"] == {"structure": 3, "64": 3, "64 surface": 1}
        assert job["mesh"]["faces"] == 1280
        assert job["mesh"]["closed"]
        for name, path in job["files"].items():
            file = client.get(path)
            mesh = trimesh.load(io.BytesIO(file.content), file_type=name, force="mesh")
            assert (len(mesh.faces), mesh.is_watertight) == (1280, True)
        assert set(job["files"]) == {"glb", "obj", "ply", "stl"}
        ((image,), seed, used, whole) = generator.requests[0]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(disc_image()))
        assert (seed, used.steps, used.guidance, used.faces, whole) == (7, (3,), 2.5, 500, False)


def test_a_job_is_cancelled_and_its_mesh_is_refused():
    generator = BallGenerator(closed_gate=True)
    with client_of(generator) as client:
        job = client.post("/api/jobs", files=images()).json()
        waiting = client.post("/api/jobs", files=images()).json()
        assert client.get(f"/api/jobs/{waiting['id']}/mesh.glb").status_code == 409
        for name in (waiting["id"], job["id"]):
            assert client.delete(f"/api/jobs/{name}").status_code == 200
        generator.gate.set()
        assert finished(client, client.get(f"/api/jobs/{job['id']}").json())["state"] == "cancelled"
        answer = client.get(f"/api/jobs/{job['id']}/mesh.glb")
        assert (answer.status_code, answer.json()["detail"]) == (
            409,
            "the job is cancelled and has no mesh",
        )
        assert generator.steps_run <= 1


@pytest.mark.parametrize(
    ("files", "options", "status", "message"),
    [
        (images(b"<html>"), {}, 422, r"view_0.png must be a readable image"),
        (images(png(disc_image(1100))), {}, 422, r"at most 1000000 pixels \(1000 x 1000\)"),
        (images(png(disc_image(mode="RGB"))), {}, 422, "background of view_0.png was not removed"),
        (images(png(Image.new("RGBA", (64, 64)))), {}, 422, "view_0.png: .*foreground"),
        (images(b"x" * 2_000_000), {}, 413, "more than 1000000; .*--max-upload-mb"),
        (images(*[png()] * 9), {}, 422, "1 to 8 images of one object, got 9"),
        (images(), {"resolution": 100}, 422, "resolution must be one of 64, 128, got 100"),
        (images(), {"steps": "ten"}, 422, "steps must be numbers such as 50 30 15, got 'ten'"),
        (images(), {"guidance": -1}, 422, "guidance must be 0 or more"),
        (images(), {"faces": 2}, 422, "faces must be 4 or more, got 2"),
        (images(), {"seed": -1}, 422, "greater than or equal to 0"),
    ],
)
def test_unusable_requests_are_refused_with_a_reason(files, options, status, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with client_of(BallGenerator()) as client:
        answer = client.post("/api/jobs", files=files, data=options)
        assert answer.status_code == status
        assert re.search(message, str(answer.json()["detail"]))


def test_a_full_queue_and_unknown_jobs_are_refused():
    generator = BallGenerator(closed_gate=True)
    with client_of(generator) as client:
        first = client.post("/api/jobs", files=images()).json()
        while client.get(f"/api/jobs/{first['id']}").json()["state"] == "queued":
            time.sleep(0.005)
        assert client.post("/api/jobs", files=images()).status_code == 202
        full = client.post("/api/jobs", files=images())
        assert (full.status_code, "--max-queue" in full.json()["detail"]) == (503, True)
        for method, path in (
            ("get", "/api/jobs/none"),
            ("delete", "/api/jobs/none"),
            ("get", "/api/jobs/none/mesh.glb"),
        ):
            assert getattr(client, method)(path).status_code == 404
        generator.gate.set()


def test_the_cut_out_can_be_seen_before_a_mesh_is_made():
    with client_of(BallGenerator()) as client:
        files = {"image": ("disc.png", png())}
        answer = client.post("/api/cutout", files=files)
        assert answer.headers["content-type"] == "image/png"
        image = Image.open(io.BytesIO(answer.content))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(disc_image()))


def test_other_sites_and_names_do_not_reach_a_local_server():
    with client_of(BallGenerator()) as client:
        answer = client.post("/api/jobs", files=images(), headers={"origin": "http://evil.example"})
        assert answer.status_code == 403
        same = {"origin": "http://127.0.0.1:7860"}
        assert client.post("/api/jobs", files=images(), headers=same).status_code == 202
        assert client.get("/api/capabilities", headers={"host": "evil.example"}).status_code == 400
        policy = client.get("/api/capabilities").headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy


def test_the_schema_describes_every_route_and_field():
    with client_of(BallGenerator()) as client:
        schema = client.get("/api/openapi.json").json()
        paths = {path: set(methods) for path, methods in schema["paths"].items()}
        assert paths == {
            "/api/capabilities": {"get"},
            "/api/cutout": {"post"},
            "/api/jobs": {"post"},
            "/api/jobs/{job_id}": {"get", "delete"},
            "/api/jobs/{job_id}/mesh.{format}": {"get"},
        }
        for methods in schema["paths"].values():
            assert all(method["description"] for method in methods.values())
        answer = client.get("/api/capabilities").json()
        assert answer["resolutions"] == [64, 128]
        assert answer["facing_views"] is answer["views_from_one_side"] is False
        assert answer["stages"] == {"structure": 4, "128": 4, "128 surface": 1}
        described = schema["components"]["schemas"]["JobDescription"]["properties"]
        job = client.post("/api/jobs", files=images()).json()
        assert set(job) == set(described)


def test_a_cut_out_is_repaired_by_paint(tmp_path):
    disc_image().save(tmp_path / "disc.png")
    with ExitStack() as stack:
        service = stack.enter_context(closing(Service(CONFIG, BallGenerator())))
        before = service.cut_out(tmp_path / "disc.png", "disc.png", keep_background=False)
        paint = np.zeros((32, 32, 4), np.uint8)  # of half the size of the image
        paint[:16] = (*REMOVE_COLOR, 255)
        paint[24:, :8] = (*RESTORE_COLOR, 255)
        after = service.repair(before, [Image.fromarray(paint)])
        alpha, old = (np.asarray(item.image)[..., 3] for item in (after, before))
        assert not alpha[:32].any()
        assert (alpha[48:, :16] == 255).all()
        np.testing.assert_array_equal(alpha[32:48], old[32:48])
        with pytest.raises(UserError, match=r"disc\.png: .*foreground"):
            service.repair(before, [Image.new("RGBA", (4, 4), (*REMOVE_COLOR, 255))])


@pytest.mark.slow
def test_the_examples_in_python_and_curl_make_a_mesh(tmp_path):
    pytest.importorskip("gradio", reason="the page's library Gradio is not installed")
    image = tmp_path / "disc.png"
    disc_image().save(image)
    generator = BallGenerator(step_s=0.05)
    with served(generator) as url:
        server = url.rstrip("/")
        ended = run_python(
            ROOT / "examples" / "generate_over_http.py", image, tmp_path / "mesh.ply", server
        )
        assert "mesh.ply has 1280 faces" in ended.stdout
        assert trimesh.load(tmp_path / "mesh.ply", force="mesh").is_watertight
        text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
        commands = [line for line in text.splitlines() if line.startswith("curl ")]
        assert len(commands) == 4
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        job = ""
        for line in commands:
            line = line.replace("http://127.0.0.1:7860", server).replace("chair.png", str(image))
            words = shlex.split(line.replace("/ID", f"/{job}"))
            answer = subprocess.run(
                [*words[:1], "-sSf", *words[1:]],
                cwd=tmp_path,
                capture_output=True,
                encoding="utf-8",
                check=True,
            ).stdout
            if not job:
                job = json.loads(answer)["id"]
                while request(f"{server}/api/jobs/{job}")["state"] != "done":
                    time.sleep(0.1)
        assert trimesh.load(tmp_path / "mesh.glb", force="mesh").is_watertight
        assert json.loads(answer)["state"] == "done"
