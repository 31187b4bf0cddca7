"""Renders one mesh with OpenGL, without a screen, on a GPU or with Mesa's software renderer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import RADIUS, Camera
from pipeline.core.schema import Mesh, Sampler
from pipeline.rendering.draw_calls import DrawCall, draw_calls
from pipeline.rendering.gl_context import gl_context
from pipeline.rendering.shading import Lighting, ShaderVariant, shader_sources

if TYPE_CHECKING:
    import moderngl

SAMPLES = 4  # per pixel

# Array of a draw call -> its format in a vertex buffer and its name in the shaders.
ATTRIBUTES = {
    "positions": ("3f", "position"),
    "normals": ("3f", "normal"),
    "surface": ("4f", "surface"),
    "uv": ("2f", "uv"),
    "emissive_uv": ("2f", "emissive_uv"),
    "colors": ("4f", "color"),
}


class UploadedCall:
    """A draw call whose arrays and textures are on the GPU.

    Args:
        context: The current context.
        call: The draw call.
        textures: Its textures by the names of the samplers that read them.
    """

    def __init__(
        self, context: moderngl.Context, call: DrawCall, textures: dict[str, moderngl.Texture]
    ):
        self.call = call
        self.textures = textures
        self._context = context
        arrays = {name: getattr(call, name) for name in ATTRIBUTES}
        arrays["uv"] = call.uv * mirror_scale(call.sampler)
        if call.emission is not None:
            arrays["emissive_uv"] = call.emissive_uv * mirror_scale(call.emission.sampler)
        self._buffers = {
            attribute: (context.buffer(np.ascontiguousarray(arrays[name])), format)
            for name, (format, attribute) in ATTRIBUTES.items()
        }
        self._indices = context.buffer(call.faces.astype(np.uint32))
        self._arrays: dict[int, moderngl.VertexArray] = {}  # by program

    def variant(self, keep: str) -> ShaderVariant:
        """Return the shaders that draw the call and keep some fragments."""
        emission = "NONE"
        if self.call.emission is not None:
            emission = "FACTOR" if self.call.emission.texture is None else "TEXTURE"
        return ShaderVariant(
            keep=keep,
            textured=self.call.texture is not None,
            emission=emission,
            per_vertex=self.call.per_vertex,
            unlit=self.call.unlit,
        )

    def sort_faces(self, direction: NDArray[np.float64]) -> None:
        """Sort the faces from far to near for an eye in a direction [3]. Blending requires it."""
        depth = self.call.positions[self.call.faces].mean(axis=1) @ direction
        faces = self.call.faces[np.argsort(depth, kind="stable")]
        self._indices.write(faces.astype(np.uint32))

    def draw(self, program: moderngl.Program) -> None:
        """Draw all faces with a program whose uniforms are set."""
        for unit, (name, texture) in enumerate(self.textures.items()):
            if name in program:
                set_uniform(program, name, np.int32(unit))
                texture.use(unit)
        if program.glo not in self._arrays:
            content = [
                (buffer, format, attribute)
                for attribute, (buffer, format) in self._buffers.items()
                if attribute in program  # a compiler leaves out what has no effect
            ]
            self._arrays[program.glo] = self._context.vertex_array(program, content, self._indices)
        self._arrays[program.glo].render()


def set_uniform(program: moderngl.Program, name: str, value: Any) -> None:
    """Set a uniform to an array of its type. A name that the program does not use is ignored."""
    if name in program:
        member: Any = program[name]
        member.write(np.ascontiguousarray(value).tobytes())


class MeshRenderer:
    """Renders one mesh into square images. Create it with `open_renderer`."""

    def __init__(self, context: moderngl.Context, mesh: Mesh, size: int):
        self.size = size
        self._context = context
        self._programs: dict[ShaderVariant, moderngl.Program] = {}
        self._textures: dict[tuple[int, Sampler], moderngl.Texture] = {}
        shape = (size, size)
        self._samples = context.framebuffer(
            context.renderbuffer(shape, 4, samples=SAMPLES),
            context.depth_renderbuffer(shape, samples=SAMPLES),
        )
        self._resolved = context.framebuffer(context.renderbuffer(shape, 4))
        self._calls = [self._upload(call) for call in draw_calls(mesh)]

    def _upload(self, call: DrawCall) -> UploadedCall:
        textures = {}
        if call.texture is not None:
            textures["base_color"] = self._upload_texture(call.texture, call.sampler)
        if call.emission is not None and call.emission.texture is not None:
            textures["emissive_color"] = self._upload_texture(
                call.emission.texture, call.emission.sampler
            )
        return UploadedCall(self._context, call, textures)

    def _upload_texture(self, image: NDArray[np.uint8], sampler: Sampler) -> moderngl.Texture:
        """Return the texture of an image [h, w, 4], whose row 0 is at v = 1."""
        key = id(image), sampler
        if key not in self._textures:
            self._textures[key] = upload_texture(self._context, image, sampler)
        return self._textures[key]

    def _program(self, variant: ShaderVariant) -> moderngl.Program:
        if variant not in self._programs:
            vertex, fragment = shader_sources(variant)
            self._programs[variant] = self._context.program(
                vertex_shader=vertex, fragment_shader=fragment
            )
        return self._programs[variant]

    def draw(self, camera: Camera, light: Lighting) -> NDArray[np.uint8]:
        """Render one image.

        Returns:
            uint8 [size, size, 4], row 0 at the top, colour premultiplied by alpha.
        """
        context = self._context
        self._samples.use()
        self._samples.depth_mask = True
        context.enable_only(context.DEPTH_TEST)
        self._samples.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
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
        self._samples.depth_mask = False
        context.enable(context.BLEND)
        context.blend_func = context.ONE, context.ONE_MINUS_SRC_ALPHA
        for item in blended:
            self._draw_call(item, "BLEND", camera, light)
        context.disable(context.BLEND)
        self._samples.depth_mask = True
        # average the samples of each pixel, then copy to main memory
        context.copy_framebuffer(self._resolved, self._samples)
        rgba = read_pixels(self._resolved, self.size)
        # 2 of 4 samples are 127.5. NVIDIA rounds down and Mesa up, and masks cut there.
        alpha = rgba[..., 3]
        alpha[alpha == 127] = 128
        return rgba[::-1]

    def _draw_call(self, item: UploadedCall, keep: str, camera: Camera, light: Lighting) -> None:
        program = self._program(item.variant(keep))
        set_uniform(program, "world_to_clip", world_to_clip(camera).T)  # OpenGL wants columns
        set_uniform(program, "eye", camera.c2w[:3, 3].astype(np.float32))
        set_uniform(program, "sky", light.sky)
        set_uniform(program, "ground", light.ground)
        count = len(light.directions)
        set_uniform(program, "light_count", np.int32(count))
        directions, colors = np.zeros((2, 3, 3), np.float32)
        directions[:count], colors[:count] = light.directions, light.colors
        set_uniform(program, "light_direction", directions)
        set_uniform(program, "light_color", colors)
        set_uniform(program, "cutoff", np.float32(item.call.alpha_cutoff))
        if item.call.emission is not None:
            set_uniform(program, "emission", np.float32(item.call.emission.color))
        item.draw(program)


def world_to_clip(camera: Camera) -> NDArray[np.float32]:
    """Return the matrix [4, 4] from world coordinates to OpenGL's clip coordinates."""
    near, far = (camera.distance - RADIUS) / 2, camera.distance + 10
    scale = 1.0 / np.tan(float(np.radians(camera.fov_degrees)) / 2.0)
    lens = np.zeros((4, 4))
    lens[0, 0] = lens[1, 1] = scale
    lens[2, 2] = (far + near) / (near - far)
    lens[2, 3] = 2 * far * near / (near - far)
    lens[3, 2] = -1.0
    return (lens @ np.linalg.inv(camera.c2w)).astype(np.float32)


def upload_texture(
    context: moderngl.Context, image: NDArray[np.uint8], sampler: Sampler
) -> moderngl.Texture:
    """Upload an image with mip levels.

    Args:
        context: The current context.
        image: uint8 [h, w, channels], row 0 at v = 1.
        sampler: How the texture is read. An axis that continues as a mirror image holds the image
            and its mirror image, and its coordinate is halved by `mirror_scale`, because moderngl
            does not mirror.
    """
    mirrored_u, mirrored_v = sampler.wrap_u == "mirror", sampler.wrap_v == "mirror"
    image = image[::-1]
    if mirrored_u:
        image = np.concatenate([image, image[:, ::-1]], axis=1)
    if mirrored_v:
        image = np.concatenate([image, image[::-1]], axis=0)
    height, width, channels = image.shape
    texture = context.texture((width, height), channels, np.ascontiguousarray(image))
    texture.build_mipmaps()
    # far texels are smoothed in either case
    near_filter = context.NEAREST if sampler.nearest else context.LINEAR
    texture.filter = context.LINEAR_MIPMAP_LINEAR, near_filter
    texture.repeat_x, texture.repeat_y = sampler.wrap_u != "clamp", sampler.wrap_v != "clamp"
    return texture


def mirror_scale(sampler: Sampler) -> NDArray[np.float32]:
    """Return the factors [2] of texture coordinates for a texture of `upload_texture`."""
    return np.float32([0.5 if wrap == "mirror" else 1 for wrap in (sampler.wrap_u, sampler.wrap_v)])


def read_pixels(framebuffer: moderngl.Framebuffer, size: int) -> NDArray[np.uint8]:
    """Copy an image to main memory, uint8 [size, size, 4] with row 0 at the bottom."""
    rgba = np.empty((size, size, 4), np.uint8)
    framebuffer.read_into(rgba, components=4, alignment=1)
    return rgba


@contextmanager
def open_renderer(mesh: Mesh, size: int) -> Iterator[MeshRenderer]:
    """Create a renderer in its own OpenGL context. Both are freed at the end of the block.

    Args:
        mesh: The mesh to render.
        size: Width and height of the images in pixels.

    Raises:
        RunError: If no OpenGL context can be created.
    """
    with gl_context() as context:
        yield MeshRenderer(context, mesh, size)
