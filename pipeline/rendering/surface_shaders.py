"""Shaders of image-based light and of the maps of a view: normals, depth, albedo and roughness.

Shading follows the split-sum approximation with the energy of multiple scattering restored
(Fdez-Aguera 2019, "A Multiple-Scattering Microfacet Model for Real-Time Image-based Lighting").
Colours are compressed by the tone mapping "Khronos PBR Neutral" and encoded as sRGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.color import linear_to_srgb
from pipeline.core.schema import MAP_NAMES
from pipeline.rendering.prefilter import LEVELS, TABLE_SIDE
from pipeline.rendering.shading import EMISSIONS, KEEPS

# What is drawn: the picture, linear radiance, the colour of the surface, its roughness (green) and
# metallic (blue), its normal with the depth in alpha, or nothing but depth.
OUTPUTS = ("PICTURE", "RADIANCE", "ALBEDO", "MATERIAL", "NORMAL", "DEPTH")
COMPRESSION_START = 0.76  # of the tone mapping: brighter colours are compressed
DESATURATION = 0.15


def tone_mapped(radiance: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compress linear radiance [..., 3] to 0..1 by Khronos PBR Neutral, as the shaders do."""
    color = np.asarray(radiance, np.float64)
    low = color.min(axis=-1, keepdims=True)
    color = color - np.where(low < 0.08, low - 6.25 * low * low, 0.04)
    peak = color.max(axis=-1, keepdims=True)
    room = 1 - COMPRESSION_START
    new_peak = 1 - room**2 / (np.maximum(peak, COMPRESSION_START) + room - COMPRESSION_START)
    grey = 1 - 1 / (DESATURATION * (peak - new_peak) + 1)
    compressed = color * (new_peak / np.maximum(peak, 1e-9)) * (1 - grey) + new_peak * grey
    return np.where(peak < COMPRESSION_START, color, compressed)


def displayed(radiance: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the 8-bit sRGB colours that linear radiance [..., 3] has in a picture."""
    return np.rint(255 * linear_to_srgb(np.clip(tone_mapped(radiance), 0, 1))).astype(np.uint8)


_LIGHT = """
uniform vec3 eye;
uniform vec3 backwards;     // towards the eye of an orthographic camera
uniform int orthographic;
uniform vec3 matte[9];      // light on matte surfaces, in polynomials of the normal
uniform vec2 turn;          // cosine and sine of the yaw of the environment
uniform sampler3D panorama; // layer l is blurred for roughness l / LEVELS
uniform sampler2D shares;   // what rough mirrors reflect: scale and bias of F0

vec3 turned(vec3 d) { return vec3(turn.x * d.x - turn.y * d.z, d.y, turn.y * d.x + turn.x * d.z); }

vec3 light_on(vec3 n) {
    vec3 sum = matte[0] + matte[1] * n.x + matte[2] * n.y + matte[3] * n.z + matte[4] * (n.x * n.y)
        + matte[5] * (n.y * n.z) + matte[6] * (n.x * n.z) + matte[7] * (3.0 * n.z * n.z - 1.0)
        + matte[8] * (n.x * n.x - n.y * n.y);
    return max(sum, 0.0);
}

vec3 mirrored(vec3 d, float roughness) {
    vec2 at = vec2(atan(d.x, d.z) * 0.15915494 + 0.5, acos(clamp(d.y, -1.0, 1.0)) * 0.31830989);
    float layer = (roughness * float(LEVELS) + 0.5) / float(LEVELS + 1);
    return textureLod(panorama, vec3(at, layer), 0.0).rgb;
}

// The light that leaves a surface of colour c is c * tinted + plain, but for metals with a texture
// `base` must be the colour itself, because what microfacets scatter twice is not linear in it.
void shine(
    vec3 at, vec3 n, vec3 base, float metallic, float roughness, vec4 arriving,
    out vec3 tinted, out vec3 plain
) {
    vec3 view = orthographic == 1 ? backwards : normalize(eye - at);
    float facing = clamp(dot(n, view), 0.0, 1.0);
    // the lobe of a rough mirror leans towards the normal
    float alpha = roughness * roughness;
    float lean = (1.0 - alpha) * (sqrt(1.0 - alpha) + alpha);
    vec3 r = normalize(mix(n, reflect(-view, n), lean));
    vec3 image = mirrored(turned(r), roughness);
    vec3 matte_light = light_on(turned(n)) * arriving.rgb;
    // a crevice hides what a mirror would show (Lagarde and de Rousiers 2014)
    float shown = clamp(
        pow(facing + arriving.a, exp2(-16.0 * roughness - 1.0)) - 1.0 + arriving.a, 0.0, 1.0);
    image *= shown;
    vec2 share = texture(shares, (vec2(facing, roughness) * float(TABLE_SIDE - 1) + 0.5)
        / float(TABLE_SIDE)).rg;
    float missing = 1.0 - share.x - share.y;
    // dielectrics
    float once = 0.04 * share.x + share.y;
    float again = missing * once * 0.0857 / (1.0 - 0.0857 * missing);
    tinted = (1.0 - metallic) * (1.0 - once - again) * matte_light;
    plain = (1.0 - metallic) * (once * image + again * matte_light);
    // metals
    vec3 metal_once = base * share.x + share.y;
    vec3 mean = base + (1.0 - base) / 21.0;
    vec3 metal_again = missing * metal_once * mean / (1.0 - mean * missing);
    plain += metallic * (metal_once * image + metal_again * matte_light);
}
"""

_VERTEX = """
in vec3 position;
in vec3 normal;
in vec4 surface;  // metallic, roughness
in vec2 uv;
in vec2 emissive_uv;
in vec2 normal_uv;
in vec2 metallic_uv;
in vec2 roughness_uv;
in vec2 occlusion_uv;
in vec4 color;  // linear
in vec4 front_share;  // of the light that arrives at the front, and of even light
in vec4 back_share;
uniform mat4 world_to_clip;
out vec4 tint;
out vec2 texel, emissive_texel, normal_texel, metallic_texel, roughness_texel, occlusion_texel;
#if PER_VERTEX
out vec3 front_plain, back_plain, front_tinted, back_tinted;
#else
out vec3 at, shading_normal;
out vec2 finish;
out vec4 front_arriving, back_arriving;
#endif

void main() {
    gl_Position = world_to_clip * vec4(position, 1.0);
    tint = color;
    texel = uv;
    emissive_texel = emissive_uv;
    normal_texel = normal_uv;
    metallic_texel = metallic_uv;
    roughness_texel = roughness_uv;
    occlusion_texel = occlusion_uv;
#if PER_VERTEX
    vec2 finish = surface.xy;
    shine(position, normal, color.rgb, finish.x, finish.y, front_share, front_tinted, front_plain);
    shine(position, -normal, color.rgb, finish.x, finish.y, back_share, back_tinted, back_plain);
#else
    at = position;
    shading_normal = normal;
    finish = surface.xy;
    front_arriving = front_share;
    back_arriving = back_share;
#endif
}
"""

_FRAGMENT = """
uniform sampler2D base_color;  // sRGB texels are decoded before they are filtered
uniform sampler2D emissive_color;
uniform sampler2D normal_map, metallic_map, roughness_map, occlusion_map;
uniform float cutoff;
uniform vec3 emission;
uniform float normal_scale;
uniform vec4 depth_plane;  // depth of a point p: dot(depth_plane, (p, 1))
in vec4 tint;
in vec2 texel, emissive_texel, normal_texel, metallic_texel, roughness_texel, occlusion_texel;
#if PER_VERTEX
in vec3 front_plain, back_plain, front_tinted, back_tinted;
#else
in vec3 at, shading_normal;
in vec2 finish;
in vec4 front_arriving, back_arriving;
#endif
out vec4 pixel;

vec3 to_srgb(vec3 c) {
    return mix(12.92 * c, 1.055 * pow(c, vec3(1.0 / 2.4)) - 0.055, step(0.0031308, c));
}

// Khronos PBR Neutral
vec3 tone_mapped(vec3 c) {
    float low = min(c.r, min(c.g, c.b));
    c -= low < 0.08 ? low - 6.25 * low * low : 0.04;
    float peak = max(c.r, max(c.g, c.b));
    if (peak < COMPRESSION_START) return c;
    float room = 1.0 - COMPRESSION_START;
    float new_peak = 1.0 - room * room / (peak + room - COMPRESSION_START);
    float grey = 1.0 - 1.0 / (DESATURATION * (peak - new_peak) + 1.0);
    return mix(c * (new_peak / peak), vec3(new_peak), grey);
}

#if NORMAL_MAP
// Turn a normal as the map says. The frame of the texture follows from the derivatives of position
// and texture coordinates, so that it needs no tangents.
vec3 perturbed(vec3 n, vec3 position, float side) {
    vec3 dx = dFdx(position), dy = dFdy(position);
    vec2 tx = dFdx(normal_texel), ty = dFdy(normal_texel);
    vec3 across_y = cross(dy, n), across_x = cross(n, dx);
    vec3 tangent = across_y * tx.x + across_x * ty.x;
    vec3 bitangent = across_y * tx.y + across_x * ty.y;
    float largest = max(dot(tangent, tangent), dot(bitangent, bitangent));
    vec3 m = texture(normal_map, normal_texel).rgb * (255.0 / 127.0) - (128.0 / 127.0);
    if (largest <= 0.0) return n;
    m.xy *= normal_scale;
    m.z = max(m.z, 1e-3);
    float even = inversesqrt(largest) * side;
    return normalize(m.x * tangent * even + m.y * bitangent * even + m.z * n);
}
#endif

void main() {
    vec4 base = tint;
#if TEXTURED
    base *= texture(base_color, texel);
#endif
#if KEEP == KEEP_MASK
    if (base.a < cutoff) discard;
#elif KEEP == KEEP_SOLID
    if (base.a < 0.996) discard;
#elif KEEP == KEEP_BLEND
    if (base.a >= 0.996) discard;
#endif
#if OUTPUT == OUTPUT_DEPTH
    pixel = vec4(0.0);
#else
#if !PER_VERTEX
    float metallic = finish.x, roughness = finish.y;
    vec4 arriving = gl_FrontFacing ? front_arriving : back_arriving;
#if METALLIC_MAP
    metallic = texture(metallic_map, metallic_texel).r;
#endif
#if ROUGHNESS_MAP
    roughness = texture(roughness_map, roughness_texel).r;
#endif
#if OCCLUSION_MAP
    arriving *= texture(occlusion_map, occlusion_texel).r;
#endif
    // the side that the camera sees is lit
    float side = gl_FrontFacing ? 1.0 : -1.0;
    vec3 n = normalize(shading_normal) * side;
#if NORMAL_MAP
    n = perturbed(n, at, side);
#endif
#endif
#if OUTPUT == OUTPUT_NORMAL
    pixel = vec4(n, dot(depth_plane, vec4(at, 1.0)));
#else
#if OUTPUT == OUTPUT_ALBEDO
    vec3 color = to_srgb(clamp(base.rgb, 0.0, 1.0));
#elif OUTPUT == OUTPUT_MATERIAL
    vec3 color = vec3(0.0, roughness, metallic);
#else
#if UNLIT
    vec3 color = base.rgb;
#else
    vec3 tinted, plain;
#if PER_VERTEX
    tinted = gl_FrontFacing ? front_tinted : back_tinted;
    plain = gl_FrontFacing ? front_plain : back_plain;
#else
    shine(at, n, base.rgb, metallic, roughness, arriving, tinted, plain);
#endif
    vec3 color = base.rgb * tinted + plain;
#if EMISSION == EMISSION_TEXTURE
    color += emission * texture(emissive_color, emissive_texel).rgb;
#elif EMISSION == EMISSION_FACTOR
    color += emission;
#endif
#if OUTPUT == OUTPUT_PICTURE
    color = tone_mapped(color);
#endif
#endif
#if OUTPUT == OUTPUT_PICTURE
    color = to_srgb(clamp(color, 0.0, 1.0));
#endif
#endif
#if KEEP == KEEP_BLEND
    pixel = vec4(color * base.a, base.a);
#else
    pixel = vec4(color, 1.0);
#endif
#endif
#endif
}
"""


@dataclass(frozen=True, kw_only=True)
class SurfaceVariant:
    """One variant of the shaders. Mesa's software renderer runs both sides of every `if`.

    Attributes:
        output: One of OUTPUTS.
        keep: One of KEEPS.
        textured: Whether the draw call has a texture of colours.
        emission: One of EMISSIONS.
        maps: The maps of the draw call, of MAP_NAMES.
        per_vertex: Whether the light is computed at the vertices.
        unlit: Whether the base colour is drawn as it is.
    """

    output: str
    keep: str
    textured: bool
    emission: str = "NONE"
    maps: tuple[str, ...] = ()
    per_vertex: bool = False
    unlit: bool = False


def surface_shader_sources(variant: SurfaceVariant) -> tuple[str, str]:
    """Return the GLSL sources of the vertex and the fragment shader of a variant."""
    definitions: dict[str, float] = {
        **{f"KEEP_{name}": number for number, name in enumerate(KEEPS)},
        **{f"EMISSION_{name}": number for number, name in enumerate(EMISSIONS)},
        **{f"OUTPUT_{name}": number for number, name in enumerate(OUTPUTS)},
        **{f"{name.upper()}_MAP": int(name in variant.maps) for name in MAP_NAMES},
        "KEEP": KEEPS.index(variant.keep),
        "EMISSION": EMISSIONS.index(variant.emission),
        "OUTPUT": OUTPUTS.index(variant.output),
        "TEXTURED": int(variant.textured),
        "PER_VERTEX": int(variant.per_vertex),
        "UNLIT": int(variant.unlit),
        "LEVELS": LEVELS,
        "TABLE_SIDE": TABLE_SIDE,
        "COMPRESSION_START": COMPRESSION_START,
        "DESATURATION": DESATURATION,
    }
    head = "#version 330 core\n"
    head += "".join(f"#define {name} {value}\n" for name, value in definitions.items())
    if variant.per_vertex:
        return head + _LIGHT + _VERTEX, head + _FRAGMENT
    return head + _VERTEX, head + _LIGHT + _FRAGMENT
