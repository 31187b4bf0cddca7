"""One mesh on the graphics card, or on Mesa's software one: pyrender's context and buffers, our shader and read-out."""

from __future__ import annotations

import ctypes
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import RADIUS, Camera
from pipeline.core.errors import RunError
from pipeline.core.schema import Mesh
from pipeline.rendering.draw_calls import DrawCall, draw_calls
from pipeline.rendering.shading import Lighting, shader_sources

EGL_CUDA_DEVICE_NV = 0x323A  # EGL_NV_device_cuda: the number that CUDA has for an EGL device
PACKAGES = "libegl1 libgl1 libgl1-mesa-dri"


def import_pyrender() -> Any:
    """pyrender on EGL. Its viewer is left out: importing it loads a window toolkit that servers lack."""
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's own threads; a unit of work is one core
    stub: Any = types.ModuleType("pyrender.viewer")
    stub.Viewer = None
    sys.modules.setdefault("pyrender.viewer", stub)
    import pyrender

    return pyrender


_gpu: ContextVar[str | None] = ContextVar("gpu", default=None)


@contextmanager
def on_gpu(gpu: str | None) -> Iterator[None]:
    """Inside, contexts begin with the EGL device that CUDA knows by this index; None, or an unknown one: the first."""
    token = _gpu.set(gpu)
    try:
        yield
    finally:
        _gpu.reset(token)


def _devices() -> list[Any]:
    """All EGL devices, the wanted GPU first, else as the drivers list them: hardware before Mesa's software."""
    from pyrender.platforms import egl

    if _gpu.get() is None:
        return egl.query_devices()
    # A GPU that was asked for and gives no context is no reason to fail while another device draws the same picture:
    # the choice is about load alone, and what drew is recorded.
    return sorted(egl.query_devices(), key=lambda device: _cuda_index(device) != _gpu.get())


def _cuda_index(device: Any) -> str | None:
    """CUDA's number of an EGL device as text, None where CUDA does not know it."""
    from OpenGL import EGL

    query = EGL.eglGetProcAddress("eglQueryDeviceAttribEXT")  # PyOpenGL has no binding of it
    if not query:
        return None
    of_device = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t)
    )
    number = ctypes.c_ssize_t()
    handle = ctypes.cast(device._display, ctypes.c_void_p)
    return (
        str(number.value)
        if of_device(query)(handle, EGL_CUDA_DEVICE_NV, ctypes.byref(number))
        else None
    )


@contextmanager
def context(width: int, height: int) -> Iterator[Any]:
    """A current OpenGL context on the first device that gives one, and pyrender's platform object for it.

    RunError when there is none.
    """
    problems: list[str] = []
    platform = None
    try:
        import_pyrender()
        from OpenGL.error import Error
        from pyrender.platforms import egl

        for device in _devices():
            platform = egl.EGLPlatform(width, height, device=device)
            try:
                platform.init_context()
                break
            except (Error, AssertionError) as error:
                problems.append(f"{device!r}: {error!r}")
                platform = None
    except (
        ImportError,
        OSError,
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:  # PyOpenGL without its libraries
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

        return ", ".join(
            bytes(GL.glGetString(name) or b"").decode()
            for name in (GL.GL_VENDOR, GL.GL_RENDERER, GL.GL_VERSION)
        )


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


@dataclass(frozen=True, kw_only=True)
class _Uploaded:
    batch: DrawCall
    primitive: Any  # pyrender.Primitive
    texture: Any  # pyrender.Texture or None

    def sort(self, towards: NDArray[np.float64]) -> None:
        """Farthest face first, seen from a direction [3]: only then does blending show what is behind."""
        from OpenGL import GL

        depth = self.batch.positions[self.batch.faces].mean(axis=1) @ towards
        faces = self.batch.faces[np.argsort(depth, kind="stable")].astype(np.uint32)
        self.primitive._bind()
        GL.glBindBuffer(GL.GL_ELEMENT_ARRAY_BUFFER, self.primitive._buffers[-1])
        GL.glBufferData(GL.GL_ELEMENT_ARRAY_BUFFER, faces.nbytes, faces, GL.GL_DYNAMIC_DRAW)
        self.primitive._unbind()


class MeshRenderer:
    """A mesh loaded for drawing into square images of one size; made by `open_renderer`."""

    def __init__(self, mesh: Mesh, size: int):
        import pyrender

        self.size = size
        self.renderer = pyrender.Renderer(size, size)
        self.programs: dict[tuple[str, bool, bool], Program] = {}
        self.textures: dict[int, Any] = {}
        self.uploaded = [self._upload(batch) for batch in draw_calls(mesh)]

    def _upload(self, batch: DrawCall) -> _Uploaded:
        import pyrender

        primitive: Any = pyrender.Primitive(
            positions=batch.positions,
            normals=batch.normals,
            tangents=batch.surface,
            texcoord_0=batch.uv,
            color_0=batch.colors,
        )
        primitive._indices = batch.faces.astype(
            np.uint32
        )  # its setter goes through fp32: wrong beyond 2**24
        primitive._add_to_context()
        texture = None
        if batch.texture is not None:
            texture = self.textures.get(id(batch.texture))
            if texture is None:
                texture = pyrender.Texture(source=batch.texture, source_channels="RGBA")
                texture._add_to_context()
                self.textures[id(batch.texture)] = texture
        return _Uploaded(batch=batch, primitive=primitive, texture=texture)

    def _program(self, keep: str, textured: bool, per_vertex: bool) -> Program:
        key = (keep, textured, per_vertex)
        if key not in self.programs:
            self.programs[key] = Program(*shader_sources(*key))
        return self.programs[key]

    def draw(self, camera: Camera, light: Lighting) -> NDArray[np.uint8]:
        """One image [size, size, 4], row 0 on top, colour premultiplied by alpha."""
        import pyrender
        from OpenGL import GL

        self.renderer._configure_forward_pass_viewport(int(pyrender.RenderFlags.OFFSCREEN))
        GL.glEnable(GL.GL_MULTISAMPLE)
        GL.glDisable(GL.GL_CULL_FACE)
        GL.glClearColor(0, 0, 0, 0)
        GL.glClear(int(GL.GL_COLOR_BUFFER_BIT) | int(GL.GL_DEPTH_BUFFER_BIT))
        towards = camera.c2w[:3, 2]
        plain = [item for item in self.uploaded if item.batch.alpha_mode != "BLEND"]
        blended = [item for item in self.uploaded if item.batch.alpha_mode == "BLEND"]
        blended.sort(key=lambda item: float(item.batch.positions.mean(axis=0) @ towards))
        for item in plain:
            self._draw(item, item.batch.alpha_mode, camera, light)
        for item in blended:
            item.sort(towards)
            self._draw(item, "SOLID", camera, light)
        GL.glDepthMask(GL.GL_FALSE)
        GL.glEnable(GL.GL_BLEND)
        GL.glBlendFunc(GL.GL_ONE, GL.GL_ONE_MINUS_SRC_ALPHA)
        for item in blended:
            self._draw(item, "BLEND", camera, light)
        GL.glDisable(GL.GL_BLEND)
        GL.glDepthMask(GL.GL_TRUE)
        return self._read()

    def _draw(self, item: _Uploaded, keep: str, camera: Camera, light: Lighting) -> None:
        import pyrender
        from OpenGL import GL

        near, far = (camera.distance - RADIUS) / 2, camera.distance + 10
        fov = float(np.radians(camera.fov_degrees))
        lens = pyrender.PerspectiveCamera(
            yfov=fov, znear=near, zfar=far, aspectRatio=1.0
        ).get_projection_matrix()
        program = self._program(keep, item.texture is not None, item.batch.per_vertex)
        GL.glUseProgram(program.id)
        world_to_clip = (lens @ np.linalg.inv(camera.c2w)).astype(np.float32)
        GL.glUniformMatrix4fv(program.at("world_to_clip"), 1, GL.GL_TRUE, world_to_clip)
        GL.glUniform3f(program.at("eye"), *camera.c2w[:3, 3])
        GL.glUniform3f(program.at("sky"), *light.sky)
        GL.glUniform3f(program.at("ground"), *light.ground)
        GL.glUniform1i(program.at("light_count"), len(light.directions))
        GL.glUniform3fv(program.at("light_direction"), len(light.directions), light.directions)
        GL.glUniform3fv(program.at("light_color"), len(light.colors), light.colors)
        GL.glUniform1f(program.at("cutoff"), item.batch.alpha_cutoff)
        if item.texture is not None:
            GL.glActiveTexture(GL.GL_TEXTURE0)
            item.texture._bind()
        item.primitive._bind()
        GL.glDrawElements(GL.GL_TRIANGLES, item.batch.faces.size, GL.GL_UNSIGNED_INT, None)
        item.primitive._unbind()

    def _read(self) -> NDArray[np.uint8]:
        from OpenGL import GL

        size, renderer = self.size, self.renderer
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, renderer._main_fb_ms)
        GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, renderer._main_fb)
        GL.glBlitFramebuffer(
            0, 0, size, size, 0, 0, size, size, GL.GL_COLOR_BUFFER_BIT, GL.GL_NEAREST
        )
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, renderer._main_fb)
        rgba = np.empty((size, size, 4), np.uint8)
        GL.glReadPixels(0, 0, size, size, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, rgba)
        alpha = rgba[..., 3]
        alpha[alpha == 127] = (
            128  # 2 of 4 samples are 127.5: NVIDIA rounds down, Mesa up, and masks cut there
        )
        return rgba[::-1]

    def close(self) -> None:
        """Free what lies in the context, while it still is there."""
        from OpenGL import GL

        for item in self.uploaded:
            item.primitive.delete()
        for texture in self.textures.values():
            texture.delete()
        for program in self.programs.values():
            GL.glDeleteProgram(program.id)
        self.renderer.delete()


@contextmanager
def open_renderer(mesh: Mesh, size: int) -> Iterator[MeshRenderer]:
    """A canvas in a context of its own, freed at the end. RunError without EGL."""
    with context(size, size):
        made = MeshRenderer(mesh, size)
        try:
            yield made
        finally:
            made.close()
