"""Images are prepared, and image tokens kept, as the authors' pipeline does for its weights."""

import numpy as np
import pytest
import torch

from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import PreparedImage, prepare_image
from model.config import PATCH
from tests.model.official.golden import Golden, normal

IMAGE = Golden("image")
CONDITION = Golden("condition")
SIZE = 518
EVERY = 7


@pytest.mark.parametrize("name", IMAGE.inputs)
def test_golden_preparation_of_images(name):
    rgba, want = IMAGE.inputs[name]["rgba"], IMAGE.outputs[name]
    prepared = prepare_image(rgba, SIZE, whole_if_opaque=True, preparation="published")
    rgb = prepared.rgb[::EVERY, ::EVERY].transpose(2, 0, 1).astype(int)
    assert (np.abs(rgb - want["every7"][:3]) <= 1).mean() >= 0.999
    # The authors' mask holds alpha, of which only the pixels that are not 0 matter.
    np.testing.assert_array_equal(prepared.mask[::EVERY, ::EVERY], want["every7"][3] > 0)
    patches = prepared.mask.reshape(SIZE // PATCH, PATCH, SIZE // PATCH, PATCH).any((1, 3))
    np.testing.assert_array_equal(patches, want["patches"])
    rows, columns = (np.flatnonzero(prepared.mask.any(axis)) for axis in (1, 0))
    assert [rows[0], rows[-1], columns[0], columns[-1]] == want["box"].tolist()


def test_golden_images_differ_when_they_are_resized_once():
    """The comparison would notice our own preparation."""
    worst = 1.0
    for name, inputs in IMAGE.inputs.items():
        prepared = prepare_image(inputs["rgba"], SIZE, whole_if_opaque=True)
        rgb = prepared.rgb[::EVERY, ::EVERY].transpose(2, 0, 1).astype(int)
        difference = np.abs(rgb - IMAGE.outputs[name]["every7"][:3])
        worst = min(worst, (difference <= 1).mean())
    assert worst < 0.99


def masks(settings):
    """Return the golden masks, bool [batch, 518, 518]."""
    boxes = settings["ones"]
    out = np.zeros((1 + max(box[0] for box in boxes), SIZE, SIZE), bool)
    for asset, (top, bottom), (left, right) in boxes:
        out[asset, top:bottom, left:right] = True
    return out


@pytest.mark.parametrize("kept", ["foreground", "all"])
def test_golden_tokens_of_the_condition(kept):
    mask = masks(CONDITION.settings_of("all"))
    rgb = np.zeros((SIZE, SIZE, 3), np.uint8)
    batch = ImageBatch.collate([PreparedImage(rgb, one) for one in mask], kept)
    patches = (SIZE // PATCH) ** 2
    if kept == "all":
        assert torch.equal(batch.rows, torch.arange(len(mask) * (5 + patches)))
        assert batch.max_tokens == 1374
        return
    tokens = normal("condition_tokens", [len(mask), 5 + patches, 4], CONDITION.settings["salt"])
    want = CONDITION.outputs["all"]
    assert np.array_equal(tokens.astype(np.float32).reshape(-1, 4)[batch.rows], want["tokens"])
    assert np.array_equal(batch.coords.numpy(), want["coords"])
