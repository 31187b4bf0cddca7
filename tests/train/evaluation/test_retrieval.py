"""Retrieval of training assets: pixels of images, and surfaces that are turned."""

import numpy as np
import pytest

from train.evaluation.retrieval import (
    IMAGE_SIDE,
    TrainingShapes,
    TrainingViews,
    describe_pixels,
    pixels,
    turned_surface,
)


class Views:
    """Two assets with two views each: a foreground of the asset's height, at azimuths."""

    azimuths = ((10.0, 100.0), (200.0, 350.0))

    def views(self, asset):
        return 2

    def read_view(self, asset, view):
        meta = {"azimuth_degrees": self.azimuths[asset][view]}
        return type("View", (), {"rgba": image(20 + 30 * asset, 10 + view), "meta": meta})


def image(height, width, at=(5, 3), colour=(200, 100, 0)):
    rgba = np.zeros((80, 80, 4), np.uint8)
    rgba[at[0] : at[0] + height, at[1] : at[1] + width] = (*colour, 255)
    return rgba


def test_pixels_depend_on_the_cropped_foreground():
    a, b = pixels(image(20, 10)), pixels(image(20, 10, at=(40, 50)))
    assert np.array_equal(a, b)
    assert np.allclose(a, pixels(image(40, 20)), atol=1e-6)  # the crop is scaled
    square = a.reshape(IMAGE_SIDE, IMAGE_SIDE, 4)
    assert np.allclose(square[:, IMAGE_SIDE // 2], [200 / 255, 100 / 255, 0, 1])
    assert not square[:, : IMAGE_SIDE // 4 - 1].any()  # centred, with transparent sides
    behind = image(20, 10)
    behind[..., :3] = np.where(behind[..., 3:] > 0, behind[..., :3], 77)
    assert np.array_equal(a, pixels(behind))  # colours without alpha do not count
    with pytest.raises(ValueError, match="must have a foreground"):
        pixels(np.zeros((4, 4, 4), np.uint8))


def test_the_most_similar_view_is_turned_into_the_quarter_of_the_query():
    views = TrainingViews(Views(), [0, 1], 0, describe_pixels, turned=True)
    found = views.nearest(image(50, 10), 80.0)
    assert (found.asset, found.view) == (1, 0)
    assert found.distance < 0.01  # rows are kept in half precision
    # The camera of the view is in quarter 2, that of the query in quarter 1.
    assert found.turns == 1
    assert views.nearest(image(50, 11), 80.0).turns == 3  # 350 degrees: quarter 0
    as_they_are = TrainingViews(Views(), [0, 1], 0, describe_pixels, turned=False)
    assert as_they_are.nearest(image(50, 10), 80.0).turns == 0
    # The second view of each asset is held out.
    trained = TrainingViews(Views(), [0, 1], 1, describe_pixels, turned=True)
    assert trained.nearest(image(50, 11), 0.0).view == 0


class Boxes:
    """Stored surfaces: an arrow head on a plate, and a cube."""

    surfaces = (
        (
            np.array([[-0.4, 0, -0.1], [-0.4, 0, 0.1], [0.4, 0, 0.0], [0.4, 0.3, 0.0]]),
            np.array([[0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 1, 3]], np.int32),
        ),
        (
            np.array([[-0.1, -0.1, -0.1], [0.1, -0.1, -0.1], [0, 0.1, 0], [0, -0.1, 0.1]]),
            np.array([[0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 1, 3]], np.int32),
        ),
    )

    def surface(self, asset):
        return self.surfaces[asset]


@pytest.mark.parametrize("turns", range(4))
def test_the_nearest_shape_is_found_in_every_quarter(turns):
    query = turned_surface(Boxes.surfaces[0], turns)
    # A turn moves +x to +z, as the quarter turns of training do.
    assert np.allclose(turned_surface(Boxes.surfaces[0], 1)[0][2], [0, 0, 0.4])
    found = TrainingShapes(Boxes(), [0, 1], turned=True).nearest(query)
    assert (found.asset, found.turns) == (0, turns)
    assert found.distance < 0.02
    straight = TrainingShapes(Boxes(), [0, 1], turned=False).nearest(query)
    assert straight.turns == 0
    assert (straight.distance < 0.02) == (turns == 0)
    assert np.allclose(turned_surface(query, -turns)[0], Boxes.surfaces[0][0])
