"""Renders one mesh with OpenGL, without a screen, on a GPU or with Mesa's software renderer.

The context and the buffers are those of pyrender. The shaders and the read-out are our own.
"""

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
from pipeline.core.schema import Mesh, Sampler
from pipeline.rendering.draw_calls import DrawCall, draw_calls
from pipeline.rendering.shading import Lighting, ShaderVariant, shader_sources

EGL_CUDA_DEVICE_NV = 0x323A  # EGL_NV_device_cuda: the attribute that holds CUDA's device index
PACKAGES = "libegl1 libgl1 libgl1-mesa-dri"  # of Debian and Ubuntu


def import_pyrender() -> Any:
    """Import pyrender with EGL as its platform.

    Its viewer is replaced by a stub, because importing it loads a window toolkit that servers lack.
    """
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa shall not start threads: one core per asset
    stub: Any = types.ModuleType("pyrender.viewer")
    stub.Viewer = None
    sys.modules.setdefault("pyrender.viewer", stub)
    import pyrender

    return pyrender


_gpu: ContextVar[str | None] = ContextVar("gpu", default=None)


@contextmanager
def on_gpu(gpu: str | None) -> Iterator[None]:
    """Prefer one GPU for the OpenGL contexts that are created inside the block.

    Args:
        gpu: Index of the GPU in CUDA's numbering. None, or an index that no EGL device has, takes
            the first EGL device.
    """
    token = _gpu.set(gpu)
    try:
        yield
    finally:
        _gpu.reset(token)


def _devices() -> list[Any]:
    """Return all EGL devices, the preferred GPU first and the others in the drivers' order.

    Drivers list hardware before Mesa's software renderer.
    """
    from pyrender.platforms import egl

    if _gpu.get() is None:
        return egl.query_devices()
    # The other devices stay in the list: the choice only balances the load, the images are the same
    # picture on any device, and the renderer is recorded.
    return sorted(egl.query_devices(), key=lambda device: _cuda_index(device) != _gpu.get())


def _cuda_index(device: Any) -> str | None:
    """Return CUDA's index of an EGL device as text, or None if it is no CUDA device."""
    from OpenGL import EGL

    query = EGL.eglGetProcAddress("eglQueryDeviceAttribEXT")  # PyOpenGL has no binding for it
    if not query:
        return None
    query_attribute = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t)
    )(query)
    index = ctypes.c_ssize_t()
    handle = ctypes.cast(device._display, ctypes.c_void_p)
    if not query_attribute(handle, EGL_CUDA_DEVICE_NV, ctypes.byref(index)):
        return None
    return str(index.value)


@contextmanager
def gl_context(width: int, height: int) -> Iterator[Any]:
    """Create an OpenGL context and make it current.

    It is on the first EGL device that supports one.

    Args:
        width: Width of the framebuffer in pixels.
        height: Height of the framebuffer in pixels.

    Yields:
        pyrender's platform object.

    Raises:
        RunError: If no device supports a context, or a library is missing.
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
    # PyOpenGL raises any of these if a library is missing
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError) as error:
        problems.append(repr(error))
    if platform is None:
        cause = "; ".join(problems) or "no device found"
        raise RunError(
            f"cannot render because headless EGL does not start ({cause}); "
            f"on Debian or Ubuntu run: apt install {PACKAGES}"
        )
    try:
        yield platform
    finally:
        platform.delete_context()


def renderer_string() -> str:
    """Return vendor, renderer and version of the OpenGL in use.

    Images have the same bytes only on the same renderer.

    Raises:
        RunError: If no OpenGL context can be created.
    """
    with gl_context(1, 1):
        from OpenGL import GL

        return ", ".join(
            bytes(GL.glGetString(name) or b"").decode()
            for name in (GL.GL_VENDOR, GL.GL_RENDERER, GL.GL_VERSION)
        )


class Program:
    """A linked pair of shaders in the current context.

    Args:
        vertex: GLSL source of the vertex shader.
        fragment: GLSL source of the fragment shader.
    """

    def __init__(self, vertex: str, fragment: str):
        from OpenGL import GL
        from OpenGL.GL import shaders

        stages = [
            shaders.compileShader(vertex, GL.GL_VERTEX_SHADER),
            shaders.compileShader(fragment, GL.GL_FRAGMENT_SHADER),
        ]
        # PyOpenGL validates the program when it links it, which requires a bound vertex array
        vertex_array = GL.glGenVertexArrays(1)
        GL.glBindVertexArray(vertex_array)
        self.id = int(shaders.compileProgram(*stages))
        GL.glBindVertexArray(0)
        GL.glDeleteVertexArrays(1, [vertex_array])
        self._locations: dict[str, int] = {}

    def location(self, name: str) -> int:
        """Return the location of a uniform. It is -1, which OpenGL ignores, if there is none."""
        from OpenGL import GL

        if name not in self._locations:
            self._locations[name] = GL.glGetUniformLocation(self.id, name)
        return self._locations[name]


@dataclass(frozen=True, kw_only=True)
class _UploadedCall:
    """A draw call whose arrays and texture are on the GPU."""

    call: DrawCall
    primitive: Any  # pyrender.Primitive
    texture: Any  # pyrender.Texture or None
    emissive_texture: Any  # pyrender.Texture or None

    def variant(self, keep: str) -> ShaderVariant:
        """Return the shaders that draw the call and keep some fragments."""
        emission = "NONE"
        if self.call.emission is not None:
            emission = "FACTOR" if self.emissive_texture is None else "TEXTURE"
        return ShaderVariant(
            keep=keep,
            textured=self.texture is not None,
            emission=emission,
            per_vertex=self.call.per_vertex,
            unlit=self.call.unlit,
        )

    def sort_faces(self, direction: NDArray[np.float64]) -> None:
        """Sort the faces from far to near for an eye in a direction [3]. Blending requires it."""
        from OpenGL import GL

        depth = self.call.positions[self.call.faces].mean(axis=1) @ direction
        faces = self.call.faces[np.argsort(depth, kind="stable")].astype(np.uint32)
        self.primitive._bind()
        GL.glBindBuffer(GL.GL_ELEMENT_ARRAY_BUFFER, self.primitive._buffers[-1])
        GL.glBufferData(GL.GL_ELEMENT_ARRAY_BUFFER, faces.nbytes, faces, GL.GL_DYNAMIC_DRAW)
        self.primitive._unbind()


class MeshRenderer:
    """Renders one mesh into square images. Create it with `open_renderer`."""

    def __init__(self, mesh: Mesh, size: int):
        import pyrender

        self.size = size
        self._renderer = pyrender.Renderer(size, size)
        self._programs: dict[ShaderVariant, Program] = {}
        self._textures: dict[tuple[int, Sampler], Any] = {}
        self._calls = [self._upload(call) for call in draw_calls(mesh)]

    def _upload(self, call: DrawCall) -> _UploadedCall:
        import pyrender

        emissive = None if call.emission is None else call.emission.texture
        primitive: Any = pyrender.Primitive(
            positions=call.positions,
            normals=call.normals,
            tangents=call.surface,
            texcoord_0=call.uv,
            texcoord_1=None if emissive is None else call.emissive_uv,
            color_0=call.colors,
        )
        # pyrender's own setter converts to float32, which is wrong beyond 2**24 vertices
        primitive._indices = call.faces.astype(np.uint32)
        primitive._add_to_context()
        return _UploadedCall(
            call=call,
            primitive=primitive,
            texture=self._upload_texture(call.texture, call.sampler),
            emissive_texture=None
            if call.emission is None
            else self._upload_texture(emissive, call.emission.sampler),
        )

    def _upload_texture(self, image: NDArray[np.uint8] | None, sampler: Sampler) -> Any:
        """Return the pyrender.Texture of an image, None for None."""
        import pyrender
        from OpenGL import GL

        if image is None:
            return None
        key = id(image), sampler
        if key not in self._textures:
            wraps = {
                "repeat": GL.GL_REPEAT,
                "mirror": GL.GL_MIRRORED_REPEAT,
                "clamp": GL.GL_CLAMP_TO_EDGE,
            }
            texture = pyrender.Texture(
                source=image,
                source_channels="RGBA",
                sampler=pyrender.Sampler(
                    # None is pyrender's trilinear filter, which also smooths far texels.
                    magFilter=GL.GL_NEAREST if sampler.nearest else None,
                    wrapS=wraps[sampler.wrap_u],
                    wrapT=wraps[sampler.wrap_v],
                ),
            )
            texture._add_to_context()
            self._textures[key] = texture
        return self._textures[key]

    def _program(self, variant: ShaderVariant) -> Program:
        if variant not in self._programs:
            self._programs[variant] = Program(*shader_sources(variant))
        return self._programs[variant]

    def draw(self, camera: Camera, light: Lighting) -> NDArray[np.uint8]:
        """Render one image.

        Returns:
            uint8 [size, size, 4], row 0 at the top, colour premultiplied by alpha.
        """
        import pyrender
        from OpenGL import GL

        # clear the framebuffer
        self._renderer._configure_forward_pass_viewport(int(pyrender.RenderFlags.OFFSCREEN))
        GL.glEnable(GL.GL_MULTISAMPLE)
        GL.glDisable(GL.GL_CULL_FACE)
        GL.glClearColor(0, 0, 0, 0)
        GL.glClear(int(GL.GL_COLOR_BUFFER_BIT) | int(GL.GL_DEPTH_BUFFER_BIT))
        # opaque and masked calls
        towards_eye = camera.c2w[:3, 2]
        for item in self._calls:
            if item.call.alpha_mode != "BLEND":
                self._draw_call(item, item.call.alpha_mode, camera, light)
        # the nearly opaque parts of blended calls, which write depth
        blended = [item for item in self._calls if item.call.alpha_mode == "BLEND"]
        blended.sort(key=lambda item: float(item.call.positions.mean(axis=0) @ towards_eye))
        for item in blended:
            item.sort_faces(towards_eye)
            self._draw_call(item, "SOLID", camera, light)
        # their translucent parts, from far to near, which do not write depth
        GL.glDepthMask(GL.GL_FALSE)
        GL.glEnable(GL.GL_BLEND)
        GL.glBlendFunc(GL.GL_ONE, GL.GL_ONE_MINUS_SRC_ALPHA)
        for item in blended:
            self._draw_call(item, "BLEND", camera, light)
        GL.glDisable(GL.GL_BLEND)
        GL.glDepthMask(GL.GL_TRUE)
        return self._read()

    def _draw_call(self, item: _UploadedCall, keep: str, camera: Camera, light: Lighting) -> None:
        import pyrender
        from OpenGL import GL

        # projection
        near, far = (camera.distance - RADIUS) / 2, camera.distance + 10
        fov = float(np.radians(camera.fov_degrees))
        lens = pyrender.PerspectiveCamera(
            yfov=fov, znear=near, zfar=far, aspectRatio=1.0
        ).get_projection_matrix()
        world_to_clip = (lens @ np.linalg.inv(camera.c2w)).astype(np.float32)
        # uniforms
        program = self._program(item.variant(keep))
        GL.glUseProgram(program.id)
        GL.glUniformMatrix4fv(program.location("world_to_clip"), 1, GL.GL_TRUE, world_to_clip)
        GL.glUniform3f(program.location("eye"), *camera.c2w[:3, 3])
        GL.glUniform3f(program.location("sky"), *light.sky)
        GL.glUniform3f(program.location("ground"), *light.ground)
        count = len(light.directions)
        GL.glUniform1i(program.location("light_count"), count)
        GL.glUniform3fv(program.location("light_direction"), count, light.directions)
        GL.glUniform3fv(program.location("light_color"), count, light.colors)
        GL.glUniform1f(program.location("cutoff"), item.call.alpha_cutoff)
        if item.call.emission is not None:
            GL.glUniform3f(program.location("emission"), *item.call.emission.color)
        # draw
        if item.emissive_texture is not None:
            GL.glUniform1i(program.location("emissive_color"), 1)
            GL.glActiveTexture(GL.GL_TEXTURE1)
            item.emissive_texture._bind()
        if item.texture is not None:
            GL.glActiveTexture(GL.GL_TEXTURE0)
            item.texture._bind()
        item.primitive._bind()
        GL.glDrawElements(GL.GL_TRIANGLES, item.call.faces.size, GL.GL_UNSIGNED_INT, None)
        item.primitive._unbind()

    def _read(self) -> NDArray[np.uint8]:
        from OpenGL import GL

        # average the samples of each pixel, then copy to main memory
        size, renderer = self.size, self._renderer
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, renderer._main_fb_ms)
        GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, renderer._main_fb)
        GL.glBlitFramebuffer(
            0, 0, size, size, 0, 0, size, size, GL.GL_COLOR_BUFFER_BIT, GL.GL_NEAREST
        )
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, renderer._main_fb)
        rgba = np.empty((size, size, 4), np.uint8)
        GL.glReadPixels(0, 0, size, size, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, rgba)
        # 2 of 4 samples are 127.5. NVIDIA rounds down and Mesa up, and masks cut there.
        alpha = rgba[..., 3]
        alpha[alpha == 127] = 128
        return rgba[::-1]

    def close(self) -> None:
        """Free the resources in the context. Call this before the context is deleted."""
        from OpenGL import GL

        for item in self._calls:
            item.primitive.delete()
        for texture in self._textures.values():
            texture.delete()
        for program in self._programs.values():
            GL.glDeleteProgram(program.id)
        self._renderer.delete()


@contextmanager
def open_renderer(mesh: Mesh, size: int) -> Iterator[MeshRenderer]:
    """Create a renderer in its own OpenGL context. Both are freed at the end of the block.

    Args:
        mesh: The mesh to render.
        size: Width and height of the images in pixels.

    Raises:
        RunError: If no OpenGL context can be created.
    """
    with gl_context(size, size):
        renderer = MeshRenderer(mesh, size)
        try:
            yield renderer
        finally:
            renderer.close()
