"""The page in a headless browser: upload to download, cancel, bad files, two users, phone, keys.

Every test fails if the browser or the server asks for anything beyond loopback.
"""

import ipaddress
import re
import shutil
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trimesh
from PIL import Image

from tests.model.app.ball_generator import BallGenerator
from tests.model.app.local_server import served
from tests.model.test_generate import export
from tests.model.tiny_models import disc_image

pytest.importorskip("gradio", reason="the page's library Gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
# WebGL is drawn by the CPU. Every name but loopback is unknown, whatever asks for it.
ARGUMENTS = [
    *("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WAIT_MS = 60_000
PHONE = {"width": 390, "height": 844}


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture
def outside(monkeypatch):
    """Collect what this process connects to beyond loopback; there must be nothing at the end."""
    addresses = []
    connect = socket.socket.connect

    def watched(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            addresses.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    yield addresses
    assert addresses == []


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def site(browser, outside):
    """Return a context manager that serves the page and yields a function that opens it.

    Each call opens the page in a session of its own. Its requests are watched, and it is closed
    before the server ends, because the page reports a lost server as an error.
    """

    @contextmanager
    def serve(generator=None, **options):
        requests, errors = [], []
        with served(generator, **options) as url, ExitStack() as sessions:

            def open_page(**view):
                context = browser.new_context(**view)
                sessions.callback(context.close)
                page = context.new_page()
                page.set_default_timeout(WAIT_MS)
                page.on("request", lambda request: requests.append(request.url))
                page.on("pageerror", lambda error: errors.append(str(error)))
                page.goto(url)
                return page

            yield open_page
        hosts = {urlsplit(url).hostname for url in requests if url.startswith(("http", "ws"))}
        assert {host for host in hosts if not is_loopback(host)} == set()
        assert hosts
        assert errors == []

    return serve


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "disc.png"
    disc_image(256).save(path)
    return path


def upload(page, *paths):
    page.set_input_files("#images input[type=file]", [str(path) for path in paths])


def upload_object(page, path):
    upload(page, path)
    page.wait_for_selector("#cutout img")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def open_options(page):
    """Open the options and wait until their fields no longer take their first values."""
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Guidance").wait_for()
    page.wait_for_timeout(1000)


def fill(page, label, text):
    """Fill in a field and assert that it keeps the text."""
    field = page.get_by_label(label)
    field.fill(text)
    page.wait_for_timeout(200)
    assert field.input_value() == text


def wait_for_mesh(page):
    page.wait_for_selector("#viewer mesh-viewer[data-state=ready]")


def test_an_uploaded_image_becomes_a_downloaded_mesh(site, picture, tmp_path):
    generator = BallGenerator()
    with site(generator) as open_page:
        page = open_page()
        upload_object(page, picture)
        press(page, "Generate")
        wait_for_mesh(page)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download GLB").click()
        download.value.save_as(tmp_path / "mesh.glb")
    mesh = trimesh.load(tmp_path / "mesh.glb", force="mesh")
    assert (len(mesh.faces), mesh.is_watertight) == (1280, True)
    assert [request[1] for request in generator.requests] == [0]


@pytest.mark.slow
def test_the_options_reach_the_generator_and_the_views_differ(site, picture):
    generator = BallGenerator()
    with site(generator) as open_page:
        page = open_page()
        upload_object(page, picture)
        open_options(page)
        fill(page, "Seed", "11")
        fill(page, "Steps of each stage", "3 2")
        fill(page, "Guidance", "1.5")
        fill(page, "Faces", "400")
        page.get_by_label("Resolution").click()
        page.get_by_role("option", name="64³").click()
        press(page, "Generate")
        wait_for_mesh(page)
        (_, seed, options, whole) = generator.requests[0]
        assert (seed, options.resolution, options.steps) == (11, 64, (3, 2))
        assert (options.guidance, options.faces, whole) == (1.5, 400, False)
        pictures = []
        for mode in ("Shaded", "Wireframe", "Normals"):
            button = page.get_by_role("button", name=mode)
            button.click()
            assert button.get_attribute("aria-pressed") == "true"
            page.wait_for_timeout(300)
            pictures.append(page.locator("#viewer mesh-viewer").screenshot())
        assert len(set(pictures)) == 3
        canvas = page.locator("#viewer mesh-viewer canvas")
        canvas.focus()
        canvas.press("ArrowLeft")
        page.wait_for_timeout(300)
        assert page.locator("#viewer mesh-viewer").screenshot() != pictures[2]
        # A second mesh is added to the history, and the first one can be shown again.
        fill(page, "Seed", "12")
        press(page, "Generate")
        page.wait_for_function("document.querySelectorAll('#history img').length === 2")
        second = page.locator("#viewer mesh-viewer").get_attribute("src")
        page.locator("#history button:has(img)").last.click()
        page.wait_for_function(
            "before => document.querySelector('#viewer mesh-viewer').getAttribute('src') != before",
            arg=second,
        )


@pytest.mark.slow
def test_cancel_stops_the_computation_within_a_step(site, picture):
    generator = BallGenerator(closed_gate=True)
    with site(generator) as open_page:
        page = open_page()
        upload_object(page, picture)
        assert page.get_by_role("button", name="Cancel").is_disabled()
        press(page, "Generate")
        bar = page.get_by_role("progressbar")
        bar.wait_for()
        page.get_by_text(re.compile("Stage 1 of 3: structure, step 1 of 4")).wait_for()
        assert bar.get_attribute("aria-valuenow") == "0"
        press(page, "Cancel")
        page.wait_for_timeout(500)
        generator.gate.set()
        page.get_by_text("Cancelled").wait_for()
        assert generator.steps_run == 1
        press(page, "Generate")
        wait_for_mesh(page)


@pytest.mark.slow
def test_files_that_cannot_be_used_are_refused_on_the_page(site, picture, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:200])
    opaque = tmp_path / "opaque.png"
    disc_image(256).convert("RGB").save(opaque)
    large = tmp_path / "large.png"
    Image.new("RGBA", (1200, 1200), (1, 2, 3, 0)).save(large)
    with site(BallGenerator(), max_megapixels=1) as open_page:
        page = open_page()
        alert = page.get_by_role("alert")
        press(page, "Generate")
        alert.filter(has_text="There is no cut-out yet").wait_for()
        for path, message in (
            (damaged, "damaged.png must be a readable image"),
            (large, "at most 1000000 pixels (1000 x 1000)"),
        ):
            upload(page, path)
            alert.filter(has_text=message).wait_for()
            page.get_by_label("Clear").first.click()
            alert.filter(has_text=message).wait_for(state="detached")
        upload(page, opaque)
        alert.filter(has_text="background of opaque.png was not removed").wait_for()
        page.get_by_label("Keep the background: the object fills the picture").check()
        alert.filter(has_text="background of opaque.png").first.wait_for(state="detached")
        press(page, "Generate")
        wait_for_mesh(page)


@pytest.mark.slow
def test_two_users_wait_for_each_other_and_see_their_own_mesh(site, picture):
    generator = BallGenerator(closed_gate=True)
    with site(generator) as open_page:
        first, second = open_page(), open_page()
        for page in (first, second):
            upload_object(page, picture)
            press(page, "Generate")
            page.get_by_role("progressbar").wait_for()
        second.get_by_text("Waiting for 1 generation before this one").wait_for()
        generator.gate.set()
        for page in (first, second):
            wait_for_mesh(page)
        sources = {
            page.locator("#viewer mesh-viewer").get_attribute("src") for page in (first, second)
        }
        assert len(sources) == 2
        assert second.locator("#history img").count() == 1


@pytest.mark.slow
def test_a_memory_that_does_not_suffice_is_explained(site, picture):
    generator = BallGenerator()
    generator.error = MemoryError()
    with site(generator) as open_page:
        page = open_page()
        upload_object(page, picture)
        press(page, "Generate")
        page.get_by_role("alert").filter(has_text="choose a smaller resolution").wait_for()


@pytest.mark.slow
def test_a_cut_out_is_repaired_with_the_brush(site, picture):
    generator = BallGenerator()
    with site(generator) as open_page:
        page = open_page()
        upload_object(page, picture)
        page.get_by_role("button", name="Repair the cut-out").click()
        canvas = page.locator("#editor canvas").first
        canvas.wait_for()
        page.wait_for_timeout(1500)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 0.4 * box["width"], middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=10)
        page.mouse.up()
        before = page.locator("#cutout img").first.get_attribute("src")
        press(page, "Apply the repair")
        page.wait_for_function(
            "before => document.querySelector('#cutout img')?.src != before", arg=before
        )
        press(page, "Generate")
        wait_for_mesh(page)
        (image,) = generator.requests[0][0]
        assert image.getpixel((128, 128))[3] == 0
        assert image.getpixel((128, 190))[3] == 255


@pytest.mark.slow
def test_the_page_fits_a_phone(site, picture):
    with site(BallGenerator()) as open_page:
        page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
        upload_object(page, picture)
        press(page, "Generate")
        wait_for_mesh(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        viewer = page.locator("#viewer mesh-viewer").bounding_box()
        assert viewer["width"] > 300
        for name in ("Generate", "Cancel"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert min(box["width"], box["height"]) >= 32


CONTRASTS = """selector => {
  const channel = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255)
    + 0.0722 * channel(b / 255);
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(selector)]
    .filter(e => e.offsetParent && e.innerText.trim() && !e.disabled)
    .map(e => {
      const pair = [luminance(parse(getComputedStyle(e).color)), luminance(ground(e))];
      return [e.innerText.trim(), (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
    });
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_buttons_have_enough_contrast(site, picture, scheme):
    generator = BallGenerator(closed_gate=True)
    with site(generator) as open_page:
        page = open_page(color_scheme=scheme)
        upload_object(page, picture)
        page.get_by_role("button", name="Options").click()
        page.get_by_label("Seed").wait_for()
        selector = "h1, p, button, label > span, .downloads a, [class*=info]"
        seen = page.evaluate(CONTRASTS, selector)
        press(page, "Generate")
        page.get_by_role("progressbar").wait_for()
        page.wait_for_timeout(500)  # colours change gradually
        seen += page.evaluate(CONTRASTS, selector)
        generator.gate.set()
        wait_for_mesh(page)
        page.wait_for_timeout(500)
        seen += page.evaluate(CONTRASTS, selector)
    texts = {text for text, _ in seen}
    assert {"Generate", "Cancel", "Download GLB", "Another seed gives another mesh."} <= texts
    assert {text: ratio for text, ratio in seen if ratio < 4.5} == {}


@pytest.mark.slow
def test_the_keyboard_and_labels_suffice(site, picture):
    with site(BallGenerator()) as open_page:
        page = open_page()
        upload_object(page, picture)
        page.get_by_role("button", name="Options").press("Enter")
        page.get_by_label("Seed").wait_for()
        nameless = page.evaluate(
            """[...document.querySelectorAll('input, textarea, select, button, canvas')]
            .filter(e => e.offsetParent && e.type !== 'file')
            .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.title
                           || e.innerText.trim() || e.closest('[aria-label]')))
            .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert nameless == []
        page.get_by_role("tab", name="Generate").focus()
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "generate":
                break
        assert page.evaluate("document.activeElement.id") == "generate"
        page.keyboard.press("Enter")
        wait_for_mesh(page)
        assert page.get_by_role("status").filter(has_text="Done in").count() == 1


@pytest.mark.slow
def test_trained_stages_make_a_mesh_on_the_cpu(site, picture, tmp_path):
    checkpoint = export(tmp_path / "export")
    with site(checkpoint=str(checkpoint)) as open_page:
        page = open_page()
        page.set_default_timeout(300_000)
        upload_object(page, picture)
        open_options(page)
        fill(page, "Steps of each stage", "2")
        page.get_by_label("Resolution").click()
        page.get_by_role("option", name="64³").click()
        press(page, "Generate")
        wait_for_mesh(page)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download PLY").click()
        download.value.save_as(tmp_path / "mesh.ply")
    assert trimesh.load(Path(tmp_path / "mesh.ply"), force="mesh").is_watertight


LINES_OF_WORDS = """selector => {
  const words = [];
  for (const element of document.querySelectorAll(selector)) {
    if (!element.offsetParent) continue;
    const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      for (const match of texts.currentNode.data.matchAll(/[^ \\n]+/g)) {
        const range = document.createRange();
        range.setStart(texts.currentNode, match.index);
        range.setEnd(texts.currentNode, match.index + match[0].length);
        words.push([match[0], new Set([...range.getClientRects()].map(r => r.top)).size]);
      }
    }
  }
  return words;
}"""


@pytest.mark.slow
def test_the_assets_of_a_build_are_browsed(site, tiny_build):
    with site(checkpoint=None, data=tiny_build) as open_page:
        page = open_page()
        page.get_by_text("12 assets").wait_for()
        assert page.get_by_role("tab").all_inner_texts() == ["Data"]
        assets = page.locator("#assets").get_by_text("done", exact=True)
        assets.locator("visible=true").first.click()  # the table also has hidden rows
        for caption in ("Original", "Bricks at 96³"):
            page.locator("#asset figcaption").filter(has_text=caption).wait_for()
        page.wait_for_function(
            "document.querySelectorAll('#asset mesh-viewer[data-state=ready]').length === 2"
        )
        assert page.locator("#asset .renders img").count() == 2
        phone = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
        phone.get_by_text("12 assets").wait_for()
        assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        lines_of_words = phone.evaluate(LINES_OF_WORDS, "#assets th")
        assert {word for word, _ in lines_of_words} >= {"name", "status", "warnings", "faces"}
        assert [word for word, lines in lines_of_words if lines > 1] == []
        page.get_by_label("Find").fill("no such asset")
        page.get_by_text("0 assets").wait_for()
