"""One mesh on the graphics card, or on Mesa's software one: pyrender's context and buffers, our shader and read-out."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cameras import RADIUS, Camera
from pipeline.schema import Material, Mesh, Part, RunError
from pipeline.shading import Lighting, shader_sources, smooth_normals, to_linear

PACKAGES = "libegl1 libgl1 libgl1-mesa-dri"
SMALL_AREA = 4.5e-4  # cube units, 150 pixels at 1024: smaller faces are lit at their corners


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Faces drawn by one call: same texture, same alpha mode; everything else varies by vertex."""

    positions: NDArray[np.float32]  # [N, 3]
    normals: NDArray[np.float32]  # [N, 3]
    surface: NDArray[np.float32]  # [N, 4] metallic, roughness, unused
    uv: NDArray[np.float32]  # [N, 2]
    colors: NDArray[np.float32]  # [N, 4] linear
    faces: NDArray[np.int64]  # [F, 3]
    texture: NDArray[np.uint8] | None
    alpha_mode: str
    alpha_cutoff: float
    per_vertex: bool  # light at the corners


def _is_solid(part: Part) -> bool:
    """True where blending cannot show anything: many exporters call everything blended."""
    material, texture = part.material, part.material.texture
    return (
        material.base_color[3] >= 1
        and (texture is None or part.uv is None or bool((texture[..., 3] == 255).all()))
        and (part.colors is None or bool((part.colors[:, 3] == 255).all()))
    )


def _part_arrays(mesh: Mesh, part: Part) -> dict[str, NDArray[Any]]:
    """The part's vertices, split where its faces need different normals."""
    vertices = mesh.vertices[part.vertices].astype(np.float32)
    faces = mesh.faces[part.faces].astype(np.int64) - (part.vertices.start or 0)
    material = part.material
    source = np.arange(len(vertices))
    normals = None if part.normals is None else part.normals.astype(np.float32)
    if normals is not None and np.isfinite(normals).all() and (np.linalg.norm(normals, axis=1) > 0.5).all():
        # Turned so that the normals are on a face's front; which side is seen is then known by the winding.
        triangles = vertices[faces]
        front = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        turned = np.einsum("ij,ij->i", front, normals[faces].sum(axis=1)) < 0
        faces[turned] = faces[turned][:, ::-1]
    else:
        corners, corner_of = smooth_normals(vertices, faces).reshape(-1, 3), faces.reshape(-1).copy()
        normals = np.zeros_like(vertices)
        normals[corner_of] = corners  # any one of them; the corners that differ get a vertex of their own
        split = np.flatnonzero((normals[corner_of] * corners).sum(axis=1) < 0.9999)
        faces.reshape(-1)[split] = len(vertices) + np.arange(len(split))
        source = np.concatenate([source, corner_of[split]])
        normals = np.concatenate([normals, corners[split]])
    colors = np.tile(np.asarray(material.base_color, np.float32), (len(source), 1))
    if part.colors is not None:
        colors[:, :3] *= to_linear(part.colors[source, :3])
        colors[:, 3] *= part.colors[source, 3].astype(np.float32) / 255
    uv = np.zeros((len(source), 2), np.float32) if part.uv is None else np.nan_to_num(part.uv[source])
    surface = np.tile(np.array([material.metallic, material.roughness, 0, 0], np.float32), (len(source), 1))
    return {
        "positions": vertices[source],
        "normals": normals,
        "surface": surface,
        "uv": uv.astype(np.float32),
        "colors": colors,
        "faces": faces,
    }


def batches(mesh: Mesh) -> list[Batch]:
    """The mesh's faces, grouped so that an asset of a thousand parts is still drawn by a handful of calls."""
    whole = Part(vertices=slice(0, len(mesh.vertices)), faces=slice(0, len(mesh.faces)), material=Material())
    groups: dict[tuple[Any, ...], list[Part]] = {}
    for part in mesh.parts or (whole,):
        material = part.material
        texture = None if part.uv is None or material.texture is None else id(material.texture)
        mode = "OPAQUE" if material.alpha_mode == "BLEND" and _is_solid(part) else material.alpha_mode
        groups.setdefault((texture, mode, material.alpha_cutoff if mode == "MASK" else 0.0), []).append(part)
    result = []
    for (texture, mode, cutoff), parts in groups.items():
        arrays = [_part_arrays(mesh, part) for part in parts]
        first = np.cumsum([0] + [len(a["positions"]) for a in arrays])
        for a, offset in zip(arrays, first):
            a["faces"] = a["faces"] + offset
        merged = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
        image = parts[0].material.texture if texture is not None else None
        corners = merged["positions"][merged["faces"]]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
        small = (area < SMALL_AREA) & (mode != "BLEND")  # blended faces are sorted, so they stay together
        for per_vertex in (False, True):
            chosen = merged["faces"][small == per_vertex]
            if len(chosen):
                used, faces = np.unique(chosen, return_inverse=True)
                arrays = {name: merged[name][used] for name in merged if name != "faces"}
                arrays["faces"] = faces.reshape(-1, 3)
                result.append(
                    Batch(**arrays, texture=image, alpha_mode=mode, alpha_cutoff=cutoff, per_vertex=per_vertex)
                )
    return result


def _import_pyrender() -> Any:
    """pyrender on EGL. Its viewer is left out: importing it loads a window toolkit that servers lack."""
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's own threads; a unit of work is one core
    stub = types.ModuleType("pyrender.viewer")
    stub.Viewer = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.setdefault("pyrender.viewer", stub)
    import pyrender

    return pyrender


@contextmanager
def context(width: int, height: int) -> Iterator[Any]:
    """A current OpenGL context on the first device that gives one, and pyrender's platform object for it.

    RunError when there is none.
    """
    problems: list[str] = []
    platform = None
    try:
        _import_pyrender()
        from OpenGL.error import Error
        from pyrender.platforms import egl

        for device in egl.query_devices():
            platform = egl.EGLPlatform(width, height, device=device)
            try:
                platform.init_context()
                break
            except (Error, AssertionError) as error:
                problems.append(f"{device!r}: {error!r}")
                platform = None
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError) as error:  # PyOpenGL without its libraries
        problems.append(repr(error))
    if platform is None:
        why = "; ".join(problems) or "no device found"
        raise RunError(
            f"cannot render: headless EGL does not start ({why}). On Debian or Ubuntu: apt install {PACKAGES}"
        )
    try:
        yield platform
    finally:
        platform.delete_context()


def renderer_string() -> str:
    """Vendor, renderer and version of the OpenGL in use: renders are the same bytes only where it is the same."""
    with context(1, 1):
        from OpenGL import GL

        return ", ".join(GL.glGetString(name).decode() for name in (GL.GL_VENDOR, GL.GL_RENDERER, GL.GL_VERSION))


class Program:
    """A linked shader pair in the current context."""

    def __init__(self, vertex: str, fragment: str):
        from OpenGL import GL
        from OpenGL.GL import shaders

        stages = [
            shaders.compileShader(vertex, GL.GL_VERTEX_SHADER),
            shaders.compileShader(fragment, GL.GL_FRAGMENT_SHADER),
        ]
        vertex_array = GL.glGenVertexArrays(1)
        GL.glBindVertexArray(vertex_array)  # PyOpenGL validates at linking, which needs one
        self.id = int(shaders.compileProgram(*stages))
        GL.glBindVertexArray(0)
        GL.glDeleteVertexArrays(1, [vertex_array])
        self.places: dict[str, int] = {}

    def at(self, name: str) -> int:
        """Location of a uniform; -1, which OpenGL ignores, where this variant has none of that name."""
        from OpenGL import GL

        if name not in self.places:
            self.places[name] = GL.glGetUniformLocation(self.id, name)
        return self.places[name]


class Canvas:
    """A mesh loaded for drawing into square images of one size; made by `canvas`."""

    def __init__(self, mesh: Mesh, size: int):
        import pyrender

        self.size = size
        self.renderer = pyrender.Renderer(size, size)
        self.programs: dict[tuple[str, bool, bool], Program] = {}
        textures: dict[int, Any] = {}
        self.drawn = []  # (batch, primitive, texture or None), opaque first
        for batch in sorted(batches(mesh), key=lambda batch: batch.alpha_mode == "BLEND"):
            primitive = pyrender.Primitive(
                positions=batch.positions,
                normals=batch.normals,
                tangents=batch.surface,
                texcoord_0=batch.uv,
                color_0=batch.colors,
                indices=batch.faces,
            )
            primitive._add_to_context()
            texture = None
            if batch.texture is not None:
                texture = textures.get(id(batch.texture))
                if texture is None:
                    texture = pyrender.Texture(source=batch.texture, source_channels="RGBA")
                    texture._add_to_context()
                    textures[id(batch.texture)] = texture
            self.drawn.append((batch, primitive, texture))
        self.textures = list(textures.values())

    def _program(self, keep: str, textured: bool, per_vertex: bool) -> Program:
        key = (keep, textured, per_vertex)
        if key not in self.programs:
            self.programs[key] = Program(*shader_sources(*key))
        return self.programs[key]

    def draw(self, camera: Camera, light: Lighting) -> NDArray[np.uint8]:
        """One image [size, size, 4], row 0 on top, colour premultiplied by alpha."""
        import pyrender
        from OpenGL import GL

        self.renderer._configure_forward_pass_viewport(pyrender.RenderFlags.OFFSCREEN)
        GL.glEnable(GL.GL_MULTISAMPLE)
        GL.glDisable(GL.GL_CULL_FACE)
        GL.glClearColor(0, 0, 0, 0)
        GL.glClear(GL.GL_COLOR_BUFFER_BIT | GL.GL_DEPTH_BUFFER_BIT)
        blended = [drawn for drawn in self.drawn if drawn[0].alpha_mode == "BLEND"]
        for drawn in self.drawn:
            self._draw_batch(*drawn, "SOLID" if drawn[0].alpha_mode == "BLEND" else drawn[0].alpha_mode, camera, light)
        GL.glDepthMask(GL.GL_FALSE)
        GL.glEnable(GL.GL_BLEND)
        GL.glBlendFunc(GL.GL_ONE, GL.GL_ONE_MINUS_SRC_ALPHA)
        for drawn in sorted(blended, key=lambda drawn: float(drawn[0].positions.mean(axis=0) @ camera.c2w[:3, 2])):
            self._sort(drawn[0], drawn[1], camera)
            self._draw_batch(*drawn, "BLEND", camera, light)
        GL.glDisable(GL.GL_BLEND)
        GL.glDepthMask(GL.GL_TRUE)
        return self._read()

    def _sort(self, batch: Batch, primitive: Any, camera: Camera) -> None:
        """Farthest triangle first: only then does blending show what is behind."""
        from OpenGL import GL

        depth = batch.positions[batch.faces].mean(axis=1) @ camera.c2w[:3, 2]
        faces = batch.faces[np.argsort(depth, kind="stable")].astype(np.uint32)
        primitive._bind()
        GL.glBindBuffer(GL.GL_ELEMENT_ARRAY_BUFFER, primitive._buffers[-1])
        GL.glBufferData(GL.GL_ELEMENT_ARRAY_BUFFER, faces.nbytes, faces, GL.GL_DYNAMIC_DRAW)

    def _draw_batch(
        self, batch: Batch, primitive: Any, texture: Any, keep: str, camera: Camera, light: Lighting
    ) -> None:
        import pyrender
        from OpenGL import GL

        near, far = (camera.distance - RADIUS) / 2, camera.distance + 10
        fov = np.radians(camera.fov_degrees)
        lens = pyrender.PerspectiveCamera(yfov=fov, znear=near, zfar=far, aspectRatio=1.0).get_projection_matrix()
        program = self._program(keep, texture is not None, batch.per_vertex)
        GL.glUseProgram(program.id)
        world_to_clip = (lens @ np.linalg.inv(camera.c2w)).astype(np.float32)
        GL.glUniformMatrix4fv(program.at("world_to_clip"), 1, GL.GL_TRUE, world_to_clip)
        GL.glUniform3f(program.at("eye"), *camera.c2w[:3, 3])
        GL.glUniform3f(program.at("sky"), *light.sky)
        GL.glUniform3f(program.at("ground"), *light.ground)
        GL.glUniform1i(program.at("light_count"), len(light.directions))
        GL.glUniform3fv(program.at("light_direction"), len(light.directions), light.directions)
        GL.glUniform3fv(program.at("light_color"), len(light.colors), light.colors)
        GL.glUniform1f(program.at("cutoff"), batch.alpha_cutoff)
        if texture is not None:
            GL.glActiveTexture(GL.GL_TEXTURE0)
            texture._bind()
        primitive._bind()
        GL.glDrawElements(GL.GL_TRIANGLES, batch.faces.size, GL.GL_UNSIGNED_INT, None)
        primitive._unbind()

    def _read(self) -> NDArray[np.uint8]:
        from OpenGL import GL

        size, renderer = self.size, self.renderer
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, renderer._main_fb_ms)
        GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, renderer._main_fb)
        GL.glBlitFramebuffer(0, 0, size, size, 0, 0, size, size, GL.GL_COLOR_BUFFER_BIT, GL.GL_NEAREST)
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, renderer._main_fb)
        rgba = np.empty((size, size, 4), np.uint8)
        GL.glReadPixels(0, 0, size, size, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, rgba)
        return rgba[::-1]

    def close(self) -> None:
        """Free what lies in the context, while it still is there."""
        from OpenGL import GL

        for _, primitive, _ in self.drawn:
            primitive.delete()
        for texture in self.textures:
            texture.delete()
        for program in self.programs.values():
            GL.glDeleteProgram(program.id)
        self.renderer.delete()


@contextmanager
def canvas(mesh: Mesh, size: int) -> Iterator[Canvas]:
    """A canvas in a context of its own, freed at the end. RunError without EGL."""
    with context(size, size):
        made = Canvas(mesh, size)
        try:
            yield made
        finally:
            made.close()
