"""How a mesh is lit: seeded lights, normals that keep creases sharp, and the shader that uses both."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians

import numpy as np
from numpy.typing import NDArray

from pipeline.cameras import Camera
from pipeline.schema import seed_of

MAX_LIGHTS = 3
CREASE_DEGREES = 40.0  # faces that meet at a larger angle keep an edge between them
MAX_FAN = 64  # corners at one vertex up to which every pair is compared

VERTEX_SHADER = """
#version 330 core
layout(location = 0) in vec3 position;
layout(location = 1) in vec3 normal;
layout(location = 2) in vec4 surface;  // metallic, roughness
layout(location = 3) in vec2 uv;
layout(location = 4) in vec4 color;  // linear
uniform mat4 world_to_clip;
out vec3 at;
out vec3 shading_normal;
out vec2 finish;
out vec2 texel;
out vec4 tint;

void main() {
    gl_Position = world_to_clip * vec4(position, 1.0);
    at = position;
    shading_normal = normal;
    finish = surface.xy;
    texel = uv;
    tint = color;
}
"""

# Colour leaves premultiplied, so that both blending and the average over a pixel's samples weight it by coverage.
FRAGMENT_SHADER = """
#version 330 core
const float SOLID = 0.996;  // alpha from which a blended surface hides what is behind it
uniform sampler2D base_color;
uniform bool textured;
uniform int keep;  // 0: all, as opaque; 1: alpha >= cutoff, as opaque; 2: alpha >= SOLID; 3: the others, blended
uniform float cutoff;
uniform vec3 eye;
uniform vec3 sky;
uniform vec3 ground;
uniform int light_count;
uniform vec3 light_direction[3];  // towards the light
uniform vec3 light_color[3];
in vec3 at;
in vec3 shading_normal;
in vec2 finish;
in vec2 texel;
in vec4 tint;
out vec4 pixel;

vec3 to_linear(vec3 c) {
    return mix(c / 12.92, pow((c + 0.055) / 1.055, vec3(2.4)), step(0.04045, c));
}

vec3 to_srgb(vec3 c) {
    return mix(c * 12.92, 1.055 * pow(c, vec3(1.0 / 2.4)) - 0.055, step(0.0031308, c));
}

void main() {
    vec3 view = normalize(eye - at);
    vec3 facet = cross(dFdx(at), dFdy(at));
    facet = dot(facet, facet) > 0.0 ? normalize(facet) : view;
    facet *= dot(facet, view) < 0.0 ? -1.0 : 1.0;
    vec4 base = tint;
    if (textured) {
        vec4 image = texture(base_color, texel);
        base *= vec4(to_linear(image.rgb), image.a);
    }
    if (keep == 1 && base.a < cutoff || keep == 2 && base.a < SOLID || keep == 3 && base.a >= SOLID) discard;
    float alpha = keep == 3 ? base.a : 1.0;

    // Lit from the side it is seen from, whichever way the face and its normals are turned.
    vec3 n = dot(shading_normal, shading_normal) > 0.25 ? normalize(shading_normal) : facet;
    n *= dot(n, facet) < 0.0 ? -1.0 : 1.0;
    float metallic = finish.x;
    float rough = clamp(finish.y, 0.25, 1.0);  // a light is a point: sharper highlights would be specks
    float nv = max(dot(n, view), 1e-3);
    vec3 f0 = mix(vec3(0.04), base.rgb, metallic);
    vec3 fresnel = f0 + (max(vec3(1.0 - rough), f0) - f0) * pow(1.0 - nv, 5.0);
    vec3 diffuse = base.rgb * (1.0 - metallic);

    // A sky above and a floor below stand in for the surroundings: without them a metal has nothing to mirror.
    float blur = mix(0.3, 1.0, rough);
    vec3 mirrored = mix(ground, sky, smoothstep(-blur, blur, reflect(-view, n).y));
    vec3 color = diffuse * mix(ground, sky, 0.5 + 0.5 * n.y) + fresnel * mirrored * mix(1.0, 1.6, metallic);
    float a2 = rough * rough * rough * rough;
    for (int i = 0; i < light_count; i++) {
        vec3 l = light_direction[i];
        float nl = dot(n, l);
        if (nl <= 0.0) continue;
        vec3 h = normalize(l + view);
        float nh = max(dot(n, h), 0.0);
        float lobe = nh * nh * (a2 - 1.0) + 1.0;
        float geometry = 0.5 / mix(2.0 * nl * nv, nl + nv, rough * rough);
        vec3 f = f0 + (1.0 - f0) * pow(1.0 - max(dot(h, view), 0.0), 5.0);
        color += (diffuse + f * geometry * a2 / (lobe * lobe)) * light_color[i] * nl;
    }
    vec3 over = max(color - 0.8, 0.0);  // a soft shoulder instead of a clipped white
    color = min(color, 0.8) + 0.2 * (1.0 - exp(-over / 0.2));
    pixel = vec4(to_srgb(color) * alpha, alpha);
}
"""


@dataclass(frozen=True, kw_only=True)
class Lighting:
    """What shines on one view; linear RGB, 1 = what lights a white surface to white."""

    sky: NDArray[np.float32]  # [3] ambient from above
    ground: NDArray[np.float32]  # [3] ambient from below
    directions: NDArray[np.float32]  # [L, 3] unit, towards the light, world frame; L = 1..3
    colors: NDArray[np.float32]  # [L, 3]


def lighting(uid: str, view: int, camera: Camera, attempt: int = 0) -> Lighting:
    """Ambient light plus 1..3 random directional lights, the first from the camera's side. Seeded like the camera."""
    draw = np.random.Generator(np.random.PCG64(seed_of(uid, "lights", view, attempt)))
    count = int(draw.integers(1, MAX_LIGHTS + 1))
    yaw, pitch, level, warmth, ambient = draw.random((5, MAX_LIGHTS))
    key = np.arange(count) == 0
    yaw = np.radians(np.where(key, -70 + 140 * yaw[:count], -180 + 360 * yaw[:count]))
    pitch = np.radians(np.where(key, -5 + 60 * pitch[:count], -20 + 80 * pitch[:count]))
    local = np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], axis=1)
    level = np.where(key, 0.50 + 0.25 * level[:count], 0.10 + 0.20 * level[:count])
    warmth = 0.06 * (2 * warmth[:count, None] - 1) * np.array([1.0, 0.0, -1.0])
    sky = 0.34 + 0.16 * ambient[0]
    return Lighting(
        sky=np.full(3, sky, np.float32),
        ground=np.full(3, sky * (0.5 + 0.3 * ambient[1]), np.float32),
        directions=(local @ camera.c2w[:3, :3].T).astype(np.float32),
        colors=(level[:, None] * (1 + warmth)).astype(np.float32),
    )


def to_linear(srgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """8-bit sRGB -> linear 0..1, fp32, any shape."""
    table = np.arange(256) / 255
    return np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4).astype(np.float32)[srgb]


def smooth_normals(
    vertices: NDArray[np.float32], faces: NDArray[np.int32], crease_degrees: float = CREASE_DEGREES
) -> NDArray[np.float32]:
    """Unit normals [F, 3, 3], one a face corner: the area-weighted mean over the corner's smoothing group.

    A corner's group is every face at the same position (vertices are told apart by position alone, so seams do not
    show) whose normal, taken either way round, is within crease_degrees of its own. Zero for a face without area.
    """
    triangles = vertices[faces]
    area = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    unit = area / np.maximum(np.linalg.norm(area, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    place = np.unique(vertices, axis=0, return_inverse=True)[1].reshape(-1)[faces].reshape(-1)
    order = np.argsort(place, kind="stable")
    start = np.flatnonzero(np.r_[True, place[order][1:] != place[order][:-1]])
    size = np.diff(np.r_[start, len(order)])
    left = np.repeat(size, size) - (np.arange(len(order)) - np.repeat(start, size)) - 1  # corners after this one
    own, weight = unit[order // 3], area[order // 3]
    total = weight.copy()
    paired = np.repeat(size <= MAX_FAN, size)  # the apex of a large fan would cost its square; it stays faceted
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
    normals = np.empty_like(total)
    normals[order] = total
    return normals.reshape(-1, 3, 3).astype(np.float32)
