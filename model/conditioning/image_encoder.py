"""Image encoders: frozen DINOv2, or a small stand-in that is trained with the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.conditioning.image_preprocessing import PreparedImage
from model.config import DINO_WEIGHTS, PATCH, EncoderConfig, KeptTokens, Stem
from model.image_tokens import ImageTokens
from model.layers import init_linears, layer_norm, position_embedding
from pipeline.core.errors import UserError

STEM_GROUPS = 2  # of each GroupNorm of a convolutional stem
SPECIAL = 5  # tokens before those of the patches: the class token and 4 registers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the RGB values of ImageNet


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Prepared images of one size, and which tokens of the encoder are kept.

    The kept tokens are the class token, the registers, and the patches with foreground or all
    patches.

    Attributes:
        pixels: uint8 [I, 3, size, size], the images of asset 0, then those of asset 1, and so on.
        rows: int64 [S], the kept rows among the encoder's I * (SPECIAL + patches) tokens.
        coords: int32 [S, 4], as `ImageTokens.coords`.
        starts: int32 [B + 1], as `ImageTokens.starts`.
        max_tokens: Number of kept tokens of the asset that has most.
    """

    pixels: Tensor
    rows: Tensor
    coords: Tensor
    starts: Tensor
    max_tokens: int

    @classmethod
    def collate(
        cls,
        images: Sequence[PreparedImage],
        kept: KeptTokens = "foreground",
        views: Sequence[int] | None = None,
    ) -> ImageBatch:
        """Make a batch on the CPU.

        Args:
            images: The images.
            kept: Whether the patches with foreground are kept, or all of them.
            views: Number of views of each asset. The images are then the views of the first asset,
                followed by those of the next one. None takes one image for each asset.

        Raises:
            ValueError: If there is no image, the sizes differ or are no multiple of PATCH, or
                `views` does not divide the images among assets.
        """
        views = [1] * len(images) if views is None else views
        if sum(views) != len(images) or any(count < 1 for count in views):
            raise ValueError(
                f"views must be 1 or more and {len(images)} together, the number of images, "
                f"got {list(views)}"
            )
        sizes = sorted({image.rgb.shape[0] for image in images})
        if len(sizes) != 1 or sizes[0] % PATCH:
            raise ValueError(
                f"images must be of one size, a multiple of {PATCH} pixels, got {sizes}"
            )
        side = sizes[0] // PATCH
        coords, rows = [], []
        counts = np.zeros(len(views), np.int64)  # tokens of each asset
        places = [(asset, view) for asset, count in enumerate(views) for view in range(count)]
        for number, (image, (asset, view)) in enumerate(zip(images, places, strict=True)):
            has_foreground = image.mask.reshape(side, PATCH, side, PATCH).any(axis=(1, 3))
            row, column = np.nonzero(has_foreground | (kept == "all"))
            first = number * (SPECIAL + side * side)
            coords.append(np.tile([asset, 0, 0, 2 * view + 1], (SPECIAL, 1)))
            patch = np.broadcast_arrays(asset, column, row, 2 * view)
            coords.append(np.stack(patch, 1))
            rows.append(first + np.concatenate([np.arange(SPECIAL), SPECIAL + row * side + column]))
            counts[asset] += len(rows[-1])
        pixels = torch.from_numpy(np.stack([image.rgb for image in images]))
        return cls(
            pixels.permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(np.concatenate(rows)),
            torch.from_numpy(np.concatenate(coords).astype(np.int32)),
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            int(counts.max()),
        )

    @property
    def size(self) -> int:
        """Pixels along one side of an image."""
        return self.pixels.shape[2]

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageBatch:
        return replace(
            self,
            pixels=function(self.pixels),
            rows=function(self.rows),
            coords=function(self.coords),
            starts=function(self.starts),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageBatch:
        """Return the batch on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """Return a copy in page-locked memory, for `to(..., non_blocking=True)`."""
        return self._map(lambda x: x.pin_memory())


class ImageEncoder(nn.Module):
    """Base class of image encoders: images to image tokens. A subclass defines `tokens`.

    Attributes:
        channels: Channels of a token.
        image_size: Pixels along one side of the images that it takes.
        trainable: Whether it is trained together with the generator.
        label: How results name it.
    """

    channels: int
    image_size: int
    mean: Tensor
    std: Tensor
    trainable: bool
    label: str

    def __init__(self):
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels_BCHW: [B, 3, size, size], normalised by the statistics of ImageNet.

        Returns:
            [B, SPECIAL + patches, channels], before any last norm.
        """
        raise NotImplementedError

    def forward(self, batch: ImageBatch) -> ImageTokens:
        """Encode a batch of images. No data is copied from the device to the host.

        Returns:
            The kept tokens, each normalised to mean 0 and deviation 1.

        Raises:
            ValueError: If the images have another size.
        """
        if batch.size != self.image_size:
            raise ValueError(
                f"images must be of {self.image_size} pixels for {self.label}, got {batch.size}"
            )
        tokens_BTC = self.tokens((batch.pixels.float() / 255 - self.mean) / self.std)
        feats_SC = layer_norm(tokens_BTC.flatten(0, 1)[batch.rows], eps=1e-5)
        return ImageTokens(feats_SC, batch.coords, batch.starts, batch.max_tokens)


class DinoEncoder(ImageEncoder):
    """Frozen DINOv2 with registers. Its tokens are taken before its last norm.

    Direct3D-S2 paper (arXiv 2505.17412), section 4.

    Args:
        model: A `Dinov2WithRegistersModel` of the transformers library.
        image_size: Pixels along one side of the images.

    Raises:
        ValueError: If the model has another patch size or number of registers.
    """

    trainable = False
    label = "DINOv2"

    def __init__(self, model: nn.Module, image_size: int = 518):
        super().__init__()
        config: Any = model.config
        if config.patch_size != PATCH or config.num_register_tokens != SPECIAL - 1:
            raise ValueError(
                f"model must have patches of {PATCH} pixels and {SPECIAL - 1} registers, "
                f"got {config.patch_size} and {config.num_register_tokens}"
            )
        self.model = model.eval().requires_grad_(False)
        self.channels = config.hidden_size
        self.image_size = image_size

    @classmethod
    def load(
        cls, path: str = DINO_WEIGHTS, *, image_size: int = 518, dtype: torch.dtype = torch.bfloat16
    ) -> DinoEncoder:
        """Load pretrained weights.

        Args:
            path: A directory, or a name that is looked up in the local cache of the Hugging Face
                hub and then on the hub.
            image_size: Pixels along one side of the images.
            dtype: Dtype of the weights.

        Raises:
            UserError: If the weights are not available. The message says what to run.
        """
        from transformers import Dinov2WithRegistersModel

        # The network is asked only for what is not on this machine.
        for local in (True, False):
            try:
                model = Dinov2WithRegistersModel.from_pretrained(
                    path, dtype=dtype, local_files_only=local
                )
            except OSError as error:
                missing = error
            else:
                return cls(model, image_size)
        raise UserError(
            f"the image encoder's weights {path!r} are not on this machine and cannot be "
            f"downloaded ({str(missing).splitlines()[0]}). On a machine with internet access run "
            f"`hf download {DINO_WEIGHTS} --local-dir dinov2`, copy the directory here and pass it "
            "as the encoder's weights, or choose the stand-in encoder, which is trained with the "
            "generator"
        )

    @classmethod
    def random(
        cls,
        channels: int = 32,
        layers: int = 2,
        heads: int = 2,
        image_size: int = 112,
        seed: int = 0,
        mlp_ratio: int = 2,
    ) -> DinoEncoder:
        """Make a small encoder of the same architecture with random fp32 weights, for tests."""
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        config = Dinov2WithRegistersConfig(
            hidden_size=channels,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            mlp_ratio=mlp_ratio,
            image_size=image_size,
            patch_size=PATCH,
            num_register_tokens=SPECIAL - 1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(Dinov2WithRegistersModel(config), image_size)

    def train(self, mode: bool = True) -> DinoEncoder:
        """Stay in evaluation mode, since the encoder is frozen."""
        return super().train(False)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """Encode images in the dtype of the weights, also under autocast."""
        model: Any = self.model
        weight = next(model.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            embedded = model.embeddings(pixels_BCHW.to(weight.dtype))
            return model.encoder(embedded).last_hidden_state


class StandInEncoder(ImageEncoder):
    """A small vision transformer that is trained together with the generator.

    It stands in for DINOv2 where the pretrained weights are not available. It is not part of the
    paper, so results that were made with it must say so (`label`).

    Args:
        channels: Channels of a token.
        layers: Transformer layers.
        heads: Attention heads.
        image_size: Pixels along one side of the images.
        stem: How pixels become tokens, as in `EncoderConfig`.
        dropout: As in `EncoderConfig`.

    Raises:
        ValueError: If `image_size` is no multiple of PATCH, or the convolutional stem's channels
            cannot be normalised in groups.
    """

    trainable = True
    label = "stand-in image encoder trained with the generator (not DINOv2)"

    def __init__(
        self,
        channels: int = 256,
        layers: int = 4,
        heads: int = 4,
        image_size: int = 224,
        stem: Stem = "patches",
        dropout: float = 0.0,
    ):
        super().__init__()
        if image_size % PATCH:
            raise ValueError(f"image_size must be a multiple of {PATCH}, got {image_size}")
        self.channels = channels
        self.image_size = image_size
        side = image_size // PATCH
        convolutional = stem == "convolutions"
        self.stem = (
            _convolutional_stem(channels, image_size) if convolutional else _patch_stem(channels)
        )
        self.special = nn.Parameter(0.02 * torch.randn(SPECIAL, channels))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels,
                heads,
                4 * channels,
                dropout=dropout,
                activation=F.gelu,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        init_linears(self)
        with torch.device("cpu"):  # positions are no weights: a model on the meta device has them
            row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            coords = torch.stack([column, row, torch.zeros_like(row)], 2).flatten(0, 1)
            position = position_embedding(coords, channels)
        self.register_buffer("position", position, persistent=False)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """Encode images."""
        patches_BPC = self.stem(pixels_BCHW).flatten(2).transpose(1, 2) + self.position
        special_BTC = self.special.expand(len(pixels_BCHW), -1, -1).to(patches_BPC)
        x_BTC = torch.cat([special_BTC, patches_BPC], 1)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return x_BTC


def _patch_stem(channels: int) -> nn.Sequential:
    """Return two convolutions that see each patch of 14 x 14 pixels alone: strides 7 and 2."""
    middle = max(channels // 2, 8)
    return nn.Sequential(
        nn.Conv2d(3, middle, 7, stride=7), nn.GELU(), nn.Conv2d(middle, channels, 2, stride=2)
    )


def _convolutional_stem(channels: int, image_size: int) -> nn.Sequential:
    """Return overlapping convolutions that make one token of every 14 x 14 pixels.

    Resampling gives every token 16 x 16 pixels, which four 3 x 3 convolutions of stride 2 halve to
    one. Each is followed by GroupNorm and GELU, and a 1 x 1 convolution ends the stem. A
    convolution sees a row and a column beside its pair. The last one sees them on the other side
    than those before it, so that what a token sees is centred on its patch.

    Raises:
        ValueError: If `channels` is no multiple of 8 * STEM_GROUPS.
    """
    if channels % (8 * STEM_GROUPS):
        raise ValueError(
            f'channels must be a multiple of {8 * STEM_GROUPS} for stem "convolutions", '
            f"got {channels}"
        )
    widths = [3, channels // 8, channels // 4, channels // 2, channels]
    side = image_size // PATCH << (len(widths) - 1)
    layers: list[nn.Module] = [nn.Upsample((side, side), mode="bilinear", align_corners=False)]
    for before, after in pairwise(widths):
        beside = (0, 1, 0, 1) if after == channels else (1, 0, 1, 0)
        layers += [
            nn.ZeroPad2d(beside),
            nn.Conv2d(before, after, 3, stride=2, bias=False),
            nn.GroupNorm(STEM_GROUPS, after),
            nn.GELU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 1))


class EncoderOnDemand(ImageEncoder):
    """A frozen encoder whose weights are in memory only while images are encoded.

    Args:
        config: The configuration of a frozen encoder.

    Raises:
        UserError: As `build_encoder`.
        ValueError: As `build_encoder`.
    """

    trainable = False

    def __init__(self, config: EncoderConfig):
        with torch.device("cpu"):
            super().__init__()
            encoder = build_encoder(config)
        self.config = config
        self.channels = encoder.channels
        self.image_size = encoder.image_size
        self.label = encoder.label

    def forward(self, batch: ImageBatch) -> ImageTokens:
        """Load the encoder to the device of a batch, encode the batch and free the encoder."""
        return build_encoder(self.config).to(batch.pixels.device).eval()(batch)


def build_encoder(config: EncoderConfig) -> ImageEncoder:
    """Make the encoder of a configuration on the CPU. DINOv2 is loaded with pretrained weights.

    Raises:
        UserError: If DINOv2's weights are not available.
        ValueError: If the weights have other channels than `config`.
    """
    if config.kind == "stand-in":
        return StandInEncoder(
            config.channels,
            config.layers,
            config.heads,
            config.image_size,
            config.stem,
            config.dropout,
        )
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    encoder = DinoEncoder.load(config.weights, image_size=config.image_size, dtype=dtype)
    if encoder.channels != config.channels:
        raise ValueError(
            f"channels must be {encoder.channels} for {config.weights}, got {config.channels}"
        )
    return encoder
