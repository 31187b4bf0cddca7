"""What several configurations share: camera sets, image formats, and the mark of later options."""

from typing import Literal

CameraSet = Literal["paper", "wide"]
ImageFormat = Literal["png", "webp"]

# Metadata of an option that was added after files were written without it, and whose default means
# what those files were made with: `field(default=..., metadata=ADDED_LATER)`.
ADDED_LATER = {"omit_default": True}
