"""All configuration of the models and of generation. It is read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.core.grid import CELL_SIDE
from pipeline.core.options import BEFORE, added, at_least, between, check_bounds

HEAD_SIZES = (16, 32, 64, 128)  # channels of a head that the attention kernels support
QUERY_HEADS_PER_KV_HEAD = (1, 2, 4, 8, 16, 32)  # that the SSA kernels support
COMPRESSION_GROUPS = 32  # groups of GroupNorm in version 2 of the compression
PATCH = 14  # pixels along one side of an image patch, which is one token
DINO_WEIGHTS = "facebook/dinov2-with-registers-large"
DEFAULT_STEPS = (50, 30, 15)  # of each stage; Direct3D-S2 paper (arXiv 2505.17412), section 4
DEFAULT_GUIDANCE = 7.0  # as in the published Direct3D-S2 pipeline

Compression = Literal["v1", "v2"]
Method = Literal["euler", "heun"]
METHODS: tuple[Method, ...] = ("euler", "heun")
# What the blocks of a DiT keep for the backward pass, from the most memory to the least.
KeptActivations = Literal["all", "products", "attention"]
KEPT_LEVELS: tuple[KeptActivations, ...] = ("all", "products", "attention")
Preparation = Literal["one_resize", "published"]
KeptTokens = Literal["foreground", "all"]
Stem = Literal["patches", "convolutions"]
Refine = Literal["none", "512", "all"]
REFINE: tuple[Refine, ...] = ("none", "512", "all")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16")
Spacing = Literal["even", "published"]
SPACINGS: tuple[Spacing, ...] = ("even", "published")


def _check_choice(config: object, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            wanted = " or ".join(f'"{choice}"' for choice in allowed)
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _check_at_least_one(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def _check_heads(heads: int, channels: int) -> None:
    if channels % heads or channels // heads not in HEAD_SIZES:
        raise ValueError(
            f"heads must split {channels} channels into one of {HEAD_SIZES}, got {heads}"
        )


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the SS-VAE. The defaults are those of the paper (37,874,113 parameters)."""

    widths: tuple[int, int, int, int] = (32, 64, 128, 512)
    """Numbers of channels at the resolutions R, R / 2, R / 4 and R / 8."""
    latent_channels: int = 16
    """Number of latent channels of each token."""
    heads: int = 8
    """Number of attention heads. The last of `widths` divided by it must be 16, 32, 64 or 128."""
    blocks: int = 4
    """Number of transformer blocks in the encoder, and also in the decoder."""
    mlp_ratio: int = 4
    """Hidden channels of an MLP, as a multiple of the last width."""
    groups: int = 32
    """Number of groups of each GroupNorm. It must divide every width."""
    plus_one_pooling: bool = False
    """Let means divide by n + 1 instead of n. The published Direct3D-S2 weights need this."""

    def __post_init__(self) -> None:
        if len(self.widths) != 4 or any(width < 1 for width in self.widths):
            raise ValueError(f"widths must be 4 positive numbers, got {self.widths}")
        _check_at_least_one(self, "latent_channels", "heads", "blocks", "mlp_ratio", "groups")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups must divide all widths {self.widths}, got {self.groups}")
        _check_heads(self.heads, self.widths[3])


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the SS-DiT. The defaults are those of the paper (509,647,888 parameters)."""

    channels: int = 1024
    """Number of channels of each token inside the transformer."""
    blocks: int = 24
    """Number of transformer blocks."""
    heads: int = 32
    """Number of attention heads. `channels` divided by it must be 16, 32, 64 or 128."""
    kv_heads: int = 2
    """Number of key/value heads of spatial sparse attention. Each serves heads / kv_heads heads."""
    mlp_ratio: int = 4
    """Hidden channels of an MLP, as a multiple of `channels`."""
    latent_channels: int = 16
    """Number of latent channels of each token, equal to that of the VAE."""
    condition_channels: int = 1024
    """Number of channels of an image token, equal to that of the image encoder."""
    attention: Literal["ssa", "full"] = "ssa"
    """Self-attention: "ssa" is spatial sparse attention, "full" attends to all tokens."""
    compression: Compression = "v1"
    """How SSA makes one key and value of a block: "v1" is a linear layer, "v2" convolutions."""
    compress_block: int = 4
    """Tokens along one side of a compressed block of SSA, 4 or 8."""
    top_k: int = 8
    """Number of blocks of 8^3 cells that SSA selects for each token."""
    shifted_windows: bool = True
    """Shift the attention windows by half their size in every other transformer block."""
    plus_one_pooling: bool = False
    """Let means divide by n + 1 instead of n. The published Direct3D-S2 weights need this."""
    position_resolution: int = added(512, before=512)
    """Resolution at which positions are the coordinates of the cells. At another resolution R the
    coordinates are multiplied by position_resolution / R."""
    min_position_factor: float = added(0.0, before=1.0)
    """Smallest factor of the coordinates. 0 sets no limit. Models that were trained before this
    option existed have 1, which leaves the coordinates at R = 1024 as they are."""
    condition_projection: bool = added(True, before=True)
    """Project the image tokens by a linear layer and add embeddings of their positions. Version 1.1
    of the published weights attends to the image encoder's tokens as they are."""
    qk_norm: bool = added(False, before=False)
    """Normalise the queries and keys of each head of full self-attention, with learned scales."""
    dropout: float = between(0.0, 0.9, 0.0, is_added=True)
    """Share of the values of each branch of a block, self-attention, cross-attention and MLP, that
    training sets to 0. Generation keeps all."""

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_at_least_one(
            self,
            "channels",
            "blocks",
            "heads",
            "kv_heads",
            "mlp_ratio",
            "latent_channels",
            "top_k",
            "condition_channels",
            "position_resolution",
        )
        _check_choice(self, attention=("ssa", "full"), compression=("v1", "v2"))
        if not 0.0 <= self.min_position_factor < float("inf"):
            raise ValueError(
                f"min_position_factor must be 0 or more and finite, got {self.min_position_factor}"
            )
        if self.qk_norm and self.attention != "full":
            raise ValueError(f'qk_norm needs attention "full", got {self.attention!r}')
        if self.compress_block not in (4, 8):
            raise ValueError(f"compress_block must be 4 or 8, got {self.compress_block}")
        _check_heads(self.heads, self.channels)
        if self.heads % self.kv_heads or self.heads // self.kv_heads not in QUERY_HEADS_PER_KV_HEAD:
            raise ValueError(
                f"kv_heads must be heads = {self.heads} divided by one of "
                f"{QUERY_HEADS_PER_KV_HEAD}, got {self.kv_heads}"
            )
        if self.compression == "v2" and self.kv_channels % COMPRESSION_GROUPS:
            raise ValueError(
                f"kv_heads x head size must be a multiple of {COMPRESSION_GROUPS} for v2, "
                f"got {self.kv_channels}"
            )

    @property
    def kv_channels(self) -> int:
        """Channels of the keys of all key and value heads together."""
        return self.channels // self.heads * self.kv_heads

    def position_factor(self, resolution: int) -> float:
        """Return the factor of the cells' coordinates at resolution R of the grid."""
        return max(self.min_position_factor, self.position_resolution / resolution)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The image encoder."""

    kind: Literal["dinov2", "stand-in"] = "dinov2"
    """The paper's frozen encoder ("dinov2"), or a small one trained with the DiT ("stand-in")."""
    weights: str = DINO_WEIGHTS
    """DINOv2 weights: a folder or a name on the Hugging Face hub."""
    image_size: int = 518
    """Side of the square input image in pixels, a multiple of 14."""
    channels: int = 1024
    """Number of channels of an image token."""
    layers: int = 4
    """Number of transformer layers of the stand-in encoder. DINOv2 ignores this."""
    heads: int = 4
    """Number of attention heads of the stand-in encoder. DINOv2 ignores this."""
    precision: Literal["bf16", "fp32"] = added("bf16", before="bf16")
    """Precision of DINOv2's weights. The stand-in encoder ignores this."""
    preparation: Literal["one_resize", "published"] = added("one_resize", before="one_resize")
    """How images are prepared: by one resampling ("one_resize"), or as the published Direct3D-S2
    pipeline does it, whose weights were trained with that ("published")."""
    stem: Literal["patches", "convolutions"] = added("patches", before="patches")
    """How the stand-in encoder turns pixels into the tokens of patches of 14 x 14 pixels: two
    convolutions over each patch alone ("patches"), or overlapping 3 x 3 convolutions ("Early
    convolutions help transformers see better", arXiv 2106.14881). DINOv2 ignores this."""
    dropout: float = between(0.0, 0.9, 0.0, is_added=True)
    """Share of the values of each branch of a layer of the stand-in encoder that training sets to
    0. DINOv2 ignores this."""

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_choice(
            self,
            kind=("dinov2", "stand-in"),
            precision=("bf16", "fp32"),
            preparation=("one_resize", "published"),
            stem=("patches", "convolutions"),
        )


@dataclass(frozen=True, kw_only=True)
class TimeSchedule:
    """The times of the sampling steps."""

    spacing: Literal["even", "published"] = added("even", before="even")
    """Evenly spaced from 1 to 0 before the shift ("even"), or from 1 to the shifted 0.001 before
    the shift, and then 0, as the published Direct3D-S2 pipeline does ("published")."""
    shift: float = added(1.0, before=1.0)
    """Values above 1 move the times towards the noise at t = 1. 1 leaves them as they are."""

    def __post_init__(self) -> None:
        _check_choice(self, spacing=SPACINGS)
        if not 0.0 < self.shift < float("inf"):
            raise ValueError(f"shift must be positive and finite, got {self.shift}")


@dataclass(frozen=True, kw_only=True)
class ConditionedDiTConfig:
    """A DiT and the image encoder whose tokens it attends to."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    image_tokens: Literal["foreground", "all"] = added("foreground", before="foreground")
    """Image tokens that the DiT attends to. "foreground" takes the class token, the registers and
    the patches that show the object. "all" takes the tokens of all patches."""
    schedule: TimeSchedule = field(default_factory=TimeSchedule, metadata={BEFORE: {}})
    """Times of the sampling steps. Training does not depend on them."""
    views: int = added(1, before=1)
    """Largest number of views of a training sample. Above 1, each sample is conditioned on 1 to
    this many views of its asset, drawn with equal probability, and the DiT attends to the tokens of
    all views together, in training and in generation. A model of one view averages the velocities
    of several views in generation."""

    def __post_init__(self) -> None:
        _check_choice(self, image_tokens=("foreground", "all"))
        _check_at_least_one(self, "views")
        if self.views > 1 and not self.dit.condition_projection:
            raise ValueError(
                f"views must be 1 without dit.condition_projection, got {self.views}, because "
                "image tokens then have no positions that tell the views apart"
            )
        if self.dit.condition_channels != self.encoder.channels:
            raise ValueError(
                "dit.condition_channels must be the encoder's channels, "
                f"got {self.dit.condition_channels} and {self.encoder.channels}"
            )


@dataclass(frozen=True, kw_only=True)
class OccupancyConfig:
    """Sizes of the occupancy VAE. The defaults are for the 64^3 cells of R = 512."""

    side: int = 64
    """Cells along one side of the grid, which is R / 8."""
    widths: tuple[int, ...] = (32, 128, 512)
    """Channels at each depth. Every depth after the first halves the side of the grid."""
    blocks: int = 2
    """Number of residual blocks at each depth. The last depth has twice as many."""
    groups: int = 32
    """Number of groups of each GroupNorm. It must divide every width."""
    latent_channels: int = 8
    """Number of latent channels at each position of the smallest grid."""
    norm: Literal["group", "layer"] = added("group", before="group")
    """Normalisation: over groups of channels and all cells ("group"), or over the channels of each
    cell ("layer"), as in the published Direct3D-S2 weights."""
    decoder_widths: tuple[int, ...] | None = added(None, before=None)
    """Channels of the decoder at each depth, from the full grid on. None takes `widths`."""
    decoder_blocks: int | None = added(None, before=None)
    """Residual blocks of the decoder at each depth. None takes `blocks`."""
    threshold: float = added(0.5, before=0.5)
    """A cell is occupied if its decoded probability is above this."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "side", "blocks", "groups", "latent_channels")
        _check_choice(self, norm=("group", "layer"))
        if self.decoder_blocks is not None:
            _check_at_least_one(self, "decoder_blocks")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        unit = self.groups if self.norm == "group" else 1
        for name in ("widths", "decoder_widths"):
            widths = getattr(self, name)
            if name == "decoder_widths" and widths is None:
                continue
            if not widths or any(width < 1 or width % unit for width in widths):
                wanted = f"positive multiples of groups = {unit}" if unit > 1 else "positive"
                raise ValueError(f"{name} must be {wanted}, got {widths}")
        if len(self.widths_of_decoder) != len(self.widths):
            raise ValueError(
                f"decoder_widths must be {len(self.widths)} numbers, got {self.decoder_widths}"
            )
        if self.side % self.factor:
            raise ValueError(
                f"side must be a multiple of {self.factor} for {len(self.widths)} widths, "
                f"got {self.side}"
            )

    @property
    def widths_of_decoder(self) -> tuple[int, ...]:
        """Channels of the decoder at each depth, from the full grid on."""
        return self.widths if self.decoder_widths is None else self.decoder_widths

    @property
    def factor(self) -> int:
        """Cells along one side of the region that one latent describes."""
        return 2 ** (len(self.widths) - 1)

    @property
    def latent_side(self) -> int:
        """Latents along one side of their grid."""
        return self.side // self.factor


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """The structure stage: the occupancy VAE and the DiT that generates its latents."""

    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)
    flow: ConditionedDiTConfig = field(
        default_factory=lambda: ConditionedDiTConfig(
            dit=DiTConfig(latent_channels=8, heads=16, kv_heads=16, attention="full")
        )
    )

    def __post_init__(self) -> None:
        dit, channels = self.flow.dit, self.occupancy.latent_channels
        if dit.latent_channels != channels:
            raise ValueError(
                f"flow.dit.latent_channels must be the occupancy VAE's {channels}, "
                f"got {dit.latent_channels}"
            )
        if dit.attention != "full":
            raise ValueError(
                f'flow.dit.attention must be "full" on a dense grid, got {dit.attention!r}'
            )

    @property
    def resolution(self) -> int:
        """Resolution R of the grid whose cells the stage generates."""
        return CELL_SIDE * self.occupancy.side


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """A refiner of decoded volumes. The defaults are those of the published one at R = 512."""

    output: Literal["sdf", "sign"] = "sdf"
    """What it computes: new values of all voxels ("sdf"), or the signs of the voxels that were not
    decoded, on a grid of half the resolution ("sign")."""
    widths: tuple[int, ...] = (8, 32, 128, 512)
    """Channels of the U-Net at each depth. Every depth after the first halves the resolution."""
    blocks: int = 2
    """Residual blocks of the U-Net at each depth on the way down. There is one more on the way up
    and at the bottom."""
    middle_blocks: int = 2
    """Residual blocks at the bottom of the U-Net, besides the first one."""
    groups: int = 4
    """Number of groups of each GroupNorm. It must divide every width."""
    features: int = 32
    """Channels of the decoder's features, which a refiner of signs does not take."""
    patch_size: int = 192
    """Voxels along one side of the patches that the refiner sees."""
    overlap: int = 32
    """Voxels by which neighbouring patches overlap."""
    iso_value: float = 0.4
    """Value of the surface in the refined volume."""

    def __post_init__(self) -> None:
        _check_choice(self, output=("sdf", "sign"))
        _check_at_least_one(self, "blocks", "middle_blocks", "groups", "features", "patch_size")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(
                f"widths must be positive multiples of groups = {self.groups}, got {self.widths}"
            )
        if self.patch_size % 2 ** (len(self.widths) - 1):
            raise ValueError(
                f"patch_size must be a multiple of {2 ** (len(self.widths) - 1)} for "
                f"{len(self.widths)} widths, got {self.patch_size}"
            )
        if not 0 <= self.overlap <= self.patch_size // 2:
            raise ValueError(
                f"overlap must be from 0 to half of patch_size = {self.patch_size}, "
                f"got {self.overlap}"
            )


@dataclass(frozen=True, kw_only=True)
class TimeDistribution:
    """The distribution of the times t in (0, 1) at which the flow is trained."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    """Sigmoid of a normal variable ("logit_normal"), or all times alike ("uniform")."""
    mean: float = 0.0
    """Mean of the normal variable."""
    std: float = 1.0
    """Standard deviation of the normal variable."""
    shift: float = 1.0
    """Values above 1 move the times towards the noise at t = 1. 1 leaves them as drawn."""

    def __post_init__(self) -> None:
        if self.kind not in ("logit_normal", "uniform"):
            raise ValueError(f'kind must be "logit_normal" or "uniform", got {self.kind!r}')
        for name in ("std", "shift"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance during sampling."""

    scale: float = DEFAULT_GUIDANCE
    """Factor of the difference between the velocities with and without the image. 1 takes the
    velocity with the image alone, at half the cost."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times at which guidance acts, ends included. Elsewhere the scale is 1."""
    rescale: float = 0.0
    """Share in [0, 1] by which the guided velocity is scaled towards the standard deviation of the
    conditional one. 0 leaves it as it is."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0.0 <= self.scale < float("inf"):
            raise ValueError(f"scale must be at least 0 and finite, got {self.scale}")
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"interval must be (low, high) with 0 <= low <= high <= 1, got {self.interval}"
            )
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"rescale must be from 0 to 1, got {self.rescale}")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a stage turns noise into a sample."""

    steps: int
    """Number of sampling steps."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance."""
    method: Method = "euler"
    """Solver: "euler" needs one model call a step, "heun" is of second order and needs two."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "steps")
        _check_choice(self, method=METHODS)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of training images, by default those of the published Direct3D-S2 code.

    The published code does not change colours.
    """

    rotation_probability: float = between(0.0, 1.0, 0.1)
    """Probability that an image is rotated."""
    rotation_degrees: float = at_least(0, 10.0)
    """Largest angle of a rotation, in either direction."""
    crop_probability: float = between(0.0, 1.0, 0.1)
    """Probability that an image is cropped."""
    crop_ratio: float = between(0.0, 1.0, 0.9)
    """Smallest side of a crop, relative to the square around the foreground."""
    padding: tuple[int, int] = (0, 32)
    """Smallest and largest number of white pixels around the foreground."""
    color_probability: float = between(0.0, 1.0, 0.0, is_added=True)
    """Probability that the colours of the foreground are changed."""
    brightness: float = between(0.0, 1.0, 0.3, is_added=True)
    """Largest relative change of the brightness of changed colours, in either direction."""
    saturation: float = between(0.0, 1.0, 0.5, is_added=True)
    """Largest relative change of the saturation of changed colours, in either direction."""
    hue_degrees: float = between(0.0, 180.0, 30.0, is_added=True)
    """Largest angle by which the hue of changed colours is turned, in either direction."""
    erase_probability: float = between(0.0, 1.0, 0.0, is_added=True)
    """Probability that a rectangle of the image becomes background, as if it were hidden."""
    erase_size: tuple[float, float] = added((0.1, 0.4), before=(0.1, 0.4))
    """Smallest and largest side of an erased rectangle, relative to that of the image."""

    def __post_init__(self) -> None:
        check_bounds(self)
        smallest, largest = self.erase_size
        if not 0 < smallest <= largest <= 1:
            raise ValueError(
                "erase_size must be (smallest, largest) with 0 < smallest <= largest <= 1, "
                f"got {self.erase_size}"
            )


@dataclass(frozen=True, kw_only=True)
class RecommendedSampling:
    """Sampling options that work best for an exported stage. None recommends nothing."""

    steps: int | None = None
    """Sampling steps of the stage."""
    guidance: float | None = None
    """Guidance scale of the stage."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"recommended steps must be 1 or more, got {self.steps}")
        if self.guidance is not None and self.guidance < 0:
            raise ValueError(f"recommended guidance must be 0 or more, got {self.guidance}")


@dataclass(frozen=True, kw_only=True)
class Meshing:
    """How the mesh of a resolution is made. It is recorded in the export of the DiT."""

    iso_value: float = 0.0
    """Value of the surface in the decoded bricks, between -1 and 1."""
    normalize: bool = False
    """Centre and scale the mesh of the resolution before, so that its longest side is 0.95, before
    the cells near it are taken. The published Direct3D-S2 pipeline does this."""

    def __post_init__(self) -> None:
        if not -1.0 < self.iso_value < 1.0:
            raise ValueError(f"iso_value must be between -1 and 1, got {self.iso_value}")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Sampling and cleaning of meshes."""

    resolution: int | None = None
    """Resolution of the mesh. None takes the finest one that has a model."""
    steps: tuple[int, ...] | None = None
    """Numbers of sampling steps of the structure stage and of each resolution. The last number
    holds for the stages after it. None takes the numbers that the export recommends, or
    50 30 15."""
    guidance: float | None = None
    """Guidance scale: how strongly the image steers sampling. 1 turns guidance off and halves the
    cost. None takes the scale that the export recommends, or 7 if it recommends none."""
    method: Method = "euler"
    """Solver: "euler" needs one model call a step, "heun" is of second order and needs two."""
    min_piece: float = 0.01
    """Separate pieces with less than this share of the largest piece's area are removed."""
    max_hole: float | None = None
    """Largest diameter of a hole that is closed, in units of the cube that holds the mesh. None
    closes all holes."""
    faces: int | None = None
    """Simplify the mesh to about this many faces. Sharp edges are kept, and a closed mesh stays
    closed. None keeps all faces."""
    refine: Refine | None = None
    """Refiners that improve the decoded volumes: "none", the one of the first resolution ("512"),
    or also the one that signs what was not decoded at the finer resolution ("all"). Without it the
    first one is used if the checkpoint has it."""
    precision: Precision = "auto"
    """Precision of matrix products. "auto" is bf16 on a GPU and fp32 on the CPU."""
    max_tokens: int = 400_000
    """Largest number of tokens of a stage. A stage with more of them fails."""

    def __post_init__(self) -> None:
        if self.steps is not None and (not self.steps or any(steps < 1 for steps in self.steps)):
            raise ValueError(f"steps must be 1 or more for each stage, got {self.steps}")
        if self.guidance is not None and self.guidance < 0:
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")
        if not 0 <= self.min_piece < 1:
            raise ValueError(f"min_piece must be in [0, 1), got {self.min_piece}")
        if self.max_hole is not None and self.max_hole < 0:
            raise ValueError(f"max_hole must be 0 or more, got {self.max_hole}")
        if self.faces is not None and self.faces < 4:
            raise ValueError(f"faces must be 4 or more, got {self.faces}")
        if self.refine is not None:
            _check_choice(self, refine=REFINE)
        _check_choice(self, precision=PRECISIONS)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")

    def sampling(self, stage: int, recommended: RecommendedSampling) -> SamplingOptions:
        """Return the sampling options of a stage.

        Args:
            stage: 0 is the structure stage, 1 the first resolution, 2 the next one, ...
            recommended: What the stage's export recommends.
        """
        default = DEFAULT_STEPS[min(stage, len(DEFAULT_STEPS) - 1)]
        steps = recommended.steps or default
        if self.steps is not None:
            steps = self.steps[min(stage, len(self.steps) - 1)]
        scales = (self.guidance, recommended.guidance, DEFAULT_GUIDANCE)
        scale = next(scale for scale in scales if scale is not None)
        return SamplingOptions(steps=steps, guidance=Guidance(scale=scale), method=self.method)


@dataclass(frozen=True, kw_only=True)
class PrintOptions:
    """Size and limits of a print."""

    size_mm: float = 100.0
    """Longest side of the printed object in millimetres."""
    min_wall_mm: float = 1.0
    """Smallest thickness of a wall in millimetres."""
    max_overhang_degrees: float = 45.0
    """Largest angle of an overhang from the vertical that prints without supports, in degrees."""

    def __post_init__(self) -> None:
        for name in ("size_mm", "min_wall_mm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.max_overhang_degrees <= 90:
            raise ValueError(
                f"max_overhang_degrees must be from 0 to 90, got {self.max_overhang_degrees}"
            )
