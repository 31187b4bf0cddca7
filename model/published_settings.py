"""Settings of the published Direct3D-S2 models, translated into our configurations.

The settings are the keywords of the published classes, as config.yaml of the published folder lists
them. A setting that is unknown, or whose value our models do not support, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from model.config import (
    ConditionedDiTConfig,
    DiTConfig,
    EncoderConfig,
    OccupancyConfig,
    RefinerConfig,
    TimeSchedule,
    VAEConfig,
)
from pipeline.core.errors import UserError
from pipeline.core.grid import CELL_SIDE

VAE_WIDTHS = (32, 64, 128)  # of the published SS-VAE, before the width of its transformer
REFINER_WIDTHS = (8, 32, 128, 512)
REFINED_ISO_VALUE = 0.4  # of the refined volume at 512
SIGNED_ISO_VALUE = 0.2  # of the volume whose undecoded voxels the refiner at 1024 has signed
OCCUPIED = 0.1  # probability from which the published pipeline takes a cell as occupied
DINO_VERSION = "dinov2_vitl14_reg"

Value = TypeVar("Value")
_REQUIRED: Any = object()


class Settings:
    """The keywords of a published class, each of which must be read.

    Args:
        values: The keywords.
        where: Name of their source in error messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._left = dict(values)

    def error(self, text: str) -> UserError:
        """Return an error about these settings."""
        return UserError(f"{self.where}: {text}")

    def take(self, name: str, kind: type[Value], default: Value = _REQUIRED) -> Value:
        """Return a setting.

        Raises:
            UserError: If the setting is missing and has no default, or has another type.
        """
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            raise self.error(f"the setting {name} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name} must be of type {kind.__name__}, got {value!r}")
        return value  # pyright: ignore[reportReturnType]

    def take_sizes(self, name: str) -> tuple[int, ...]:
        """Return a setting that is a list of positive numbers."""
        values = self.take(name, list)
        if not values or any(type(value) is not int or value < 1 for value in values):
            raise self.error(f"{name} must be a list of positive whole numbers, got {values!r}")
        return tuple(values)

    def require(self, name: str, supported: Any, default: Any = _REQUIRED) -> None:
        """Check that a setting has the only value that our models support."""
        value = self.take(name, type(supported), supported if default is _REQUIRED else default)
        if value != supported:
            raise self.error(f"{name} must be {supported!r} here, got {value!r}")

    def ignore(self, *names: str) -> None:
        """Drop settings that do not change what a model computes."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        """Check that every setting has been read.

        Raises:
            UserError: If there are others, which this code does not know.
        """
        if self._left:
            unknown = ", ".join(f"{name} = {value!r}" for name, value in self._left.items())
            raise self.error(f"unknown setting {unknown}")

    def build(self, cls: type[Value], **values: Any) -> Value:
        """Make a configuration after every setting has been read.

        Raises:
            UserError: If a value is out of range or a setting is left.
        """
        self.done()
        try:
            return cls(**values)
        except ValueError as error:
            raise self.error(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """The affine map from the data of a published flow to latents: z = x / scale + shift."""

    scale: float = 1.0
    shift: float = 0.0


def _latent_scale(settings: Settings) -> LatentScale:
    scale = settings.take("latents_scale", float, 1.0)
    shift = settings.take("latents_shift", float, 0.0)
    if not 0 < scale < float("inf") or not abs(shift) < float("inf"):
        raise settings.error(
            f"latents_scale and latents_shift must be finite, got {scale} and {shift}"
        )
    return LatentScale(scale=scale, shift=shift)


def sparse_vae(values: Mapping[str, Any], where: str) -> tuple[VAEConfig, int, LatentScale]:
    """Translate the settings of SparseSDFVAE.

    Returns:
        The configuration, the resolution R of its grid, and the scale of its latents.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.ignore("use_fp16", "use_checkpoint", "chunk_size")  # memory alone
    settings.require("out_channels", 1)
    resolution = CELL_SIDE * settings.take("resolution", int, 64)
    sizes = []
    for part in ("encoder", "decoder"):
        width = settings.take(f"model_channels_{part}", int, 512)
        blocks = settings.take(f"num_blocks_{part}", int, 4)
        heads = settings.take(f"num_heads_{part}", int, 8)
        settings.ignore(f"num_head_channels_{part}")  # the number of heads decides
        sizes.append({"model_channels": width, "num_blocks": blocks, "num_heads": heads})
    encoder, decoder = sizes
    for name, size in encoder.items():
        if decoder[name] != size:
            raise settings.error(
                f"{name}_decoder must be {name}_encoder = {size}, got {decoder[name]}"
            )
    latents = settings.take("embed_dim", int)
    scale = _latent_scale(settings)
    config = settings.build(
        VAEConfig,
        widths=(*VAE_WIDTHS, encoder["model_channels"]),
        latent_channels=latents,
        heads=encoder["num_heads"],
        blocks=encoder["num_blocks"],
        plus_one_pooling=True,
    )
    return config, resolution, scale


def _position_resolution(settings: Settings, factor: float, resolution: int) -> int:
    """Return the resolution at which a factor of the coordinates would be 1."""
    product = factor * resolution
    if product < 1 or product != int(product):
        raise settings.error(
            f"factor x 8 x resolution must be a positive whole number, got {product:g}"
        )
    return int(product)


def sparse_dit(values: Mapping[str, Any], where: str) -> tuple[DiTConfig, int]:
    """Translate the settings of SparseDiT.

    Returns:
        The configuration and the resolution R of the grid.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.ignore("use_fp16", "use_checkpoint")
    # The published sparse attention does not take this setting, so it has no effect.
    settings.ignore("qk_rms_norm")
    settings.require("pe_mode", "ape")
    settings.require("selection_block_size", CELL_SIDE)
    settings.require("use_shift", True, False)
    cells = settings.take("resolution", int)
    latents = settings.take("in_channels", int)
    settings.require("out_channels", latents, 0)
    factor = settings.take("factor", float, 1.0)
    config = settings.build(
        DiTConfig,
        channels=settings.take("model_channels", int),
        blocks=settings.take("num_blocks", int),
        heads=settings.take("num_heads", int),
        kv_heads=settings.take("num_kv_heads", int, 2),
        mlp_ratio=_whole(settings, "mlp_ratio", 4.0),
        latent_channels=latents,
        condition_channels=settings.take("cond_channels", int),
        compression=settings.take("compression_version", str, "v2"),
        compress_block=settings.take("compression_block_size", int),
        top_k=settings.take("topk", int),
        plus_one_pooling=True,
        position_resolution=_position_resolution(settings, factor, CELL_SIDE * cells),
        condition_projection=settings.take("sparse_conditions", bool),
    )
    return config, CELL_SIDE * cells


def _whole(settings: Settings, name: str, default: float) -> int:
    value = settings.take(name, float, default)
    if value != int(value):
        raise settings.error(f"{name} must be a whole number, got {value}")
    return int(value)


def dense_dit(values: Mapping[str, Any], where: str) -> tuple[DiTConfig, int]:
    """Translate the settings of DenseDiT.

    Returns:
        The configuration and the side of the grid of latents.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.ignore("use_fp16", "use_checkpoint")
    settings.require("pe_mode", "ape")
    settings.require("patch_size", 1, 2)
    side = settings.take("resolution", int)
    latents = settings.take("in_channels", int)
    settings.require("out_channels", latents, 0)
    settings.require("latent_shape", [latents, side, side, side])
    heads = settings.take("num_heads", int)
    config = settings.build(
        DiTConfig,
        attention="full",
        channels=settings.take("model_channels", int),
        blocks=settings.take("num_blocks", int),
        heads=heads,
        kv_heads=heads,
        mlp_ratio=_whole(settings, "mlp_ratio", 4.0),
        latent_channels=latents,
        condition_channels=settings.take("cond_channels", int),
        plus_one_pooling=True,
        position_resolution=CELL_SIDE * side,  # the coordinates of the latents as they are
        condition_projection=False,
        qk_norm=settings.take("qk_rms_norm", bool, False),
    )
    return config, side


def dense_vae(
    values: Mapping[str, Any], latent_side: int, where: str
) -> tuple[OccupancyConfig, LatentScale]:
    """Translate the settings of DenseShapeVAE.

    Args:
        values: The settings.
        latent_side: Side of the grid of latents, which the settings of DenseDiT give.
        where: Name of the source in error messages.

    Returns:
        The configuration and the scale of the latents.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.ignore("use_fp16", "use_checkpoint")
    settings.require("in_channels", 1)
    settings.require("out_channels", 1)
    encoder = settings.take_sizes("model_channels_encoder")
    decoder = settings.take_sizes("model_channels_decoder")
    blocks = {}
    for part in ("encoder", "decoder"):
        blocks[part] = settings.take(f"num_res_blocks_{part}", int)
        settings.require(f"num_res_blocks_middle_{part}", blocks[part], 0)
    scale = _latent_scale(settings)
    config = settings.build(
        OccupancyConfig,
        side=latent_side * 2 ** (len(encoder) - 1),
        widths=encoder,
        blocks=blocks["encoder"],
        latent_channels=settings.take("embed_dim", int),
        norm="layer",
        decoder_widths=decoder[::-1],
        decoder_blocks=blocks["decoder"],
        threshold=OCCUPIED,
    )
    return config, scale


def image_encoder(
    values: Mapping[str, Any], channels: int, weights: str, where: str
) -> EncoderConfig:
    """Translate the settings of DinoEncoder.

    Args:
        values: The settings.
        channels: Channels of the tokens, which the settings of the DiTs give.
        weights: Folder or name on the Hugging Face hub of the weights, which are DINOv2's own.
        where: Name of the source in error messages.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.require("model", "facebookresearch/dinov2")
    settings.require("version", DINO_VERSION)
    return settings.build(
        EncoderConfig,
        weights=weights,
        image_size=settings.take("size", int, 518),
        channels=channels,
        precision="fp32",
        preparation="published",
    )


def time_schedule(values: Mapping[str, Any], where: str) -> TimeSchedule:
    """Translate the settings of FlowMatchEulerDiscreteScheduler.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.require("num_train_timesteps", 1000)
    return settings.build(
        TimeSchedule, spacing="published", shift=settings.take("shift", float, 1.0)
    )


def refiner(values: Mapping[str, Any], *, signs: bool, where: str) -> RefinerConfig:
    """Translate the settings of Voxel_RefinerXL, or of Voxel_RefinerXL_sign if `signs`.

    Raises:
        UserError: If a setting is unknown or not supported.
    """
    settings = Settings(values, where)
    settings.ignore("use_fp16", "use_checkpoint", "res", "infer_patch_size")
    settings.require("in_channels", 1)
    settings.require("out_channels", 1)
    patch = settings.take("patch_size", int, 192)
    return settings.build(
        RefinerConfig,
        output="sign" if signs else "sdf",
        widths=REFINER_WIDTHS,
        blocks=settings.take("layers_per_block", int, 2),
        middle_blocks=settings.take("layers_mid_block", int, 2),
        patch_size=patch,
        # Patches of 192 overlap by 32, those that give signs by half.
        overlap=patch // 2 if signs else patch // 6,
        iso_value=SIGNED_ISO_VALUE if signs else REFINED_ISO_VALUE,
    )


def conditioned(
    dit: DiTConfig, encoder: EncoderConfig, schedule: TimeSchedule, where: str
) -> ConditionedDiTConfig:
    """Return the configuration of a published DiT with its image encoder.

    Raises:
        UserError: If the sizes do not fit each other.
    """
    try:
        return ConditionedDiTConfig(
            dit=dit,
            encoder=encoder,
            image_tokens="foreground" if dit.condition_projection else "all",
            schedule=schedule,
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
