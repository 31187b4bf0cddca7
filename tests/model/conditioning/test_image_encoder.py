"""Image preparation, augmentation and image encoders: geometry, packing and errors."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from model.conditioning.image_encoder import (
    SPECIAL,
    DinoEncoder,
    ImageBatch,
    StandInEncoder,
    build_encoder,
)
from model.conditioning.image_preprocessing import (
    OPAQUE,
    PreparedImage,
    _color_matrix,
    has_alpha,
    load_image,
    prepare_image,
)
from model.config import Augmentation, DiTConfig, EncoderConfig
from model.image_tokens import ImageTokens
from pipeline.core.errors import UserError
from pipeline.core.hashing import options_of

torch.set_num_threads(1)
SIZE = 112
TOLERANCE = 1e-5


def rectangle(width=40, height=20, canvas=(100, 80), corner=(30, 10), color=(200, 30, 60)):
    """Return RGBA: an opaque rectangle on transparent black."""
    pixels = np.zeros((canvas[1], canvas[0], 4), np.uint8)
    x, y = corner
    pixels[y : y + height, x : x + width] = [*color, 255]
    return pixels


def saved(image, format="PNG", **options):
    data = io.BytesIO()
    image.save(data, format, **options)
    data.seek(0)
    return data


def test_the_foreground_is_cropped_centred_and_padded_on_white():
    image = prepare_image(rectangle(40, 20), 518)
    rows, columns = (np.flatnonzero(image.mask.any(axis)) for axis in (1, 0))
    inner = 518 * 518 / 550  # resized to 518, 16 pixels on every side, resized to 518
    assert len(columns) == pytest.approx(inner, abs=2)
    # The bilinear filter of an enlargement by 13 reaches half a pixel.
    assert len(rows) == pytest.approx(inner / 2, abs=14)
    assert abs(rows[0] + rows[-1] - 517) <= 2
    assert abs(columns[0] + columns[-1] - 517) <= 2
    assert (image.rgb[259, 259] == (200, 30, 60)).all()
    assert (image.rgb[~image.mask][:, 0] > 250).all()
    assert (image.rgb[0, 0] == 255).all()


def test_position_and_image_size_do_not_matter():
    one = prepare_image(rectangle(33, 51, (90, 90), (5, 7)), SIZE)
    other = prepare_image(rectangle(33, 51, (200, 60), (150, 9)), SIZE)
    assert (one.rgb == other.rgb).all()
    assert (one.mask == other.mask).all()


def test_transparent_colour_leaves_no_halo():
    black = rectangle()
    black[15:25, 40:60] = 0  # a hole, so that transparent pixels lie inside the crop
    green = black.copy()
    green[green[..., 3] == 0] = [0, 255, 0, 0]
    image = prepare_image(green, SIZE)
    assert (image.rgb == prepare_image(black, SIZE).rgb).all()
    assert (image.rgb[SIZE // 2, SIZE // 2] == 255).all()


def test_haze_is_not_foreground():
    pixels = rectangle()
    pixels[0, 0] = [0, 0, 0, 5]
    assert (prepare_image(pixels, SIZE).mask == prepare_image(rectangle(), SIZE).mask).all()


def test_augmentation_is_seeded_and_off_by_default():
    pixels = np.dstack(
        [np.random.default_rng(0).integers(0, 256, (60, 60, 3)), np.full((60, 60), 255)]
    ).astype(np.uint8)
    pixels[0] = 0
    always = Augmentation(rotation_probability=1, crop_probability=1)
    draws = [
        prepare_image(pixels, SIZE, augmentation=always, rng=np.random.default_rng(s)).rgb
        for s in (1, 1, 2)
    ]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    never = Augmentation(rotation_probability=0, crop_probability=0, padding=(16, 16))
    plain = prepare_image(pixels, SIZE, augmentation=never, rng=np.random.default_rng(1))
    assert (plain.rgb == prepare_image(pixels, SIZE).rgb).all()
    wide = Augmentation(rotation_probability=0, crop_probability=0, padding=(32, 32))
    smaller = prepare_image(
        pixels, SIZE, augmentation=wide, rng=np.random.default_rng(1)
    ).mask.sum()
    assert smaller**0.5 == pytest.approx(SIZE * SIZE / (SIZE + 64), abs=2)


def test_augmentation_moves_image_and_mask_together():
    always = Augmentation(rotation_probability=1, rotation_degrees=45, crop_probability=1)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        image = prepare_image(rectangle(color=(0, 0, 0)), SIZE, augmentation=always, rng=rng)
        assert (
            (image.rgb[..., 0] <= 255 - OPAQUE) == image.mask
        ).mean() > 0.999  # black at its alpha on white


def erased(pixels, seed=3, **options):
    """Return an image of which a rectangle is erased and nothing else changed, and without."""
    still = {"rotation_probability": 0, "crop_probability": 0, "padding": (16, 16)}
    rng = np.random.default_rng(seed)
    chosen = Augmentation(**still, erase_probability=1, **options)
    return prepare_image(pixels, SIZE, augmentation=chosen, rng=rng), prepare_image(pixels, SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_a_rectangle_is_erased_as_its_random_numbers_say(seed):
    rng = np.random.default_rng(seed)
    rng.random(6)
    rng.integers(16, 16, endpoint=True)
    _, *shares = rng.random(5)  # height, width, top, left
    height, width = (round(SIZE * (0.2 + share * 0.3)) for share in shares[:2])
    top = round(shares[2] * (SIZE - height))
    left = round(shares[3] * (SIZE - width))
    image, plain = erased(rectangle(color=(0, 0, 0)), seed, erase_size=(0.2, 0.5))
    inside = np.zeros((SIZE, SIZE), bool)
    inside[top : top + height, left : left + width] = True
    assert (image.mask == (plain.mask & ~inside)).all()
    assert (image.rgb[inside] == 255).all()
    assert (image.rgb[~inside] == plain.rgb[~inside]).all()


def test_erasing_keeps_some_foreground_and_does_not_change_other_choices():
    image, plain = erased(rectangle(), erase_size=(1.0, 1.0))
    assert (image.rgb == plain.rgb).all()
    assert (image.mask == plain.mask).all()
    moved = Augmentation(rotation_probability=1, crop_probability=1, color_probability=1)
    images = [
        prepare_image(rectangle(), SIZE, augmentation=chosen, rng=np.random.default_rng(5)).rgb
        for chosen in (moved, replace(moved, erase_probability=1, erase_size=(0.01, 0.01)))
    ]
    assert (images[0] != images[1]).any(-1).sum() <= 1


@pytest.mark.parametrize("size", [(0.0, 0.1), (0.3, 0.2), (0.5, 1.1)])
def test_sizes_of_erased_rectangles_are_checked(size):
    with pytest.raises(ValueError, match="0 < smallest <= largest <= 1"):
        Augmentation(erase_size=size)


def test_new_options_leave_the_records_of_older_runs_as_they_are():
    recorded = {
        name for cfg in (EncoderConfig, Augmentation, DiTConfig) for name in options_of(cfg())
    }
    assert not {"stem", "dropout", "erase_probability", "erase_size"} & recorded
    assert options_of(Augmentation(erase_probability=0.25))["erase_probability"] == 0.25


def recolored(pixels, **limits):
    """Return an image prepared with changed colours and nothing else changed, and without."""
    still = {"rotation_probability": 0, "crop_probability": 0, "padding": (16, 16)}
    limits = {"brightness": 0, "saturation": 0, "hue_degrees": 0, "color_probability": 1} | limits
    rng = np.random.default_rng(3)
    chosen = Augmentation(**still, **limits)
    changed = prepare_image(pixels, SIZE, augmentation=chosen, rng=rng)
    return changed.rgb.astype(int), prepare_image(pixels, SIZE).rgb.astype(int)


def random_numbers():
    """Return the random numbers of the colours, which are drawn after those of the geometry."""
    rng = np.random.default_rng(3)
    rng.random(6)
    rng.integers(16, 16, endpoint=True)
    return rng.random(4)


def test_colors_are_changed_as_the_color_model_says_and_white_stays():
    pixels = rectangle(color=(120, 60, 30))
    draws = 2 * random_numbers() - 1
    centre = SIZE // 2
    changed, plain = recolored(pixels, brightness=0.4)
    expected = np.array([120, 60, 30]) * (1 + 0.4 * draws[1])
    assert np.abs(changed[centre, centre] - expected).max() <= 1
    assert (changed[0, 0] == 255).all()
    changed, _ = recolored(pixels, saturation=0.5)
    expected = 70 + (np.array([120, 60, 30]) - 70) * (1 + 0.5 * draws[2])  # 70 is the mean
    assert np.abs(changed[centre, centre] - expected).max() <= 1
    changed, _ = recolored(pixels, hue_degrees=120)
    mean, spread = changed[centre, centre].mean(), changed[centre, centre].std()
    assert mean == pytest.approx(70, abs=1)
    assert spread == pytest.approx(np.std([120, 60, 30]), abs=1)
    assert np.abs(changed[centre, centre] - [120, 60, 30]).max() > 5
    unchanged, plain = recolored(pixels)
    assert np.abs(unchanged - plain).max() <= 1  # rounding


def test_a_half_transparent_color_is_changed_under_the_white():
    pixels = rectangle(color=(100, 0, 0))
    pixels[..., 3] //= 2
    changed, _ = recolored(pixels, brightness=1.0)
    factor = 2 * random_numbers()[1]  # of the brightness
    alpha = pixels[..., 3].max() / 255
    centre = SIZE // 2
    expected = 255 - alpha * (255 - factor * np.array([100, 0, 0]))
    assert np.abs(changed[centre, centre] - expected).max() <= 1


def test_the_hue_turns_from_red_to_green():
    matrix = _color_matrix(1.0, 1.0, np.radians(120))
    assert matrix @ [1, 0, 0] == pytest.approx([0, 1, 0], abs=1e-6)


FILES = {
    "grey with alpha": lambda: saved(Image.fromarray(rectangle()).convert("LA")),
    "palette with transparency": lambda: saved(Image.fromarray(rectangle()).quantize(8)),
    "webp": lambda: saved(Image.fromarray(rectangle()), "WEBP", lossless=True),
    "animated gif": lambda: saved(
        Image.fromarray(rectangle()),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGBA", (100, 80), (1, 2, 3, 255))],
    ),
    "animated png": lambda: saved(
        Image.fromarray(rectangle()),
        "PNG",
        save_all=True,
        append_images=[Image.new("RGBA", (100, 80), (1, 2, 3, 255))],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_image_files_are_converted(name):
    image = load_image(FILES[name]())
    assert image.mode == "RGBA"
    assert has_alpha(image)
    mask = prepare_image(image, SIZE).mask
    assert (mask == prepare_image(rectangle(), SIZE).mask).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "I;16"])
def test_an_image_without_alpha_is_refused_with_advice(mode):
    grey = Image.fromarray((np.arange(400, dtype=np.uint16) * 160).reshape(20, 20))
    image = grey if mode == "I;16" else Image.new(mode, (20, 20))
    loaded = load_image(saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert loaded.mode == "RGBA"
    assert not has_alpha(loaded)
    with pytest.raises(ValueError, match="remove the background first"):
        prepare_image(loaded, SIZE)
    assert prepare_image(loaded, SIZE, whole_if_opaque=True).mask.any()


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 32768, 65535]], np.uint16).repeat(4, 0)
    assert (
        np.asarray(load_image(saved(Image.fromarray(values))))[0, :, 0] == [0, 1, 128, 255]
    ).all()


def test_camera_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert load_image(saved(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_is_applied_as_by_pillow(value):
    exif, image = (
        Image.Exif(),
        Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3),
    )
    exif[0x0112] = value
    expected = ImageOps.exif_transpose(Image.open(saved(image, "PNG", exif=exif))).convert("RGBA")
    assert np.array_equal(
        np.asarray(load_image(saved(image, "PNG", exif=exif))), np.asarray(expected)
    )


def test_orientation_is_applied_beside_damaged_metadata():
    orientation = (0x0112, 3, 1, struct.pack("<I", 6))
    resolution_of_wrong_type = (0x011A, 2, 4, b"abc\0")
    entries = [orientation, resolution_of_wrong_type]
    directory = (
        struct.pack("<H", 2)
        + b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
        + bytes(4)
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory
    assert load_image(saved(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


def test_a_strip_whose_square_would_be_too_large_is_refused():
    strip = Image.new("RGBA", (60_000, 20), (9, 9, 9, 255))
    with pytest.raises(
        ValueError, match=r"within 8192 x 8192 pixels, got 60000 x 20: make it smaller"
    ):
        prepare_image(strip, SIZE, whole_if_opaque=True)


def huge_png(side):
    """Return a PNG whose header claims side x side pixels."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = side.to_bytes(4, "big") * 2 + bytes([8, 6, 0, 0, 0])
    return io.BytesIO(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def truncated_png():
    return io.BytesIO(saved(Image.effect_noise((64, 64), 50)).getvalue()[:900])


def float_tiff():
    return saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: huge_png(20_000), "must have at most 67108864 pixels"),
        (lambda: huge_png(8_200), "got 8200 x 8200 = 67240000"),
        (lambda: io.BytesIO(b"<html>"), "must be a readable image"),
        (truncated_png, "must be a readable image"),
        (lambda: "/nonexistent.png", "/nonexistent.png must be a readable image"),
        (float_tiff, "8 or 16 bits for each channel, got mode 'F'"),
    ],
)
def test_unusable_files_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((50, 50, 4), np.uint8), "must have a foreground .* its largest alpha is 0"),
        (np.full((1, 1, 4), 200, np.uint8), "foreground of at least 8 pixels, got 1 x 1"),
        (np.zeros((0, 5, 4), np.uint8), "must have a foreground"),
        (np.zeros((5, 5, 3), np.uint8), "must be RGBA uint8"),
        (np.zeros((5, 5, 4), np.float32), "must be RGBA uint8"),
    ],
)
def test_unusable_images_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        prepare_image(pixels, SIZE)


def test_augmentation_needs_a_random_generator():
    with pytest.raises(ValueError, match="rng must be given with augmentation"):
        prepare_image(rectangle(), SIZE, augmentation=Augmentation())


def prepared(*cells, side=8, seed=0):
    """Return an image of noise with one pixel of foreground in each (column, row) patch."""
    rgb = np.random.default_rng(seed).integers(0, 256, (14 * side, 14 * side, 3), np.uint8)
    mask = np.zeros(rgb.shape[:2], bool)
    for column, row in cells:
        mask[14 * row + 13, 14 * column] = True
    return PreparedImage(rgb, mask)


def test_only_foreground_patches_are_kept_with_their_coordinates():
    batch = ImageBatch.collate([prepared((3, 1), (0, 2)), prepared((7, 7))])
    first = [*[[0, 0, 0, 1]] * SPECIAL, [0, 3, 1, 0], [0, 0, 2, 0]]
    second = [*[[1, 0, 0, 1]] * SPECIAL, [1, 7, 7, 0]]
    assert batch.coords.tolist() == [*first, *second]
    assert batch.starts.tolist() == [0, 7, 13]
    assert batch.max_tokens == 7
    with pytest.raises(ValueError, match="images must be of one size"):
        ImageBatch.collate([prepared((0, 0)), prepared((0, 0), side=4)])
    with pytest.raises(ValueError, match="images must be of one size"):
        ImageBatch.collate([])


def test_the_tokens_of_one_three_and_two_views_are_those_of_each_image():
    places = [(3, 1), (0, 2), (7, 7), (1, 0), (4, 4), (2, 6)]
    images = [prepared(place, seed=n) for n, place in enumerate(places)]
    batch = ImageBatch.collate(images, views=[1, 3, 2])
    of_view = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    expected = []
    for (asset, view), (column, row) in zip(of_view, places, strict=True):
        expected += [[asset, 0, 0, 2 * view + 1]] * SPECIAL + [[asset, column, row, 2 * view]]
    assert batch.coords.tolist() == expected
    per_image = SPECIAL + 1
    assert batch.starts.tolist() == [0, per_image, 4 * per_image, 6 * per_image]
    assert batch.max_tokens == 3 * per_image
    encoder = StandInEncoder(32, 1, 2, SIZE)
    alone = [encoder(ImageBatch.collate([image])) for image in images]
    tokens = encoder(batch)
    torch.testing.assert_close(tokens.feats_SC, torch.cat([one.feats_SC for one in alone]))
    assert tokens.batch_size == 3
    # Views that were encoded apart are joined to the same condition.
    joined = ImageTokens.joined(alone[1:4])
    chosen = batch.coords[:, 0] == 1
    torch.testing.assert_close(joined.feats_SC, tokens.feats_SC[chosen])
    assert torch.equal(joined.coords[:, 1:], batch.coords[chosen][:, 1:])
    assert (joined.starts.tolist(), joined.max_tokens) == ([0, 3 * per_image], 3 * per_image)
    for views in ([1, 3, 3], [0, 6]):
        with pytest.raises(ValueError, match="views must be 1 or more and 6 together"):
            ImageBatch.collate(images, views=views)


def test_joined_views_of_several_assets_lie_asset_by_asset():
    encoder = StandInEncoder(32, 1, 2, SIZE)
    first = [prepared((3, 1), (1, 1)), prepared((7, 7), seed=1)]
    second = [prepared((0, 2), seed=2), prepared((5, 5), (5, 6), (6, 6), seed=3)]
    joined = ImageTokens.joined([encoder(ImageBatch.collate(images)) for images in (first, second)])
    pairs = [image for pair in zip(first, second, strict=True) for image in pair]
    expected = encoder(ImageBatch.collate(pairs, views=[2, 2]))
    torch.testing.assert_close(joined.feats_SC, expected.feats_SC)
    assert torch.equal(joined.coords, expected.coords)
    assert torch.equal(joined.starts, expected.starts)
    assert joined.max_tokens == expected.max_tokens
    one = encoder(ImageBatch.collate([first[0]]))
    assert ImageTokens.joined([one]) is one
    with pytest.raises(ValueError, match=r"one number of assets, got \[1, 2\]"):
        ImageTokens.joined([one, expected])


ENCODERS = {
    "dinov2": lambda layers: DinoEncoder.random(32, layers, 2, SIZE),
    "stand-in": lambda layers: StandInEncoder(32, layers, 2, SIZE),
}
CONVOLUTIONAL = {
    "convolutions": lambda layers: StandInEncoder(32, layers, 2, SIZE, stem="convolutions")
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_token_of_a_patch_depends_on_its_own_pixels(kind):
    """Without layers each token depends on its own patch, which shows coordinates and order."""
    encoder = ENCODERS[kind](0)
    image = prepared((3, 1), (0, 2), (6, 5))
    before = encoder(ImageBatch.collate([image])).feats_SC
    changed = PreparedImage(image.rgb.copy(), image.mask)
    changed.rgb[14 * 5 : 14 * 6, 14 * 6 : 14 * 7] //= 2  # row 5, column 6
    condition = encoder(ImageBatch.collate([changed]))
    moved = (condition.feats_SC != before).any(1)
    assert condition.coords[moved].tolist() == [[0, 6, 5, 0]]


@pytest.mark.parametrize("kind", ENCODERS | CONVOLUTIONAL)
def test_a_batch_gives_the_tokens_of_each_image_alone(kind):
    encoder = (ENCODERS | CONVOLUTIONAL)[kind](2).eval()
    images = [prepared((3, 1), (0, 2)), prepared((7, 7), seed=1)]
    together = encoder(ImageBatch.collate(images)).feats_SC
    alone = torch.cat([encoder(ImageBatch.collate([image])).feats_SC for image in images])
    assert torch.allclose(together, alone, atol=TOLERANCE)
    assert together.mean(1).abs().max() < TOLERANCE  # normalised over channels
    patches = together[ImageBatch.collate(images).coords[:, 3] == 0]
    assert (patches.var(1, unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("size", [SIZE, 28])
def test_a_convolutional_stem_has_its_tokens_in_place(size):
    """A square inside a patch changes the token of this patch most."""
    torch.manual_seed(0)
    encoder = StandInEncoder(32, 0, 2, size, stem="convolutions")
    side = size // 14
    pixels = torch.zeros(1, 3, size, size)
    plain = encoder.stem(pixels)
    assert plain.shape == (1, 32, side, side)
    for row, column in {(0, 0), (side - 1, 0), (side // 2, side - 1), (0, side // 2)}:
        changed = pixels.clone()
        changed[..., 14 * row + 3 : 14 * row + 11, 14 * column + 3 : 14 * column + 11] = 3.0
        distance = (encoder.stem(changed) - plain).square().sum(1)[0]
        assert divmod(int(distance.argmax()), side) == (row, column)


def test_convolutions_of_a_stem_see_pixels_of_the_patches_beside_theirs():
    encoder = StandInEncoder(32, 0, 2, SIZE, stem="convolutions")
    for name, layer in encoder.stem.named_children():
        if isinstance(layer, torch.nn.GroupNorm):  # it sees the whole image
            setattr(encoder.stem, name, torch.nn.Identity())
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    changed = pixels.clone()
    changed[..., 26:28, 5] = 3.0  # the last pixels of the patch in row 1
    moved = (encoder.stem(changed) != encoder.stem(pixels)).any(1)[0]
    assert moved.nonzero().tolist() == [[1, 0], [2, 0]]


def test_weights_of_a_convolutional_stem_are_trained_and_need_groups():
    learning = StandInEncoder(32, 1, 2, SIZE, stem="convolutions")
    learning(ImageBatch.collate([prepared((3, 1))])).feats_SC.sin().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.stem.parameters())
    with pytest.raises(ValueError, match='multiple of 16 for stem "convolutions", got 24'):
        StandInEncoder(24, 1, 2, SIZE, stem="convolutions")
    config = EncoderConfig(kind="stand-in", image_size=28, channels=32, heads=2, dropout=0.5)
    built = build_encoder(replace(config, stem="convolutions"))
    assert [len(layer.stem) for layer in (built, build_encoder(config))] == [18, 3]
    assert {layer.dropout.p for layer in built.blocks} == {0.5}


def test_dropout_acts_in_training_only_and_by_the_seed():
    encoder = StandInEncoder(32, 1, 2, SIZE, dropout=0.5)
    plain = StandInEncoder(32, 1, 2, SIZE)
    plain.load_state_dict(encoder.state_dict())
    batch = ImageBatch.collate([prepared((3, 1))])

    def features(model, seed):
        torch.manual_seed(seed)
        return model(batch).feats_SC

    assert torch.equal(features(encoder.train(), 1), features(encoder, 1))
    assert not torch.equal(features(encoder, 1), features(encoder, 2))
    torch.testing.assert_close(features(encoder.eval(), 1), features(plain.eval(), 2))


def test_pixels_are_normalised_by_the_statistics_of_imagenet(monkeypatch):
    seen, encoder = [], StandInEncoder(32, 0, 2, SIZE)
    monkeypatch.setattr(
        encoder, "tokens", lambda x: seen.append(x) or torch.zeros(1, SPECIAL + 64, 32)
    )
    image = prepared((3, 1))
    image.rgb[:] = (124, 116, 104)  # ImageNet's mean
    image.rgb[0, 0] = (182, 174, 161)  # and one deviation (58, 57, 57) more
    encoder(ImageBatch.collate([image]))
    assert seen[0][..., 1:].abs().max() < 0.01
    assert torch.allclose(seen[0][0, :, 0, 0], torch.ones(3), atol=0.02)


def test_tokens_are_taken_before_the_last_norm():
    encoder = DinoEncoder.random(32, 2, 2, SIZE)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    exact = encoder.model(pixels, output_hidden_states=True)
    assert torch.allclose(encoder.tokens(pixels), exact.hidden_states[-1], atol=TOLERANCE)
    assert not torch.allclose(encoder.tokens(pixels), exact.last_hidden_state, atol=0.1)


def test_dinov2_is_frozen_and_the_stand_in_is_trainable():
    batch = ImageBatch.collate([prepared((3, 1))])
    frozen, learning = DinoEncoder.random().train(), StandInEncoder(32, 1, 2, SIZE)
    assert not frozen(batch).feats_SC.requires_grad
    assert not any(module.training for module in frozen.modules())
    learning(batch).feats_SC.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.stem.parameters())
    assert (frozen.trainable, learning.trainable) == (False, True)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images must be of 112 pixels for DINOv2, got 56"):
        DinoEncoder.random()(ImageBatch.collate([prepared((0, 0), side=4)]))


def test_unconditional_and_dropped_features_are_zero_at_the_same_coordinates():
    condition = StandInEncoder(32, 1, 2, SIZE)(
        ImageBatch.collate([prepared((3, 1)), prepared((1, 1)), prepared((2, 2))])
    )
    nothing = condition.unconditional()
    assert not nothing.feats_SC.any()
    assert nothing.coords is condition.coords
    dropped = condition.drop(torch.tensor([False, True, False]))
    first, second = condition.starts[1], condition.starts[2]
    assert not dropped.feats_SC[first:second].any()
    for rows in (slice(0, first), slice(second, None)):
        assert torch.equal(dropped.feats_SC[rows], condition.feats_SC[rows])


def test_weights_are_loaded_from_a_directory(tmp_path):
    encoder = DinoEncoder.random(32, 1, 2, SIZE)
    encoder.model.save_pretrained(tmp_path)
    again = build_encoder(EncoderConfig(weights=str(tmp_path), image_size=SIZE, channels=32))
    assert next(again.parameters()).dtype == torch.bfloat16
    pixels = torch.randn(1, 3, SIZE, SIZE)
    assert torch.allclose(
        again.tokens(pixels).float(), encoder.tokens(pixels), atol=0.05, rtol=0.05
    )
    with pytest.raises(ValueError, match="channels must be 32"):
        build_encoder(EncoderConfig(weights=str(tmp_path), image_size=SIZE))


def test_missing_weights_are_an_error_with_advice(tmp_path):
    with pytest.raises(UserError, match="run `hf download facebook/dinov2-with-registers-large"):
        DinoEncoder.load(str(tmp_path))


@pytest.mark.gpu
def test_encoding_copies_nothing_to_the_host():
    encoder = DinoEncoder.random().cuda()
    batch = ImageBatch.collate([prepared((3, 1)), prepared((1, 1))]).to("cuda")
    encoder(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(batch).drop(torch.ones(2, dtype=torch.bool, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
