"""Normal maps of shapes with known normals, the Frechet distance, and DINOv2 similarity."""

import numpy as np
import pytest
import scipy.linalg
import torch
import trimesh

from model.conditioning.image_encoder import DinoEncoder
from pipeline.core.cameras import look_at_origin
from pipeline.core.errors import UserError
from train.evaluation.image_metrics import (
    NORMAL_MAPS,
    SIZE,
    DinoFeatures,
    frechet_distance,
    normal_map,
    normal_maps,
)

CAMERA = look_at_origin(30.0, 20.0, 50.0)


def normals_of(image):
    return image.astype(float) / 127.5 - 1


def test_the_normal_map_of_a_sphere():
    ball = trimesh.creation.icosphere(5, radius=0.4)
    image = normal_map(ball.vertices, ball.faces, CAMERA, 161)
    drawn = (image != 255).any(axis=2)
    right, up, back, origin = CAMERA.c2w[:3].T
    half = np.tan(np.radians(CAMERA.fov_degrees) / 2)
    at = (np.arange(161) + 0.5) / 161 * 2 - 1
    rays = -back + half * (at[None, :, None] * right - at[:, None, None] * up)
    rays /= np.linalg.norm(rays, axis=2, keepdims=True)
    along = -(rays @ origin)
    gap = np.sqrt(np.maximum(origin @ origin - along**2, 0))  # distance of the line from the centre
    assert (drawn == (gap < 0.4))[np.abs(gap - 0.4) > 0.005].all()
    inner = gap < 0.38
    points = origin + (along - np.sqrt(np.maximum(0.4**2 - gap**2, 0)))[..., None] * rays
    expected = points / 0.4 @ np.stack([right, up, back], 1)
    found = normals_of(image)
    cosine = (found * expected).sum(2)[inner] / np.linalg.norm(found, axis=2)[inner]
    assert cosine.min() > 0.998


def test_the_nearer_face_hides_the_other_and_both_sides_of_a_face_look_the_same():
    square = np.array([[-0.2, -0.2, 0], [0.2, -0.2, 0], [0.2, 0.2, 0], [-0.2, 0.2, 0]])
    tilted = square @ np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]]).T - [0, 0, 0.4]
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    front = look_at_origin(0.0, 0.0, 100.0)
    vertices, both = np.concatenate([square, tilted]), np.concatenate([faces + 4, faces])
    for order in (both, both[::-1], both[:, ::-1]):
        image = normal_map(vertices, order, front, 64)
        assert image[32, 32].tolist() == [128, 128, 255]
    assert np.allclose(
        normals_of(normal_map(tilted, faces, front, 64))[32, 32], [0, 0.6, 0.8], atol=0.01
    )
    assert (normal_map(np.zeros((0, 3)), np.zeros((0, 3), int), front, 64) == 255).all()


def test_normal_maps_are_taken_from_all_around():
    box = trimesh.creation.box((0.2, 0.4, 0.6))
    maps = normal_maps(box.vertices, box.faces)
    assert [image.shape for image in maps] == [(SIZE, SIZE, 3)] * NORMAL_MAPS
    half = NORMAL_MAPS // 2
    for n in range(half):  # a box looks the same from the opposite side
        assert (maps[n] != maps[n + half]).any(axis=2).mean() < 0.002
    assert (maps[0] != maps[2]).any(axis=2).mean() > 0.02


@pytest.mark.parametrize(("rows", "others", "channels"), [(40, 60, 5), (6, 9, 30)])
def test_the_frechet_distance_agrees_with_its_definition(rows, others, channels):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rows, channels)) @ rng.normal(size=(channels, channels))
    b = rng.normal(size=(others, channels)) * 2 + 1
    S, T = np.cov(a.T), np.cov(b.T)
    root = np.real(scipy.linalg.sqrtm(S @ T + 0j))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S + T - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * channels)
    with pytest.raises(ValueError, match=r"must be \[2 or more, C\] of one C"):
        frechet_distance(a, b[:1])


def test_similarity_depends_on_the_foreground_and_not_on_its_place():
    features = DinoFeatures(DinoEncoder.random(image_size=SIZE), torch.device("cpu"))
    image = np.zeros((300, 300, 4), np.uint8)
    image[60:160, 80:140] = [200, 30, 30, 255]
    image[100:120, 80:110] = [20, 30, 200, 255]
    moved = np.roll(image, (70, 90), axis=(0, 1))
    other = np.where(image[..., 3:] > 0, np.uint8([30, 200, 90, 255]), 0).astype(np.uint8)
    assert features.similarity(image, moved) == pytest.approx(1.0)
    assert features.similarity(image, other) < 0.9999
    assert features.similarity(image, np.zeros_like(image)) == 0.0
    with pytest.raises(ValueError, match=r"images must be RGB \[224, 224, 3\]"):
        features([image])


def test_the_error_for_missing_weights_says_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match="hf download"):
        DinoFeatures.load(str(tmp_path / "nothing"), torch.device("cpu"))
