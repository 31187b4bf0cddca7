"""Image tokens that the generator attends to, packed over the batch: from frozen DINOv2 or a small stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.conditioning.image_preprocessing import PreparedImage
from model.config import DINO_WEIGHTS, PATCH, EncoderConfig
from model.image_tokens import ImageTokens
from model.layers import init_linears, layer_norm, position_embedding
from pipeline.core.errors import UserError

SPECIAL = 5  # tokens before the patches: cls and 4 registers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Prepared images of one size, and which of an encoder's tokens stay: those of patches with foreground."""

    pixels: Tensor  # uint8 [B, 3, size, size]
    rows: Tensor  # int64 [S] of the encoder's B * (SPECIAL + patches) tokens
    coords: Tensor  # as ImageTokens's
    starts: Tensor  # as ImageTokens's
    max_tokens: int

    @classmethod
    def collate(cls, images: Sequence[PreparedImage]) -> ImageBatch:
        """One batch on the CPU. ValueError if there is no image, sizes differ or are no multiple of PATCH."""
        sizes = sorted({image.rgb.shape[0] for image in images})
        if len(sizes) != 1 or sizes[0] % PATCH:
            raise ValueError(
                f"images must be of one size, a multiple of {PATCH} pixels, got {sizes}"
            )
        side = sizes[0] // PATCH
        coords, rows = [], []
        for asset, image in enumerate(images):
            taken = image.mask.reshape(side, PATCH, side, PATCH).any(axis=(1, 3))
            row, column = np.nonzero(taken)
            first = asset * (SPECIAL + side * side)
            special = np.tile([asset, 0, 0, 1], (SPECIAL, 1))
            coords.append(special)
            coords.append(np.stack([np.full_like(row, asset), column, row, np.zeros_like(row)], 1))
            rows.append(first + np.concatenate([np.arange(SPECIAL), SPECIAL + row * side + column]))
        counts = [len(part) for part in rows]
        return cls(
            torch.from_numpy(np.stack([image.rgb for image in images]))
            .permute(0, 3, 1, 2)
            .contiguous(),
            torch.from_numpy(np.concatenate(rows)),
            torch.from_numpy(np.concatenate(coords).astype(np.int32)),
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            max(counts),
        )

    @property
    def batch_size(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> int:
        return self.pixels.shape[2]

    def _map(self, function: Any) -> ImageBatch:
        tensors = {
            name: function(getattr(self, name)) for name in ("pixels", "rows", "coords", "starts")
        }
        return replace(self, **tensors)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageBatch:
        """The same batch there."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """A copy in page-locked memory, for `to(..., non_blocking=True)`."""
        return self._map(lambda x: x.pin_memory())


class ImageEncoder(nn.Module):
    """Images -> ImageTokens. A subclass gives `tokens`."""

    channels: int
    image_size: int  # pixels along a side of the images it takes
    mean: Tensor
    std: Tensor
    trainable: bool  # whether it learns together with the generator
    label: str  # how results name it

    def __init__(self):
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, size, size], normalised as ImageNet -> [B, SPECIAL + patches, C], before any last norm."""
        raise NotImplementedError

    def forward(self, batch: ImageBatch) -> ImageTokens:
        """ImageTokens with the tokens of cls, registers and foreground patches, normalised without parameters.

        ValueError for images of another size. No device-to-host copy.
        """
        if batch.size != self.image_size:
            raise ValueError(
                f"images must be of {self.image_size} pixels for {self.label}, got {batch.size}"
            )
        tokens_BTC = self.tokens((batch.pixels.float() / 255 - self.mean) / self.std)
        feats_SC = layer_norm(tokens_BTC.flatten(0, 1)[batch.rows], eps=1e-5)
        return ImageTokens(feats_SC, batch.coords, batch.starts, batch.max_tokens)


class DinoEncoder(ImageEncoder):
    """DINOv2 with registers through transformers: frozen, its tokens taken before its last norm. paper, sec. 4"""

    trainable = False
    label = "DINOv2"

    def __init__(self, model: nn.Module, image_size: int = 518):
        super().__init__()
        config: Any = model.config
        if config.patch_size != PATCH or config.num_register_tokens != SPECIAL - 1:
            found = f"{config.patch_size} and {config.num_register_tokens}"
            raise ValueError(
                f"model must have patches of {PATCH} pixels and {SPECIAL - 1} registers, got {found}"
            )
        self.model, self.channels, self.image_size = (
            model.eval().requires_grad_(False),
            config.hidden_size,
            image_size,
        )

    @classmethod
    def load(
        cls, path: str = DINO_WEIGHTS, *, image_size: int = 518, dtype: torch.dtype = torch.bfloat16
    ) -> DinoEncoder:
        """Pretrained weights from a folder, the local hub cache or the hub, as `dtype`.

        UserError, with what to run, if they are nowhere to be had.
        """
        from transformers import Dinov2WithRegistersModel

        for local in (True, False):  # asks the network only for what is not on this machine
            try:
                model = Dinov2WithRegistersModel.from_pretrained(
                    path, dtype=dtype, local_files_only=local
                )
            except OSError as error:
                missing = error
            else:
                return cls(model, image_size)
        raise UserError(
            f"the image encoder's weights {path!r} are neither on this machine nor to be downloaded "
            f"({str(missing).splitlines()[0]}). Where there is internet run `hf download {DINO_WEIGHTS} --local-dir dinov2`, "
            "copy the folder here and pass it as the image encoder; or take the stand-in encoder, which is trained "
            "with the generator"
        )

    @classmethod
    def random(
        cls,
        channels: int = 32,
        layers: int = 2,
        heads: int = 2,
        image_size: int = 112,
        seed: int = 0,
    ) -> DinoEncoder:
        """The same architecture, small and with random weights, in fp32: for tests."""
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        config = Dinov2WithRegistersConfig(
            hidden_size=channels, num_hidden_layers=layers, num_attention_heads=heads, mlp_ratio=2,
            image_size=image_size, patch_size=PATCH, num_register_tokens=SPECIAL - 1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(Dinov2WithRegistersModel(config), image_size)

    def train(self, mode: bool = True) -> DinoEncoder:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        model: Any = self.model
        weight = next(model.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            embedded = model.embeddings(pixels_BCHW.to(weight.dtype))
            return model.encoder(embedded).last_hidden_state


class StandInEncoder(ImageEncoder):
    """A small vision transformer that learns together with the generator, where DINOv2's weights cannot be had.

    Not part of the paper: results made with it must say so (`label`).
    """

    trainable = True
    label = "stand-in image encoder trained with the generator (not DINOv2)"

    def __init__(self, channels: int = 256, layers: int = 4, heads: int = 4, image_size: int = 224):
        super().__init__()
        if image_size % PATCH:
            raise ValueError(f"image_size must be a multiple of {PATCH}, got {image_size}")
        self.channels, self.image_size = channels, image_size
        side, middle = image_size // PATCH, max(channels // 2, 8)
        self.stem = nn.Sequential(
            nn.Conv2d(3, middle, 7, stride=7), nn.GELU(), nn.Conv2d(middle, channels, 2, stride=2)
        )
        self.special = nn.Parameter(0.02 * torch.randn(SPECIAL, channels))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels,
                heads,
                4 * channels,
                dropout=0.0,
                activation=F.gelu,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        init_linears(self)
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        coords = torch.stack([column, row, torch.zeros_like(row)], 2).flatten(0, 1)
        self.register_buffer("position", position_embedding(coords, channels), persistent=False)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        patches_BPC = self.stem(pixels_BCHW).flatten(2).transpose(1, 2) + self.position
        x_BTC = torch.cat(
            [self.special.expand(len(pixels_BCHW), -1, -1).to(patches_BPC), patches_BPC], 1
        )
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return x_BTC


def build_encoder(config: EncoderConfig) -> ImageEncoder:
    """The encoder on the CPU. UserError as `DinoEncoder.load`; ValueError if its tokens have other channels."""
    if config.kind == "stand-in":
        return StandInEncoder(config.channels, config.layers, config.heads, config.image_size)
    encoder = DinoEncoder.load(config.weights, image_size=config.image_size)
    if encoder.channels != config.channels:
        raise ValueError(
            f"channels must be {encoder.channels} for {config.weights}, got {config.channels}"
        )
    return encoder
