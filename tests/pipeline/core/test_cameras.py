"""Cameras: statistics of the sets, conventions of the frame, and an independent projection."""

import numpy as np
import pytest

from pipeline.core.cameras import look_at_origin, project, sample_camera

UIDS = [f"folder-{i:020x}" for i in range(60)]


def sampled(kind):
    return [sample_camera(uid, view, kind) for uid in UIDS for view in range(45)]


def assert_uniform(values, low, high):
    """Test values against the uniform distribution on [low, high] (Kolmogorov-Smirnov).

    A correct sampler fails about once in a million.
    """
    x = np.sort((np.asarray(values) - low) / (high - low))
    assert x[0] >= 0
    assert x[-1] <= 1
    steps = np.arange(len(x) + 1) / len(x)
    assert max(np.abs(steps[1:] - x).max(), np.abs(x - steps[:-1]).max()) < 2.6 / np.sqrt(len(x))


def test_paper_cameras_have_the_statistics_of_the_paper():
    # Direct3D-S2 paper (arXiv 2505.17412), section 2
    cameras = sampled("paper")
    assert_uniform([c.elevation_degrees for c in cameras], 10, 40)
    assert_uniform([c.azimuth_degrees for c in cameras], 0, 180)
    assert_uniform([c.focal_mm for c in cameras], 30, 100)
    # The numbers neither repeat nor form a sequence.
    for name in ("elevation_degrees", "azimuth_degrees", "focal_mm"):
        values = np.array([getattr(c, name) for c in cameras])
        assert len(np.unique(values)) == len(values)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.1
    independent = np.corrcoef(
        [[c.azimuth_degrees, c.elevation_degrees, c.focal_mm] for c in cameras], rowvar=False
    )
    assert np.abs(independent - np.eye(3)).max() < 0.1


def test_wide_cameras_are_uniform_on_the_sphere():
    back = np.array([c.c2w[:3, 2] for c in sampled("wide")])
    for axis in range(3):  # every coordinate of a uniform direction is uniform (Archimedes)
        assert_uniform(back[:, axis], -1, 1)
    assert np.abs(np.cov(back.T) - np.eye(3) / 3).max() < 0.03


def test_a_camera_depends_on_each_argument_and_on_nothing_else():
    first = sample_camera("folder-a", 3, "paper")
    assert sample_camera("folder-a", 3, "paper").meta() == first.meta()
    # These values are pinned: every platform and every later version must find the same cameras.
    assert first.azimuth_degrees == 90.56322387
    assert first.focal_mm == 61.301431571
    others = [
        sample_camera("folder-b", 3),
        sample_camera("folder-a", 4),
        sample_camera("folder-a", 3, "wide"),
        sample_camera("folder-a", 3, attempt=1),
    ]
    assert all(other.focal_mm != first.focal_mm for other in others)
    with pytest.raises(ValueError, match="kind"):
        sample_camera("folder-a", 3, "orbit")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("azimuth", "elevation", "eye", "right", "up"),
    [
        (0, 0, [0, 0, 1], [1, 0, 0], [0, 1, 0]),  # the front is +z
        (90, 0, [1, 0, 0], [0, 0, -1], [0, 1, 0]),
        (180, 0, [0, 0, -1], [-1, 0, 0], [0, 1, 0]),
        (0, 90, [0, 1, 0], [1, 0, 0], [0, 0, -1]),
        (0, -90, [0, -1, 0], [1, 0, 0], [0, 0, 1]),
    ],
)
def test_azimuth_and_elevation_follow_the_convention(azimuth, elevation, eye, right, up):
    c = look_at_origin(azimuth, elevation, 50)
    expected = np.stack([right, up, eye, np.multiply(eye, c.distance)], axis=1)
    assert np.abs(c.c2w[:3] - expected).max() < 1e-9
    assert c.c2w[3].tolist() == [0, 0, 0, 1]


def test_the_sphere_of_radius_0_866_exactly_fits_the_image():
    for c in [
        sample_camera(UIDS[0], view, kind) for kind in ("paper", "wide") for view in range(45)
    ]:
        assert c.distance * np.sin(np.radians(c.fov_degrees / 2)) == pytest.approx(0.866, abs=1e-9)
        assert np.tan(np.radians(c.fov_degrees / 2)) == pytest.approx(18 / c.focal_mm, abs=1e-9)
        assert np.abs(c.c2w[:3, :3].T @ c.c2w[:3, :3] - np.eye(3)).max() < 1e-9
        assert np.linalg.det(c.c2w[:3, :3]) == pytest.approx(1)
        e, a = np.radians(c.elevation_degrees), np.radians(c.azimuth_degrees)
        eye = c.distance * np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
        assert np.abs(c.c2w[:3, 3] - eye).max() < 1e-9


def test_projection_agrees_with_a_pinhole_and_a_sensor():
    """The expected pixels come from intersecting each ray with a 36 mm sensor."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.475, 0.475, (100, 3))
    for view in range(5):
        c = sample_camera("folder-a", view, "wide")
        pixels, depth = project(points, c, 640, 640)
        right, up, back, eye = c.c2w[:3].T
        for point, pixel, d in zip(points, pixels, depth):
            ray = point - eye
            on_sensor = ray / (ray @ -back) * c.focal_mm  # mm
            assert d == pytest.approx(ray @ -back, abs=1e-9)
            assert pixel[0] == pytest.approx(320 + on_sensor @ right * 640 / 36, abs=1e-6)
            assert pixel[1] == pytest.approx(320 - on_sensor @ up * 640 / 36, abs=1e-6)
        assert (pixels > 0).all()
        assert (pixels < 640).all()
