"""The page, in Gradio: generation from images in one tab, the assets of a build in another."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from gradio.themes import Base, Default  # pyright: ignore[reportMissingImports]
from PIL import Image

from model.app.api import describe_job, mesh_url
from model.app.builds import API, Builds
from model.app.jobs import ENDED, JobRequest, JobStatus, QueueFull
from model.app.service import (
    REMOVE_COLOR,
    RESTORE_COLOR,
    CutOut,
    Service,
    parse_guidance,
    parse_steps,
)
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)

TITLE = "sparse3d"
PURPOSE = "A closed 3D mesh from pictures of one object"
DATA_PURPOSE = "The assets of a build"
POLL_S = 0.25
EDITOR_SIDE = 768  # pixels of the picture in which a cut-out is repaired
MAX_ROWS = 200  # assets listed at once
MAX_SEED = (1 << 31) - 1
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")
BLUE, RED = ("#1d4ed8", "#1e40af"), ("#b91c1c", "#991b1b")  # of buttons, and below the pointer
HEAD = f'<script src="{API}/mesh_viewer.js" defer></script>'
CHECKERBOARD = "repeating-conic-gradient(#d7dde4 0% 25%, #f4f6f8 0% 50%) 50% / 16px 16px !important"
CSS = f"""
footer {{ display: none !important; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
h1 small {{ font-size: 0.95rem; font-weight: 400; display: inline-block; }}
.gradio-container {{ width: 100%; max-width: 1360px !important; margin: 0 auto !important; }}
.gradio-container .main {{ width: 100%; }}
.cutout img {{ background: {CHECKERBOARD}; }}
.cutout .grid-wrap {{ padding-top: 28px; }}
@media (max-width: 640px) {{
  .cutout .grid-container {{
    grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important; }}
  #picture {{ height: 200px !important; }}
  .empty {{ min-height: 12rem; }}
  #assets table {{ font-size: 13px; }}
}}
#assets * {{ font-family: var(--font) !important; }}
button[role=tab][aria-selected=true] {{ color: var(--body-text-color) !important; }}
#assets th * {{ overflow-wrap: normal !important; word-break: normal !important; }}
#assets :is(th, td) > * {{ padding-inline: 4px; }}
.problem {{ color: #b91c1c; font-weight: 600; }}
.dark .problem {{ color: #fca5a5; }}
.progress {{ display: grid; gap: 6px; padding: 2px; }}
.progress .line {{ display: flex; justify-content: space-between; gap: 12px; flex-wrap: wrap; }}
.progress .bar {{ height: 10px; border-radius: 5px; overflow: hidden;
  background: var(--border-color-primary); }}
.progress .bar div {{ height: 100%; background: #1d4ed8; transition: width 0.25s linear; }}
.downloads {{ display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }}
.downloads a {{ display: inline-flex; align-items: center; padding: 0 14px; min-height: 40px;
  border-radius: 8px; margin: 0 !important; background: #1d4ed8;
  color: #fff !important; font-weight: 600; text-decoration: none !important; }}
.downloads + p {{ margin-top: 10px; }}
.downloads a:hover {{ background: #1e40af; }}
.downloads a:focus-visible {{ outline: 3px solid #93c5fd; }}
.empty {{ display: grid; place-items: center; min-height: 26rem; border-radius: 8px;
  text-align: center; padding: 1rem; border: 1px dashed var(--border-color-primary);
  color: var(--body-text-color-subdued); }}
.meshes {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr));
  gap: 12px; }}
.meshes figure, .renders figure {{ margin: 0; }}
.meshes figcaption {{ font-weight: 600; margin-bottom: 4px; }}
.renders {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr));
  gap: 8px; margin-top: 12px; }}
.renders img {{ width: 100%; border-radius: 6px; background: {CHECKERBOARD}; }}
.verdict {{ display: inline-block; padding: 2px 10px; border-radius: 12px; font-weight: 600;
  color: #fff; }}
.verdict.done {{ background: #15803d; }} .verdict.rejected {{ background: #b45309; }}
.verdict.failed {{ background: #b91c1c; }}
"""


def build_page(service: Service | None, builds: Builds | None) -> gr.Blocks:
    """Return the page.

    Args:
        service: Generations. None leaves the tab out.
        builds: A build to browse. None leaves the tab out.
    """
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(3600, 6 * 3600), fill_width=True
    ) as page:
        purpose = DATA_PURPOSE if service is None else PURPOSE
        gr.HTML(f"<h1>{TITLE} &ensp;<small>{purpose}</small></h1>")
        with gr.Tabs():
            if service is not None:
                with gr.Tab("Generate"):
                    _GenerateTab(service).build()
            if builds is not None:
                with gr.Tab("Data"):
                    _DataTab(builds).build()
    page.queue(default_concurrency_limit=None)
    return page


def theme() -> Base:
    """Return the look of the page. All fonts are those of the system."""
    look = Default(primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONO_FONTS)
    # The contrast of Gradio's own colours of these buttons and texts is below 4.5.
    colors = {
        f"button_{kind}_background_fill{state}{mode}": color
        for kind, pair in (("primary", BLUE), ("cancel", RED))
        for state, color in zip(("", "_hover"), pair)
        for mode in ("", "_dark")
    }
    for text in ("block_info_text_color", "input_placeholder_color"):
        colors |= {text: "*neutral_600", f"{text}_dark": "*neutral_300"}
    return look.set(**colors)


def problem(text: str) -> str:
    """Return the HTML of an error message."""
    return f'<p class="problem" role="alert">{escape(text)}</p>' if text else ""


def duration(seconds: float) -> str:
    """Return a duration such as "12 s" or "3 min 20 s"."""
    whole = max(round(seconds), 0)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def progress_html(status: JobStatus) -> str:
    """Return the HTML of the progress of a job: its stage, a bar and the time left."""
    left = ""
    if status.state == "queued":
        count = status.position
        text = f"Waiting for {count} generation{'' if count == 1 else 's'} before this one"
    elif status.state == "running":
        number = list(status.stages).index(status.stage) + 1 if status.stage else 0
        text = "Starting"
        if number:
            text = (
                f"Stage {number} of {len(status.stages)}: {stage_name(status.stage)}, "
                f"step {min(status.step + 1, status.steps)} of {status.steps}"
            )
        if status.seconds_left is not None:
            left = f"about {duration(status.seconds_left)} left"
        elif status.stage_seconds_left is not None:
            left = f"about {duration(status.stage_seconds_left)} left in this stage"
        else:
            left = f"{duration(status.seconds)} so far"
    elif status.state == "done":
        text = f"Done in {duration(status.seconds)}"
    elif status.state == "cancelled":
        text = "Cancelled"
    else:
        return problem(status.error)
    percent = round(100 * status.fraction)
    return (
        f'<div class="progress" data-state="{status.state}">'
        f'<div class="line" role="status"><span>{escape(text)}</span><span>{left}</span></div>'
        f'<div class="bar" role="progressbar" aria-label="Progress of the generation" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<div style="width:{percent}%"></div></div></div>'
    )


def stage_name(stage: str) -> str:
    """Return the name of a stage for people."""
    resolution, _, part = stage.partition(" ")
    if not resolution.isdecimal():
        return stage
    return f"{part} at {resolution}³" if part else f"detail at {resolution}³"


def viewer_html(source: str, label: str) -> str:
    """Return the HTML of an interactive view of a GLB file."""
    return f'<mesh-viewer src="{escape(source)}" label="{escape(label)}"></mesh-viewer>'


def empty_html(text: str) -> str:
    """Return the HTML of a place that has nothing to show yet."""
    return f'<div class="empty"><p>{escape(text)}</p></div>'


FIRST_STEPS = "Choose an image of one object, check its cut-out, then press Generate."
NO_MESH = "The mesh appears here. Drag turns it, the wheel or two fingers zoom."


def _gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    """Return a gallery of pictures with transparent pixels, which cannot be changed.

    Args:
        label: Its label.
        columns: Pictures of a row.
        **options: Further options of `gr.Gallery`.
    """
    return gr.Gallery(
        label=label,
        columns=columns,
        fit_columns=False,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=[],
        elem_classes="cutout",
        **options,
    )


class _GenerateTab:
    """The tab that makes meshes.

    Args:
        service: Generations.
    """

    def __init__(self, service: Service):
        self.service = service
        self.info = service.describe()

    def build(self) -> None:
        """Add the components and their events to the page that is being built."""
        cut_outs = gr.State([])
        job_id = gr.State("")
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                files = gr.File(
                    label=f"Images of one object (at most {self.info['max_images']}"
                    f"{', all from one side' if self.info['views_from_one_side'] else ''})",
                    file_count="multiple",
                    file_types=["image"],
                    height=150,
                    elem_id="images",
                )
                keep = gr.Checkbox(label="Keep the background: the object fills the picture")
                note = gr.HTML(elem_id="note")
                gallery = _gallery("Cut-out: what the models see", 3, height=200, elem_id="cutout")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", interactive=False)
                with gr.Accordion("Repair the cut-out", open=False):
                    gr.Markdown(
                        "Select a cut-out above, paint red over what is to go and green over what "
                        "is to come back, then apply."
                    )
                    selected = gr.State(0)
                    editor = gr.ImageEditor(
                        label="Picture to paint on",
                        type="pil",
                        format="png",
                        sources=(),
                        transforms=(),
                        layers=False,
                        buttons=[],
                        canvas_size=(EDITOR_SIDE, EDITOR_SIDE),
                        brush=gr.Brush(
                            colors=[_css(REMOVE_COLOR), _css(RESTORE_COLOR)],
                            default_color=_css(REMOVE_COLOR),
                            color_mode="fixed",
                            default_size=24,
                        ),
                        elem_id="editor",
                    )
                    apply = gr.Button("Apply the repair")
                with gr.Accordion("Options", open=False):
                    resolution = gr.Dropdown(
                        [(f"{size}³", size) for size in self.info["resolutions"]],
                        value=self.info["resolutions"][-1],
                        label="Resolution",
                        info="A smaller one is faster and needs less memory.",
                    )
                    with gr.Row():
                        seed = gr.Number(
                            0,
                            label="Seed",
                            info="Another seed gives another mesh.",
                            precision=0,
                            minimum=0,
                            maximum=MAX_SEED,
                            min_width=120,
                        )
                        faces = gr.Number(
                            0,
                            label="Faces",
                            info="Simplify to so many. 0 keeps all.",
                            precision=0,
                            minimum=0,
                            min_width=120,
                        )
                    with gr.Row():
                        steps = gr.Textbox(
                            " ".join(map(str, self.info["steps"])),
                            label="Steps of each stage",
                            info="One number for all stages, or one for each.",
                            min_width=120,
                        )
                        guidance = gr.Textbox(
                            self._default_guidance(),
                            label="Guidance",
                            info="Empty takes the checkpoint's. 1 turns it off.",
                            min_width=120,
                        )
            with gr.Column(scale=3, min_width=320):
                progress = gr.HTML(f"<p>{FIRST_STEPS}</p>", elem_id="progress")
                with gr.Row():
                    picture = gr.Image(
                        label="Image",
                        type="pil",
                        format="png",
                        interactive=False,
                        buttons=[],
                        height=416,
                        min_width=160,
                        scale=1,
                        elem_classes="cutout",
                        elem_id="picture",
                    )
                    with gr.Column(scale=3, min_width=300):
                        viewer = gr.HTML(empty_html(NO_MESH), elem_id="viewer")
                result = gr.HTML(elem_id="result")
                past = _gallery(
                    "History of this session",
                    5,
                    height=170,
                    allow_preview=False,
                    elem_id="history",
                    visible=False,
                )
        shown = [cut_outs, gallery, note, selected, editor]
        gr.on(
            [files.change, keep.input], self.cut_out, [files, keep], shown, show_progress="minimal"
        )
        gallery.select(self.select, [cut_outs], [selected, editor], show_progress="hidden")
        apply.click(self.repair, [cut_outs, selected, editor], shown, show_progress="minimal")
        start.click(
            self.run,
            [cut_outs, resolution, seed, steps, guidance, faces, history],
            [job_id, progress, start, cancel, picture, viewer, result, history, past],
            show_progress="hidden",
            concurrency_limit=None,
        )
        cancel.click(self.cancel, [job_id], [cancel], show_progress="hidden")
        past.select(
            self.show_past, [history], [picture, viewer, result, progress], show_progress="hidden"
        )

    def cut_out(self, files: list[str] | None, keep: bool) -> tuple[Any, ...]:
        """Cut the object out of each uploaded image and show the results."""
        results: list[CutOut] = []
        problems = []
        try:
            if files:
                self.service.check_count(len(files))
            for path in map(Path, files or []):
                cut_out = self.service.cut_out(path, path.name, keep_background=keep)
                results.append(cut_out)
                if cut_out.problem:
                    problems.append(cut_out.problem)
        except UserError as error:
            problems.append(str(error))
            results = []
        return self._shown(results, problems, 0)

    def repair(
        self, cut_outs: list[CutOut], selected: int, drawing: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        """Apply what was painted to the selected cut-out."""
        if not cut_outs or drawing is None:
            return self._shown(cut_outs, ["There is no cut-out yet: choose an image first."], 0)
        strokes = [layer for layer in drawing["layers"] if layer is not None]
        try:
            repaired = self.service.repair(cut_outs[selected], strokes)
        except UserError as error:
            return self._shown(cut_outs, [str(error)], selected)
        results = [*cut_outs[:selected], repaired, *cut_outs[selected + 1 :]]
        return self._shown(results, [item.problem for item in results if item.problem], selected)

    def select(self, cut_outs: list[CutOut], event: gr.SelectData) -> tuple[int, Any]:
        """Show the selected cut-out in the editor."""
        index = int(event.index)
        return index, _editable(cut_outs[index])

    def run(
        self,
        cut_outs: list[CutOut],
        resolution: int | None,
        seed: float | None,
        steps: str,
        guidance: str,
        faces: float | None,
        history: list[str],
    ) -> Iterator[tuple[Any, ...]]:
        """Generate a mesh and yield the state of the page whenever the progress changes."""
        same = gr.skip()
        idle = (gr.Button(interactive=True), gr.Button(interactive=False))
        try:
            request = self._request(cut_outs, resolution, seed, steps, guidance, faces)
            job = self.service.queue.submit(request)
        except (UserError, ValueError, QueueFull) as error:
            yield ("", problem(_as_labelled(str(error))), *idle, same, same, same, same, same)
            return
        busy = (gr.Button(interactive=False), gr.Button(interactive=True))
        shown = None
        first: tuple[Any, ...] = (request.images[0], empty_html(NO_MESH), "", same, same)
        while True:
            status = self.service.queue.status(job.id)
            if status.state in ENDED:
                break
            html = progress_html(status)
            if html != shown:
                yield (job.id, html, *busy, *first)
                shown, busy, first = html, (same, same), (same,) * 5
            self.service.queue.wait(job.id, POLL_S)
        mesh: tuple[Any, ...] = (same, same, same, same)
        if status.state == "done":
            history = [job.id, *history]
            mesh = (*self._mesh(job.id), history, self._past(history))
        yield (job.id, progress_html(status), *idle, first[0], *mesh)

    def cancel(self, job_id: str) -> Any:
        """Cancel the job of this session."""
        try:
            self.service.queue.cancel(job_id)
        except KeyError:
            log.info("a job was to be cancelled that is not known any more")
        return gr.Button(interactive=False)

    def show_past(self, history: list[str], event: gr.SelectData) -> tuple[Any, ...]:
        """Show an earlier mesh of this session."""
        job_id = self._kept(history)[int(event.index)]
        image = self.service.queue.get(job_id).request.images[0]
        status = progress_html(self.service.queue.status(job_id))
        return (image, *self._mesh(job_id), status)

    def _request(
        self,
        cut_outs: list[CutOut],
        resolution: int | None,
        seed: float | None,
        steps: str,
        guidance: str,
        faces: float | None,
    ) -> JobRequest:
        """Return the request of a job.

        Raises:
            UserError: If there is no usable cut-out.
            ValueError: If an option is out of range.
        """
        if not cut_outs:
            raise UserError("There is no cut-out yet: choose an image first.")
        for cut_out in cut_outs:
            if cut_out.problem:
                raise UserError(cut_out.problem)
        options = self.service.options(
            resolution=resolution,
            steps=parse_steps(steps or ""),
            guidance=parse_guidance(guidance or ""),
            faces=int(faces) if faces else None,
        )
        return JobRequest(
            images=tuple(cut_out.image for cut_out in cut_outs),
            seed=int(seed or 0),
            options=options,
            whole_if_opaque=all(cut_out.whole for cut_out in cut_outs),
        )

    def _shown(
        self, cut_outs: list[CutOut], problems: Sequence[str], selected: int
    ) -> tuple[Any, ...]:
        """Return the values of the components that show cut-outs."""
        if problems:
            note = problem(" ".join(problems))
        elif cut_outs:
            note = '<p role="status">Check the cut-out. Generate takes it as it is shown.</p>'
        else:
            note = ""
        chosen = cut_outs[selected] if cut_outs else None
        images = [(item.image, item.name) for item in cut_outs]
        return cut_outs, images, note, selected, chosen and _editable(chosen)

    def _mesh(self, job_id: str) -> tuple[str, str]:
        """Return the HTML of the viewer and of the downloads of a finished job."""
        described = describe_job(self.service, job_id)
        assert described.mesh is not None
        links = "".join(
            f'<a href="{path}" download="mesh.{name}">Download {name.upper()}</a>'
            for name, path in described.files.items()
        )
        mesh = described.mesh
        surface = "closed" if mesh.closed else "not closed"
        stages = ", ".join(
            f"{stage_name(stage['name'])} {stage['seconds']:.1f} s" for stage in mesh.stages
        )
        text = f"{mesh.faces:,} faces, {surface}; {stages}"
        label = f"Interactive view of the generated mesh, {mesh.faces:,} faces"
        return (
            viewer_html(mesh_url(job_id, "glb"), label),
            f'<div class="downloads">{links}</div><p>{escape(text)}</p>',
        )

    def _past(self, history: list[str]) -> Any:
        jobs = [self.service.queue.get(job_id) for job_id in self._kept(history)]
        images = [(job.request.images[0], f"seed {job.request.seed}") for job in jobs]
        return gr.Gallery(images, visible=bool(images))

    def _kept(self, history: list[str]) -> list[str]:
        """Return the jobs of a session whose meshes are still kept."""
        kept = []
        for job_id in history:
            try:
                self.service.queue.get(job_id)
            except KeyError:
                continue
            kept.append(job_id)
        return kept

    def _default_guidance(self) -> str:
        value = self.info["guidance"]
        return "" if isinstance(value, list) else f"{value:g}"


def _as_labelled(message: str) -> str:
    """Return a message about an option with a capital, as the labels of the page have."""
    return message[:1].upper() + message[1:]


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _editable(cut_out: CutOut) -> dict[str, Any]:
    """Return a cut-out for the editor: the picture, faint where it is cut away."""
    picture = cut_out.picture.convert("RGBA")
    pale = Image.blend(picture, Image.new("RGBA", picture.size, (255, 255, 255, 255)), 0.7)
    pale.paste(picture, (0, 0), cut_out.image.getchannel("A"))
    pale.putalpha(255)
    pale.thumbnail((EDITOR_SIDE, EDITOR_SIDE))
    return {"background": pale, "layers": [], "composite": None}


class _DataTab:
    """The tab that shows the assets of a build.

    Args:
        builds: The build.
    """

    def __init__(self, builds: Builds):
        self.builds = builds

    def build(self) -> None:
        """Add the components and their events to the page that is being built."""
        first_uids, first_rows, first_count = self.find("", "")
        columns = ["name", "status", "reason or warnings", "faces"]
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                text = gr.Textbox(
                    label="Find", placeholder="part of a name, uid, reason or warning"
                )
                status = gr.Dropdown(
                    [("all", ""), "done", "rejected", "failed"], value="", label="Status"
                )
                count = gr.HTML(first_count, elem_id="count")
                table = gr.Dataframe(
                    first_rows,
                    headers=columns,
                    label="Assets",
                    interactive=False,
                    max_height=420,
                    wrap=True,
                    column_widths=["34%", "19%", "28%", "19%"],
                    buttons=[],
                    elem_id="assets",
                )
            with gr.Column(scale=3, min_width=320):
                details = gr.HTML(
                    empty_html("Select an asset in the table to see it."), elem_id="asset"
                )
        uids = gr.State(first_uids)
        shown = [uids, table, count]
        gr.on([text.change, status.change], self.find, [text, status], shown)
        table.select(self.show, [uids], [details], show_progress="minimal")

    def find(self, text: str | None, status: str | None) -> tuple[list[str], list[list[Any]], str]:
        """Return the uids and the table of the assets that match, and their number."""
        rows = self.builds.browser.find(text or "", status or "")
        shown = rows[:MAX_ROWS]
        table = [
            [
                row.url,
                row.status,
                row.reason or " ".join(row.warnings),
                row.faces,
            ]
            for row in shown
        ]
        part = f", of which the first {len(shown)} are listed" if len(shown) < len(rows) else ""
        note = f'<p role="status">{len(rows):,} assets{part}</p>'
        return [row.uid for row in shown], table, note

    def show(self, uids: list[str], event: gr.SelectData) -> str:
        """Return the HTML of the selected asset."""
        return asset_html(self.builds, uids[event.index[0]])


def asset_html(builds: Builds, uid: str) -> str:
    """Return the HTML of an asset: verdict, warnings, meshes and renders.

    Args:
        builds: The build.
        uid: An asset of it.
    """
    row, described = builds.browser.rows[uid], builds.describe(uid)
    parts = [
        f"<h3>{escape(row.url)}</h3>",
        f'<p><span class="verdict {row.status}">{row.status}</span> '
        f"{escape(' '.join(word for word in (row.stage, row.reason) if word))} "
        f"<code>{escape(uid)}</code>, licence {escape(row.licence)}</p>",
    ]
    if row.faces is not None:
        tokens = "".join(f", {n:,} cells at {size}³" for size, n in row.tokens.items() if n)
        parts.append(f"<p>{row.faces:,} faces{tokens}</p>")
    parts += [
        f"<p><b>{escape(warning['code'])}</b>: {escape(warning['meaning'])} "
        f"{escape('; '.join(warning['examples']))}</p>"
        for warning in described["warnings"]
    ]
    meshes = []
    if described["original"] is not None:
        meshes.append(("Original", described["original"]))
    if described["bricks"]:
        finest = max(described["bricks"], key=int)
        meshes.append((f"Bricks at {finest}³", described["bricks"][finest]))
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>"
        f"{viewer_html(source, f'{caption} of {row.url}')}</figure>"
        for caption, source in meshes
    )
    parts.append(f'<div class="meshes">{figures}</div>')
    renders = "".join(
        f'<figure><img loading="lazy" src="{source}" alt="View {number} of {escape(row.url)}">'
        "</figure>"
        for sources in described["renders"].values()
        for number, source in enumerate(sources)
    )
    parts.append(f'<div class="renders">{renders}</div>')
    numbers = json.dumps(row.numbers, indent=1, sort_keys=True)
    parts.append(
        f"<details><summary>Measured values</summary><pre>{escape(numbers)}</pre></details>"
    )
    return "".join(parts)
