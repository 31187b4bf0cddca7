"""The HTTP API: submit a generation, watch it, download its mesh, cancel it; browse a build."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import (  # pyright: ignore[reportMissingImports]
    APIRouter,
    FastAPI,
    File,
    Form,
    HTTPException,
    Query,
    Request,
    UploadFile,
)
from fastapi.responses import FileResponse, JSONResponse, Response  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware  # pyright: ignore[reportMissingImports]

from model.app.builds import API, Builds
from model.app.config import AppConfig
from model.app.jobs import JobRequest, QueueFull
from model.app.service import CutOut, Service, parse_steps
from pipeline.core.errors import RunError, UserError
from pipeline.core.html import MESH_VIEWER

LOCAL_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
MEDIA_TYPES = {
    "glb": "model/gltf-binary",
    "obj": "model/obj",
    "ply": "application/octet-stream",
    "stl": "model/stl",
}
# The page may load nothing from elsewhere, whatever a library asks for.
CONTENT_SECURITY_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)

Format = Literal["glb", "obj", "ply", "stl"]


class Capabilities(BaseModel):
    """What can be asked for."""

    resolutions: list[int] = Field(description="Resolutions of the meshes, in ascending order.")
    stages: dict[str, int] = Field(description="Steps of each stage with the defaults, in order.")
    steps: list[int] = Field(description="Default sampling steps of each sampled stage.")
    guidance: float | list[float] = Field(description="Default guidance scale, or one per stage.")
    facing_views: bool = Field(description="Whether meshes face the camera of the first image.")
    views_from_one_side: bool = Field(
        description="Whether several images of one object must be from the side of the first one."
    )
    device: str = Field(description="Device of the models.")
    formats: list[str] = Field(description="Formats of the mesh files.")
    max_upload_bytes: int = Field(description="Largest size of a request.")
    max_pixels: int = Field(description="Largest number of pixels of an image.")
    max_images: int = Field(description="Largest number of images of one object.")


class MeshDescription(BaseModel):
    """Sizes of a generated mesh, and what it took."""

    vertices: int
    faces: int
    closed: bool = Field(description="Whether the surface has no open edge.")
    holes_closed: int
    floaters_removed: int
    bubbles_removed: int
    stages: list[dict[str, Any]] = Field(description="Name, seconds and tokens of each stage.")


class JobDescription(BaseModel):
    """The state of a job."""

    id: str = Field(description="Name of the job in all further requests.")
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int = Field(description="Jobs that run or wait before this one.")
    stage: str = Field(description="Stage that runs, or the last one that ran.")
    step: int = Field(description="Finished steps of the stage.")
    steps: int = Field(description="Steps of the stage.")
    stages: dict[str, int] = Field(description="Steps of every stage, in order.")
    fraction: float = Field(description="Share of the work that is done, from 0 to 1.")
    seconds: float = Field(description="Seconds since the job started.")
    stage_seconds_left: float | None = Field(description="Estimate for the stage.")
    seconds_left: float | None = Field(description="Estimate for the job, null if unknown.")
    error: str = Field(description="Why the job failed and what to do.")
    mesh: MeshDescription | None = Field(description="The result of a job that is done.")
    files: dict[str, str] = Field(description="Path of the mesh file in each format.")


def describe_job(service: Service, job_id: str) -> JobDescription:
    """Return the state of a job.

    Raises:
        KeyError: If there is no such job.
    """
    status = service.queue.status(job_id)
    done = status.state == "done"
    return JobDescription(
        **asdict(status),
        mesh=MeshDescription(**service.describe_mesh(job_id)) if done else None,
        files={name: mesh_url(job_id, name) for name in MEDIA_TYPES} if done else {},
    )


def mesh_url(job_id: str, format: str) -> str:
    """Return the path of a job's mesh file on the server."""
    return f"{API}/jobs/{job_id}/mesh.{format}"


def build_server(config: AppConfig, service: Service | None, builds: Builds | None) -> FastAPI:
    """Return the server of the API, without the page.

    Args:
        config: Limits, and the address that the server listens on.
        service: Generations. None leaves them out.
        builds: A build to browse. None leaves it out.
    """
    server = FastAPI(
        title="sparse3d",
        summary="Generate meshes from images, and browse builds.",
        docs_url=None,  # its scripts come from another server
        redoc_url=None,
        openapi_url=f"{API}/openapi.json",
    )
    if service is not None:
        server.include_router(_generation(service), prefix=API)
    if builds is not None:
        server.include_router(_assets(builds), prefix=API)

    @server.get(f"{API}/mesh_viewer.js", include_in_schema=False)
    def viewer() -> FileResponse:
        return FileResponse(MESH_VIEWER, media_type="text/javascript")

    @server.exception_handler(UserError)
    @server.exception_handler(RunError)
    def refuse(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @server.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        refused = _refused(request, config)
        if refused is not None:
            return refused
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    if config.loopback_only:
        # Another site's name that resolves to this machine would otherwise reach the server.
        server.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    return server


def _refused(request: Request, config: AppConfig) -> Response | None:
    """Return the answer to a request that is too large or comes from another site, else None."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        return JSONResponse({"detail": f"requests from {origin} are refused"}, 403)
    if request.method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        return None
    size = request.headers.get("content-length")
    if size is None or not size.isdecimal():
        return JSONResponse({"detail": "the request must state its Content-Length"}, 411)
    if int(size) > config.max_upload_bytes:
        return JSONResponse(
            {
                "detail": f"the request has {size} bytes, more than {config.max_upload_bytes}; "
                "send smaller images, or start the server with a larger --max-upload-mb"
            },
            413,
        )
    return None


def _generation(service: Service) -> APIRouter:
    """Return the routes of cut-outs and jobs."""
    router = APIRouter(tags=["generation"])

    def cut_out(upload: UploadFile, keep_background: bool) -> CutOut:
        name = Path(upload.filename or "image").name
        with tempfile.NamedTemporaryFile() as file:
            shutil.copyfileobj(upload.file, file)
            file.flush()
            return service.cut_out(Path(file.name), name, keep_background=keep_background)

    @router.get("/capabilities")
    def capabilities() -> Capabilities:
        """Return the resolutions, the defaults and the limits."""
        return Capabilities(**service.describe())

    @router.post("/cutout", response_class=Response)
    def cutout(
        image: Annotated[UploadFile, File(description="An image of an object.")],
        keep_background: Annotated[
            bool, Form(description="Take all of the picture as the object.")
        ] = False,
    ) -> Response:
        """Return the object of an image on a transparent background, as PNG."""
        result = cut_out(image, keep_background)
        if result.problem:
            raise UserError(result.problem)
        data = BytesIO()
        result.image.save(data, "PNG")
        return Response(data.getvalue(), media_type="image/png")

    @router.post("/jobs", status_code=202)
    def submit(
        images: Annotated[list[UploadFile], File(description="Images of one object.")],
        resolution: Annotated[
            int | None, Form(description="Resolution of the mesh. Without it the finest one.")
        ] = None,
        seed: Annotated[int, Form(description="Seed of the noise.", ge=0, lt=1 << 63)] = 0,
        steps: Annotated[
            str, Form(description='Sampling steps of each stage, such as "50 30 15".')
        ] = "",
        guidance: Annotated[float | None, Form(description="Guidance scale.")] = None,
        faces: Annotated[
            int | None, Form(description="Simplify the mesh to about this many faces.")
        ] = None,
        keep_background: Annotated[
            bool, Form(description="Take all of each picture as the object.")
        ] = False,
    ) -> JobDescription:
        """Append a generation to the queue. The same images, seed and options give one mesh."""
        service.check_count(len(images))
        try:
            options = service.options(
                resolution=resolution, steps=parse_steps(steps), guidance=guidance, faces=faces
            )
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        cut_outs = [cut_out(image, keep_background) for image in images]
        for result in cut_outs:
            if result.problem:
                raise UserError(result.problem)
        request = JobRequest(
            images=tuple(result.image for result in cut_outs),
            seed=seed,
            options=options,
            whole_if_opaque=keep_background,
        )
        try:
            job = service.queue.submit(request)
        except QueueFull as error:
            raise HTTPException(503, str(error)) from error
        return describe_job(service, job.id)

    @router.get("/jobs/{job_id}")
    def progress(job_id: str) -> JobDescription:
        """Return the state of a job."""
        with _known("job", job_id):
            return describe_job(service, job_id)

    @router.delete("/jobs/{job_id}")
    def cancel(job_id: str) -> JobDescription:
        """Take a job from the queue, or stop it at the end of the step that runs."""
        with _known("job", job_id):
            service.queue.cancel(job_id)
            return describe_job(service, job_id)

    @router.get("/jobs/{job_id}/mesh.{format}", response_class=FileResponse)
    def mesh(job_id: str, format: Format) -> FileResponse:
        """Download the mesh of a job that is done."""
        with _known("job", job_id):
            if service.queue.get(job_id).mesh is None:
                state = service.queue.status(job_id).state
                raise HTTPException(409, f"the job is {state} and has no mesh")
            path = service.mesh_file(job_id, format)
        return FileResponse(path, media_type=MEDIA_TYPES[format], filename=f"mesh.{format}")

    return router


def _assets(builds: Builds) -> APIRouter:
    """Return the routes of a build's assets."""
    router = APIRouter(tags=["build"])

    @router.get("/assets")
    def assets(
        text: Annotated[str, Query(description="Part of a uid, name, reason or warning.")] = "",
        status: Annotated[str, Query(description='"done", "rejected" or "failed".')] = "",
        start: Annotated[int, Query(ge=0, description="Number of assets to skip.")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="Most assets to return.")] = 100,
    ) -> dict[str, Any]:
        """List the assets of the build, in its order."""
        rows = builds.browser.find(text, status)
        return {
            "total": len(rows),
            "assets": [row.to_columns() for row in rows[start : start + limit]],
        }

    @router.get("/assets/{uid}")
    def asset(uid: str) -> dict[str, Any]:
        """Return the manifest row of an asset, its warnings and the paths of its files."""
        with _known("asset", uid):
            return builds.describe(uid)

    @router.get("/assets/{uid}/original.glb", response_class=FileResponse)
    def original(uid: str) -> FileResponse:
        """Return the geometry of the asset's file, in the frame of the bricks."""
        with _known("asset", uid):
            return FileResponse(builds.original(uid), media_type=MEDIA_TYPES["glb"])

    @router.get("/assets/{uid}/bricks-{resolution}.glb", response_class=FileResponse)
    def bricks(uid: str, resolution: int) -> FileResponse:
        """Return the surface of the asset's bricks."""
        with _known("asset", uid):
            return FileResponse(builds.bricks(uid, resolution), media_type=MEDIA_TYPES["glb"])

    @router.get("/assets/{uid}/renders/{cameras}/{view}", response_class=Response)
    def render(uid: str, cameras: str, view: int) -> Response:
        """Return a stored render of the asset."""
        with _known("asset", uid):
            data = builds.browser.render(uid, cameras, view)
        return Response(data, media_type="image/png" if data[:4] == b"\x89PNG" else "image/webp")

    return router


class _known:
    """Answers 404 if a name is not known."""

    def __init__(self, kind: str, name: str):
        self.message = f"there is no {kind} {name}, or it was removed since"

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, KeyError):
            raise HTTPException(404, self.message) from error
