"""Lighting of a mesh: seeded lights, vertex normals that keep creases sharp, and the shaders."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import Camera
from pipeline.core.color import srgb_to_linear
from pipeline.core.hashing import seed_of

MAX_LIGHTS = 3
CREASE_DEGREES = 40.0  # faces that meet at a larger angle have a sharp edge between them
MAX_FAN = 64  # largest number of corners at one vertex that are compared in pairs

# The shaders write premultiplied colour, so that blending and the average over the samples of a
# pixel weight it by coverage. PER_VERTEX lights small faces at their vertices, because Mesa's
# software renderer shades 4x4 pixels for every face that touches one of them.
_LIGHT = """
uniform vec3 eye;
uniform vec3 sky;
uniform vec3 ground;
uniform int light_count;
uniform vec3 light_direction[3];  // towards the light
uniform vec3 light_color[3];

float pow5(float x) { return x * x * x * x * x; }

// The light that leaves a surface of colour c is c * tinted + plain. A sky above and a ground below
// represent the surroundings, which metals mirror.
void shine(vec3 at, vec3 n, vec2 finish, out vec3 tinted, out vec3 plain) {
    vec3 view = normalize(eye - at);
    float metallic = finish.x;
    // lights are points, so a smaller roughness would give highlights of single pixels
    float rough = clamp(finish.y, 0.25, 1.0);
    float nv = max(dot(n, view), 1e-3);
    float blur = mix(0.3, 1.0, rough);
    float up = smoothstep(-blur, blur, reflect(-view, n).y);
    vec3 mirrored = mix(ground, sky, up) * (1.0 + 0.6 * metallic);
    float rim = (1.0 - rough) * pow5(1.0 - nv);
    vec3 diffuse = mix(ground, sky, 0.5 + 0.5 * n.y);
    vec3 specular = mirrored * (1.0 - rim);
    plain = mirrored * rim;
    float a2 = rough * rough * rough * rough;
    for (int i = 0; i < light_count; i++) {
        vec3 l = light_direction[i];
        float nl = max(dot(n, l), 0.0);
        vec3 h = normalize(l + view);
        float nh = max(dot(n, h), 0.0);
        float lobe = nh * nh * (a2 - 1.0) + 1.0;
        float masking = mix(2.0 * nl * nv, nl + nv, rough * rough);
        float gloss = nl * a2 * 0.5 / (lobe * lobe * masking + 1e-6);
        float edge = pow5(1.0 - max(dot(h, view), 0.0));
        diffuse += light_color[i] * nl;
        specular += light_color[i] * gloss * (1.0 - edge);
        plain += light_color[i] * gloss * edge;
    }
    tinted = mix(diffuse, specular, metallic);
    plain += 0.04 * (1.0 - metallic) * specular;
}
"""

_VERTEX = """
in vec3 position;
in vec3 normal;
in vec4 surface;  // metallic, roughness
in vec2 uv;
in vec2 emissive_uv;
in vec4 color;  // linear
uniform mat4 world_to_clip;
out vec4 tint;
#if EMISSION == EMISSION_TEXTURE
out vec2 emissive_texel;
#endif
#if TEXTURED
out vec2 texel;
#endif
#if PER_VERTEX
out vec3 front_plain, back_plain;
#if TEXTURED
out vec3 front_tinted, back_tinted;
#endif
#else
out vec3 at, shading_normal;
out vec2 finish;
#endif

void main() {
    gl_Position = world_to_clip * vec4(position, 1.0);
    tint = color;
#if TEXTURED
    texel = uv;
#endif
#if EMISSION == EMISSION_TEXTURE
    emissive_texel = emissive_uv;
#endif
#if PER_VERTEX
#if !TEXTURED
    vec3 front_tinted, back_tinted;
#endif
    shine(position, normal, surface.xy, front_tinted, front_plain);
    shine(position, -normal, surface.xy, back_tinted, back_plain);
#if !TEXTURED
    front_plain += color.rgb * front_tinted;
    back_plain += color.rgb * back_tinted;
#endif
#else
    at = position;
    shading_normal = normal;
    finish = surface.xy;
#endif
}
"""

_FRAGMENT = """
uniform sampler2D base_color;
uniform float cutoff;
in vec4 tint;
#if TEXTURED
in vec2 texel;
#endif
#if EMISSION != EMISSION_NONE
uniform vec3 emission;
#endif
#if EMISSION == EMISSION_TEXTURE
uniform sampler2D emissive_color;
in vec2 emissive_texel;
#endif
#if PER_VERTEX
in vec3 front_plain, back_plain;
#if TEXTURED
in vec3 front_tinted, back_tinted;
#endif
#else
in vec3 at, shading_normal;
in vec2 finish;
#endif
out vec4 pixel;

// sRGB to linear, with an error of at most 0.002
vec3 to_linear(vec3 c) { return c * (c * (c * 0.305306011 + 0.682171111) + 0.012522878); }

// linear to sRGB, with an error of at most 0.003
vec3 to_srgb(vec3 c) {
    vec3 a = sqrt(c), b = sqrt(a), d = sqrt(b);
    return 0.662002687 * a + 0.684122060 * b - 0.323583601 * d - 0.0225411470 * c;
}

void main() {
    vec4 base = tint;
#if TEXTURED
    vec4 image = texture(base_color, texel);
    base *= vec4(to_linear(image.rgb), image.a);
#endif
#if KEEP == KEEP_MASK
    if (base.a < cutoff) discard;
#elif KEEP == KEEP_SOLID
    if (base.a < 0.996) discard;
#elif KEEP == KEEP_BLEND
    if (base.a >= 0.996) discard;
#endif
#if UNLIT
    vec3 color = clamp(to_srgb(base.rgb), 0.0, 1.0);
#else
    // the side that the camera sees is lit
    vec3 tinted = vec3(0.0), plain;
#if PER_VERTEX
    plain = gl_FrontFacing ? front_plain : back_plain;
#if TEXTURED
    tinted = gl_FrontFacing ? front_tinted : back_tinted;
#endif
#else
    shine(at, normalize(shading_normal) * (gl_FrontFacing ? 1.0 : -1.0), finish, tinted, plain);
#endif
    vec3 color = base.rgb * tinted + plain;
#if EMISSION == EMISSION_TEXTURE
    color += emission * to_linear(texture(emissive_color, emissive_texel).rgb);
#elif EMISSION == EMISSION_FACTOR
    color += emission;
#endif
    // compress bright colours smoothly instead of clipping them
    vec3 over = max(color - 0.7, 0.0);
    color = clamp(to_srgb(min(color, 0.7) + over / (1.0 + over / 0.3)), 0.0, 1.0);
#endif
#if KEEP == KEEP_BLEND
    pixel = vec4(color * base.a, base.a);
#else
    pixel = vec4(color, 1.0);
#endif
}
"""

# Which fragments a shader keeps: all, those with alpha >= cutoff, those that are nearly opaque, and
# the others, which are blended.
KEEPS = ("OPAQUE", "MASK", "SOLID", "BLEND")
# What a surface emits: nothing, one colour, or the colours of a texture.
EMISSIONS = ("NONE", "FACTOR", "TEXTURE")


@dataclass(frozen=True, kw_only=True)
class ShaderVariant:
    """One variant of the shaders.

    There are variants because Mesa's software renderer runs both sides of every `if`.

    Attributes:
        keep: One of KEEPS.
        textured: Whether the draw call has a texture.
        emission: One of EMISSIONS.
        per_vertex: Whether the light is computed at the vertices.
        unlit: Whether the base colour is drawn as it is.
    """

    keep: str
    textured: bool
    emission: str = "NONE"
    per_vertex: bool = False
    unlit: bool = False


def shader_sources(variant: ShaderVariant) -> tuple[str, str]:
    """Return the GLSL sources of one variant of the shaders.

    Returns:
        vertex: Source of the vertex shader.
        fragment: Source of the fragment shader.
    """
    definitions = {
        **{f"KEEP_{name}": number for number, name in enumerate(KEEPS)},
        **{f"EMISSION_{name}": number for number, name in enumerate(EMISSIONS)},
        "KEEP": KEEPS.index(variant.keep),
        "EMISSION": EMISSIONS.index(variant.emission),
        "TEXTURED": int(variant.textured),
        "PER_VERTEX": int(variant.per_vertex),
        "UNLIT": int(variant.unlit),
    }
    head = "#version 330 core\n"
    head += "".join(f"#define {name} {value}\n" for name, value in definitions.items())
    if variant.per_vertex:
        return head + _LIGHT + _VERTEX, head + _FRAGMENT
    return head + _VERTEX, head + _LIGHT + _FRAGMENT


@dataclass(frozen=True, kw_only=True)
class Lighting:
    """The lights of one view, in linear RGB. Light of intensity 1 makes a white surface white."""

    sky: NDArray[np.float32]  # [3] ambient from above
    ground: NDArray[np.float32]  # [3] ambient from below
    directions: NDArray[np.float32]  # [L, 3] unit, towards the light, world frame; L = 1..3
    colors: NDArray[np.float32]  # [L, 3]


def sample_lighting(uid: str, view: int, camera: Camera, attempt: int = 0) -> Lighting:
    """Sample ambient light and 1 to 3 directional lights. The first comes from the camera's side.

    Args:
        uid: The asset. It defines the seed together with the view.
        view: Number of the view.
        camera: The lights are placed relative to it.
        attempt: Number of the attempt to render the view.
    """
    draw = np.random.Generator(np.random.PCG64(seed_of(uid, "lights", view, attempt)))
    count = int(draw.integers(1, MAX_LIGHTS + 1))
    yaw, pitch, level, warmth = draw.random((4, count))
    ambient = draw.random(2)
    # The first light is beside the camera, so that shading shows the shape. The others come from
    # all around.
    yaw, pitch, level = -180 + 360 * yaw, -20 + 80 * pitch, 0.05 + 0.20 * level
    yaw[0] = (20 + 55 * abs(yaw[0]) / 180) * (1 if yaw[0] > 0 else -1)
    pitch[0], level[0] = 10 + 45 * (pitch[0] + 20) / 80, 0.50 + level[0]
    yaw, pitch = np.radians(yaw), np.radians(pitch)
    local = np.stack(
        [np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], axis=1
    )
    tint = 1 + 0.06 * (2 * warmth[:, None] - 1) * np.array([1.0, 0.0, -1.0])
    sky = 0.26 + 0.14 * ambient[0]
    return Lighting(
        sky=np.full(3, sky, np.float32),
        ground=np.full(3, sky * (0.5 + 0.3 * ambient[1]), np.float32),
        directions=(local @ camera.c2w[:3, :3].T).astype(np.float32),
        colors=(level[:, None] * tint).astype(np.float32),
    )


def to_linear(srgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert 8-bit sRGB of any shape to linear values 0..1, float32."""
    return srgb_to_linear(np.arange(256) / 255).astype(np.float32)[srgb]


def smooth_normals(
    vertices: NDArray[np.float32],
    faces: NDArray[np.integer],
    crease_degrees: float = CREASE_DEGREES,
) -> NDArray[np.float32]:
    """Compute a normal for each corner of each face.

    The normal of a corner is the area-weighted mean over its smoothing group: all faces at the same
    position whose normal, or its opposite, is within `crease_degrees` of the face's own. Vertices
    at the same position count as one, so that seams are invisible.

    Args:
        vertices: float32 [V, 3].
        faces: integer [F, 3].
        crease_degrees: Largest angle between faces of one group.

    Returns:
        float32 [F, 3, 3] unit normals, 0 for a face without area.
    """
    triangles = vertices[faces]
    area = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    unit = area / np.maximum(np.linalg.norm(area, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    # corners sorted by position; `left` is the number of corners after each at its position
    place = np.unique(vertices, axis=0, return_inverse=True)[1].reshape(-1)[faces].reshape(-1)
    order = np.argsort(place, kind="stable")
    start = np.flatnonzero(np.r_[True, place[order][1:] != place[order][:-1]])
    size = np.diff(np.r_[start, len(order)])
    left = np.repeat(size, size) - (np.arange(len(order)) - np.repeat(start, size)) - 1
    # add the areas of all pairs of corners that belong together
    own, weight = unit[order // 3], area[order // 3]
    total = weight.copy()
    paired = np.repeat(size <= MAX_FAN, size)  # pairs at a larger fan take too long: no smoothing
    limit = cos(radians(crease_degrees))
    for step in range(1, int(min(size.max(initial=1), MAX_FAN))):
        i = np.flatnonzero(paired & (left >= step))
        j = i + step
        cosine = np.einsum("ij,ij->i", own[i], own[j])
        near = np.abs(cosine) >= limit
        i, j, sign = i[near], j[near], np.sign(cosine[near])[:, None]
        total[i] += weight[j] * sign
        total[j] += weight[i] * sign
    total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    # back to the order of the corners
    normals = np.empty_like(total)
    normals[order] = total
    return normals.reshape(-1, 3, 3).astype(np.float32)
