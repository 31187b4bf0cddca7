"""Renders one mesh with OpenGL, without a screen, on a GPU or with Mesa's software renderer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import RADIUS, Camera
from pipeline.core.schema import MAP_NAMES, Mesh, Sampler
from pipeline.rendering.draw_calls import DrawCall, draw_calls
from pipeline.rendering.gl_context import gl_context
from pipeline.rendering.prefilter import (
    EnvironmentLight,
    PreparedEnvironment,
    reflected_shares,
)
from pipeline.rendering.shading import Lighting, ShaderVariant, shader_sources
from pipeline.rendering.sky_visibility import (
    DEPTH_SIDE,
    DIRECTIONS,
    DepthMaps,
    SkyVisibility,
    light_frames,
    light_from,
    split_at_shadows,
)
from pipeline.rendering.surface_shaders import SurfaceVariant, surface_shader_sources

if TYPE_CHECKING:
    import moderngl

SAMPLES = 4  # per pixel
MIN_NEAR = 1e-3  # smallest distance of the near plane from the eye
FIRST_LIGHT_UNIT = 8  # texture units below it are for the textures of a draw call
GL_SRGB8_ALPHA8 = 0x8C43

# Attribute of the shaders -> its format in a vertex buffer.
FORMATS = {
    "position": "3f",
    "normal": "3f",
    "surface": "4f",
    "uv": "2f",
    "emissive_uv": "2f",
    **{f"{name}_uv": "2f" for name in MAP_NAMES},
    "color": "4f",
    "front_share": "4f1",
    "back_share": "4f1",
}

AnyVariant = ShaderVariant | SurfaceVariant


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
        arrays = {
            "position": call.positions,
            "normal": call.normals,
            "surface": call.surface,
            "uv": call.uv * mirror_scale(call.sampler),
            "color": call.colors,
        }
        if call.emission is not None:
            arrays["emissive_uv"] = call.emissive_uv * mirror_scale(call.emission.sampler)
        for name, texture in call.maps.items():
            arrays[f"{name}_uv"] = texture.uv * mirror_scale(texture.surface_map.sampler)
        self._buffers = {
            name: context.buffer(np.ascontiguousarray(array)) for name, array in arrays.items()
        }
        self._indices = context.buffer(call.faces.astype(np.uint32))
        self._arrays: dict[int, moderngl.VertexArray] = {}  # by program

    def lamp_variant(self, keep: str) -> ShaderVariant:
        """Return the shaders that draw the call in the light of lamps and keep some fragments."""
        return ShaderVariant(
            keep=keep,
            textured=self.call.texture is not None,
            emission=self._emission,
            per_vertex=self.call.per_vertex,
            unlit=self.call.unlit,
        )

    def surface_variant(self, keep: str, output: str) -> SurfaceVariant:
        """Return the shaders of an output that draw the call and keep some fragments."""
        is_lit = output in ("PICTURE", "RADIANCE")
        if output in ("NORMAL", "DEPTH"):
            # one surface for each pixel: the nearest one that hides half of what is behind it
            keep = {"SOLID": "MASK"}.get(keep, keep)
        return SurfaceVariant(
            output=output,
            keep=keep,
            textured=self.call.texture is not None,
            emission=self._emission if is_lit else "NONE",
            maps=() if output == "DEPTH" else tuple(sorted(self.call.maps)),
            per_vertex=self.call.per_vertex and is_lit,
            unlit=self.call.unlit and is_lit,
        )

    @property
    def _emission(self) -> str:
        if self.call.emission is None:
            return "NONE"
        return "FACTOR" if self.call.emission.texture is None else "TEXTURE"

    def set_shares(self, shares: NDArray[np.uint8]) -> None:
        """Set which share of the light arrives at the vertices, uint8 [N, 2, 4]."""
        for side, name in enumerate(("front_share", "back_share")):
            data = np.ascontiguousarray(shares[:, side])
            if name in self._buffers:
                self._buffers[name].write(data)
            else:
                self._buffers[name] = self._context.buffer(data)

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
                (buffer, FORMATS[name], name)
                for name, buffer in self._buffers.items()
                if name in program  # a compiler leaves out what has no effect
            ]
            self._arrays[program.glo] = self._context.vertex_array(program, content, self._indices)
        self._arrays[program.glo].render()


def set_uniform(program: moderngl.Program, name: str, value: Any) -> None:
    """Set a uniform to an array of its type. A name that the program does not use is ignored."""
    if name in program:
        member: Any = program[name]
        member.write(np.ascontiguousarray(value).tobytes())


class MeshRenderer:
    """Renders one mesh into square images. Create it with `open_renderer`.

    Args:
        context: The current context.
        mesh: The mesh.
        size: Width and height of the images in pixels.
        with_maps: Whether the maps of the materials are used. Lamps ignore them.
        with_shadows: Whether faces are split so that `draw_environment` has soft shadows.
    """

    def __init__(
        self,
        context: moderngl.Context,
        mesh: Mesh,
        size: int,
        *,
        with_maps: bool = False,
        with_shadows: bool = False,
    ):
        self.size = size
        self._context = context
        self._programs: dict[AnyVariant, moderngl.Program] = {}
        self._textures: dict[tuple[int, Sampler, bool], moderngl.Texture] = {}
        self._targets: dict[str, Target] = {}
        self._linear = with_maps  # sRGB texels are decoded by the texture unit, not by the shader
        self._calls = [self._upload(call) for call in draw_calls(mesh, with_maps=with_maps)]
        self._visibility: SkyVisibility | None = None
        if with_shadows:
            radius = float(np.linalg.norm(mesh.vertices, axis=1).max(initial=0.0)) + 1e-3
            maps = self._draw_depth_maps(radius)
            calls = split_at_shadows([item.call for item in self._calls], maps)
            self._visibility = SkyVisibility(calls, maps)
            self._calls = [self._upload(call) for call in calls]
        self._environments: dict[str, UploadedEnvironment] = {}
        self._lit_by: tuple[str, float] | None = None  # the environment of the vertices' shares

    def _upload(self, call: DrawCall) -> UploadedCall:
        textures = {}
        if call.texture is not None:
            textures["base_color"] = self._upload_texture(call.texture, call.sampler, self._linear)
        emitted = None if call.emission is None else call.emission.texture
        if call.emission is not None and emitted is not None:
            textures["emissive_color"] = self._upload_texture(
                emitted, call.emission.sampler, self._linear
            )
        for name, texture in call.maps.items():
            surface_map = texture.surface_map
            textures[f"{name}_map"] = self._upload_texture(
                surface_map.values, surface_map.sampler, False
            )
        return UploadedCall(self._context, call, textures)

    def _upload_texture(
        self, image: NDArray[np.uint8], sampler: Sampler, srgb: bool
    ) -> moderngl.Texture:
        key = id(image), sampler, srgb
        if key not in self._textures:
            self._textures[key] = upload_texture(self._context, image, sampler, srgb=srgb)
        return self._textures[key]

    def _program(self, variant: AnyVariant) -> moderngl.Program:
        if variant not in self._programs:
            if isinstance(variant, ShaderVariant):
                vertex, fragment = shader_sources(variant)
            else:
                vertex, fragment = surface_shader_sources(variant)
            self._programs[variant] = self._context.program(
                vertex_shader=vertex, fragment_shader=fragment
            )
        return self._programs[variant]

    def draw(self, camera: Camera, light: Lighting) -> NDArray[np.uint8]:
        """Render one image in the light of lamps.

        Returns:
            uint8 [size, size, 4], row 0 at the top, colour premultiplied by alpha.
        """

        def draw_call(item: UploadedCall, keep: str) -> None:
            program = self._program(item.lamp_variant(keep))
            set_uniform(program, "sky", light.sky)
            set_uniform(program, "ground", light.ground)
            count = len(light.directions)
            set_uniform(program, "light_count", np.int32(count))
            directions, colors = np.zeros((2, 3, 3), np.float32)
            directions[:count], colors[:count] = light.directions, light.colors
            set_uniform(program, "light_direction", directions)
            set_uniform(program, "light_color", colors)
            self._draw_call(item, program, camera)

        target = self._target("f1")
        self._draw_all(target.samples, camera, draw_call)
        return with_even_half(target.read())

    def draw_environment(
        self, camera: Camera, light: EnvironmentLight, *, radiance: bool = False
    ) -> NDArray[Any]:
        """Render one image in the light of an environment.

        Args:
            camera: The camera.
            light: The environment and how it is turned.
            radiance: Whether the linear radiance is returned instead of the picture.

        Returns:
            uint8 [size, size, 4], row 0 at the top, colour premultiplied by alpha. float32 for
            radiance.
        """
        uploaded = self._environments.get(light.environment.name)
        if uploaded is None:
            uploaded = UploadedEnvironment(self._context, light.environment)
            self._environments[light.environment.name] = uploaded
        self._light_vertices(light)
        uploaded.use()
        output = "RADIANCE" if radiance else "PICTURE"

        def draw_call(item: UploadedCall, keep: str) -> None:
            program = self._program(item.surface_variant(keep, output))
            uploaded.set_uniforms(program, light.yaw)
            self._draw_call(item, program, camera)

        target = self._target("f4" if radiance else "f1")
        self._draw_all(target.samples, camera, draw_call)
        return target.read() if radiance else with_even_half(target.read())

    def draw_property(
        self, camera: Camera, output: Literal["ALBEDO", "MATERIAL"]
    ) -> NDArray[np.uint8]:
        """Render a property of the surface, with the edges of a picture.

        Args:
            camera: The camera.
            output: "ALBEDO" is the base colour in sRGB. "MATERIAL" has the roughness in green and
                metallic in blue, both linear.

        Returns:
            uint8 [size, size, 4], row 0 at the top, premultiplied by alpha.
        """

        def draw_call(item: UploadedCall, keep: str) -> None:
            self._draw_call(item, self._program(item.surface_variant(keep, output)), camera)

        target = self._target("f1")
        self._draw_all(target.samples, camera, draw_call)
        return with_even_half(target.read())

    def draw_normals_and_depth(
        self, camera: Camera
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Render what lies at the centre of each pixel.

        Surfaces with alpha below a half are left out.

        Returns:
            normals: float32 [size, size, 3], unit normals in world coordinates towards the camera,
                with those of normal maps. 0 where there is nothing.
            depth: float32 [size, size], distance along the camera's axis. 0 where there is nothing.
        """
        plane = np.append(-camera.c2w[:3, 2], camera.c2w[:3, 2] @ camera.c2w[:3, 3])

        def draw_call(item: UploadedCall, keep: str) -> None:
            if keep == "BLEND":
                return
            program = self._program(item.surface_variant(keep, "NORMAL"))
            set_uniform(program, "depth_plane", plane.astype(np.float32))
            self._draw_call(item, program, camera, cutoff=0.5 if keep == "SOLID" else None)

        target = self._target("single")
        self._draw_all(target.samples, camera, draw_call)
        pixels = target.read()
        return np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3])

    def _light_vertices(self, light: EnvironmentLight) -> None:
        """Set the shares of the light that arrive at all vertices."""
        key = light.environment.name, light.yaw
        if self._lit_by == key:
            return
        if self._visibility is None:
            raise ValueError("with_shadows must be True to draw in the light of an environment")
        shares = self._visibility.shares(light_from(light.environment.coarse, light.yaw))
        for item, of_call in zip(self._calls, shares, strict=True):
            item.set_shares(of_call)
        self._lit_by = key

    def _draw_depth_maps(self, radius: float) -> DepthMaps:
        """Draw the depth of the mesh from all light directions."""
        side = (DEPTH_SIDE, DEPTH_SIDE)
        buffer = self._context.framebuffer(depth_attachment=self._context.depth_texture(side))
        depth = np.empty(side, np.float32)
        maps = np.empty((DIRECTIONS, *side), np.uint16)
        buffer.use()
        buffer.depth_mask = True
        self._context.enable_only(self._context.DEPTH_TEST)
        for number in range(DIRECTIONS):
            # a box around the origin, whose near end is at the light
            matrix = np.eye(4, dtype=np.float32)
            matrix[:3, :3] = light_frames()[number] / radius
            matrix[2] *= -1
            buffer.clear(depth=1.0)
            for item in self._calls:
                keep = {"BLEND": "MASK"}.get(item.call.alpha_mode, item.call.alpha_mode)
                cutoff = 0.5 if item.call.alpha_mode == "BLEND" else item.call.alpha_cutoff
                program = self._program(item.surface_variant(keep, "DEPTH"))
                set_uniform(program, "world_to_clip", matrix.T)
                set_uniform(program, "cutoff", np.float32(cutoff))
                item.draw(program)
            buffer.read_into(depth, attachment=-1, dtype="f4", alignment=1)
            maps[number] = depth * np.float32(65535) + np.float32(0.5)
        buffer.release()
        return DepthMaps(depth=maps, radius=radius)

    def _draw_all(
        self,
        framebuffer: moderngl.Framebuffer,
        camera: Camera,
        draw_call: Callable[[UploadedCall, str], None],
    ) -> None:
        """Draw all calls, those with blending last.

        Args:
            framebuffer: Where to. It is cleared first.
            camera: The camera.
            draw_call: Draws a call and keeps some fragments, see KEEPS.
        """
        context = self._context
        framebuffer.use()
        framebuffer.depth_mask = True
        context.enable_only(context.DEPTH_TEST)
        framebuffer.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
        # opaque and masked calls
        towards_eye = camera.c2w[:3, 2]
        for item in self._calls:
            if item.call.alpha_mode != "BLEND":
                draw_call(item, item.call.alpha_mode)
        # the nearly opaque parts of blended calls, which write depth
        blended = [item for item in self._calls if item.call.alpha_mode == "BLEND"]
        blended.sort(key=lambda item: float(item.call.positions.mean(axis=0) @ towards_eye))
        for item in blended:
            item.sort_faces(towards_eye)
            draw_call(item, "SOLID")
        # their translucent parts, from far to near, which do not write depth
        framebuffer.depth_mask = False
        context.enable(context.BLEND)
        context.blend_func = context.ONE, context.ONE_MINUS_SRC_ALPHA
        for item in blended:
            draw_call(item, "BLEND")
        context.disable(context.BLEND)
        framebuffer.depth_mask = True

    def _draw_call(
        self,
        item: UploadedCall,
        program: moderngl.Program,
        camera: Camera,
        cutoff: float | None = None,
    ) -> None:
        set_uniform(program, "world_to_clip", world_to_clip(camera).T)  # OpenGL wants columns
        set_uniform(program, "eye", camera.c2w[:3, 3].astype(np.float32))
        set_uniform(program, "backwards", camera.c2w[:3, 2].astype(np.float32))
        set_uniform(program, "orthographic", np.int32(camera.is_orthographic))
        cutoff = item.call.alpha_cutoff if cutoff is None else cutoff
        set_uniform(program, "cutoff", np.float32(cutoff))
        set_uniform(program, "normal_scale", np.float32(item.call.normal_scale))
        if item.call.emission is not None:
            set_uniform(program, "emission", np.array(item.call.emission.color, np.float32))
        item.draw(program)

    def _target(self, kind: str) -> Target:
        if kind not in self._targets:
            samples = 0 if kind == "single" else SAMPLES
            dtype = "f4" if kind == "single" else kind
            self._targets[kind] = Target(self._context, self.size, samples, dtype)
        return self._targets[kind]


class Target:
    """A framebuffer with several samples for each pixel, and one that takes their means.

    Args:
        context: The current context.
        size: Width and height in pixels.
        samples: Number of samples of a pixel. 0 has one at its centre.
        dtype: "f1" for 8 bits or "f4" for 32-bit floating point.
    """

    def __init__(self, context: moderngl.Context, size: int, samples: int, dtype: str):
        self._context = context
        self._dtype = dtype
        shape = (size, size)
        self.samples = context.framebuffer(
            context.renderbuffer(shape, 4, samples=samples, dtype=dtype),
            context.depth_renderbuffer(shape, samples=samples),
        )
        self._resolved = self.samples
        if samples:
            self._resolved = context.framebuffer(context.renderbuffer(shape, 4, dtype=dtype))

    def read(self) -> NDArray[Any]:
        """Average the samples and copy the image to main memory, row 0 at the top."""
        if self._resolved is not self.samples:
            self._context.copy_framebuffer(self._resolved, self.samples)
        return read_pixels(self._resolved, self._dtype)[::-1]


class UploadedEnvironment:
    """An environment on the GPU: its panorama at all roughnesses, and its matte light."""

    def __init__(self, context: moderngl.Context, prepared: PreparedEnvironment):
        layers, height, width, channels = prepared.mirrors.shape
        self._panorama = context.texture3d(
            (width, height, layers), channels, prepared.mirrors, dtype="f2"
        )
        self._panorama.filter = context.LINEAR, context.LINEAR
        self._panorama.repeat_x = True
        self._panorama.repeat_y = self._panorama.repeat_z = False
        table = reflected_shares()
        self._shares = context.texture(table.shape[:2], 2, table, dtype="f4")
        self._shares.filter = context.LINEAR, context.LINEAR
        self._shares.repeat_x = self._shares.repeat_y = False
        self._matte = prepared.matte

    def use(self) -> None:
        """Bind the textures to units that draw calls do not use."""
        self._panorama.use(FIRST_LIGHT_UNIT)
        self._shares.use(FIRST_LIGHT_UNIT + 1)

    def set_uniforms(self, program: moderngl.Program, yaw: float) -> None:
        """Set the uniforms of the light for an environment that is turned by `yaw` radians."""
        set_uniform(program, "panorama", np.int32(FIRST_LIGHT_UNIT))
        set_uniform(program, "shares", np.int32(FIRST_LIGHT_UNIT + 1))
        set_uniform(program, "matte", self._matte)
        # the shader turns directions back into the environment's own frame
        set_uniform(program, "turn", np.array([np.cos(yaw), np.sin(yaw)], np.float32))


def with_even_half(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Set an alpha of 127 to 128.

    2 of 4 samples are 127.5. NVIDIA rounds down and Mesa up, and masks cut there.
    """
    alpha = rgba[..., 3]
    alpha[alpha == 127] = 128
    return rgba


def world_to_clip(camera: Camera) -> NDArray[np.float32]:
    """Return the matrix [4, 4] from world coordinates to OpenGL's clip coordinates."""
    near, far = (camera.distance - RADIUS) / 2, camera.distance + 10
    if camera.is_orthographic:
        scale = 2 / camera.ortho_scale
        lens = np.diag([scale, scale, 2 / (near - far), 1.0])
        lens[2, 3] = (far + near) / (near - far)
        return (lens @ np.linalg.inv(camera.c2w)).astype(np.float32)
    near = max(near, MIN_NEAR)
    scale = 1.0 / np.tan(float(np.radians(camera.fov_degrees)) / 2.0)
    lens = np.zeros((4, 4))
    lens[0, 0] = lens[1, 1] = scale
    lens[2, 2] = (far + near) / (near - far)
    lens[2, 3] = 2 * far * near / (near - far)
    lens[3, 2] = -1.0
    return (lens @ np.linalg.inv(camera.c2w)).astype(np.float32)


def upload_texture(
    context: moderngl.Context, image: NDArray[np.uint8], sampler: Sampler, *, srgb: bool
) -> moderngl.Texture:
    """Upload an image with mip levels.

    Args:
        context: The current context.
        image: uint8 [h, w] or [h, w, channels], row 0 at v = 1.
        sampler: How the texture is read. An axis that continues as a mirror image holds the image
            and its mirror image, and its coordinate is halved by `mirror_scale`, because moderngl
            does not mirror.
        srgb: Whether texels are sRGB with alpha that is decoded when it is read.
    """
    if image.ndim == 2:
        image = image[..., None]
    mirrored_u, mirrored_v = sampler.wrap_u == "mirror", sampler.wrap_v == "mirror"
    image = image[::-1]
    if mirrored_u:
        image = np.concatenate([image, image[:, ::-1]], axis=1)
    if mirrored_v:
        image = np.concatenate([image, image[::-1]], axis=0)
    height, width, channels = image.shape
    texture = context.texture(
        (width, height),
        channels,
        np.ascontiguousarray(image),
        internal_format=GL_SRGB8_ALPHA8 if srgb else None,
    )
    texture.build_mipmaps()
    # far texels are smoothed in either case
    near_filter = context.NEAREST if sampler.nearest else context.LINEAR
    texture.filter = context.LINEAR_MIPMAP_LINEAR, near_filter
    texture.repeat_x, texture.repeat_y = sampler.wrap_u != "clamp", sampler.wrap_v != "clamp"
    return texture


def mirror_scale(sampler: Sampler) -> NDArray[np.float32]:
    """Return the factors [2] of texture coordinates for a texture of `upload_texture`."""
    scale = [0.5 if wrap == "mirror" else 1.0 for wrap in (sampler.wrap_u, sampler.wrap_v)]
    return np.array(scale, np.float32)


def read_pixels(framebuffer: moderngl.Framebuffer, dtype: str) -> NDArray[Any]:
    """Copy an image to main memory, [size, size, 4] of "f1" or "f4" with row 0 at the bottom."""
    shape = (framebuffer.height, framebuffer.width, 4)
    pixels = np.empty(shape, np.uint8 if dtype == "f1" else np.float32)
    framebuffer.read_into(pixels, components=4, alignment=1, dtype=dtype)
    return pixels


@contextmanager
def open_renderer(
    mesh: Mesh, size: int, *, with_maps: bool = False, with_shadows: bool = False
) -> Iterator[MeshRenderer]:
    """Create a renderer in its own OpenGL context. Both are freed at the end of the block.

    Args:
        mesh: The mesh to render.
        size: Width and height of the images in pixels.
        with_maps: See `MeshRenderer`.
        with_shadows: See `MeshRenderer`.

    Raises:
        RunError: If no OpenGL context can be created.
    """
    with gl_context() as context:
        yield MeshRenderer(context, mesh, size, with_maps=with_maps, with_shadows=with_shadows)
