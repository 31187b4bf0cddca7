"""Where a checkpoint lies: in a directory, in the installed package, or on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from model.config import Refine
from pipeline.core.errors import UserError

HUB = "hf://"
SHIPPED = ("props",)  # names of the weights that are part of the package
SHIPPED_WEIGHTS = Path(__file__).parent.parent / "weights"
REFINER_FILES = {"none": ["*refiner*"], "512": ["*refiner_1024*"], "all": []}


def find_checkpoint(path: Path | str, refine: Refine | None = None) -> Path:
    """Return the directory of a checkpoint, which is downloaded if it is a name on the hub.

    Args:
        path: A directory, the name of weights that the package ships, or "hf://OWNER/NAME" with an
            optional "/SUBFOLDER". A directory in the current one goes before shipped weights.
        refine: Which refiners are needed. The others are not downloaded.

    Raises:
        UserError: If there is no such directory or name, or it cannot be downloaded.
    """
    text = str(path)
    if text.startswith("hf:"):
        return _download(text, refine)
    folder = Path(path)
    if is_shipped(path):
        folder = SHIPPED_WEIGHTS / text
        if not any(folder.glob("*/config.json")):
            raise UserError(
                f"the weights {text} are not in this installation ({folder} holds no exported "
                "stage); install the package from its repository, or name a directory"
            )
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a directory; name an export of python -m train.export, the published "
            f"folder, {HUB}OWNER/NAME/SUBFOLDER, or shipped weights: {', '.join(SHIPPED)}"
        )
    return folder


def is_shipped(path: Path | str) -> bool:
    """Return whether a checkpoint is named by the name of weights that the package ships."""
    return str(path) in SHIPPED and not Path(path).is_dir()


def _download(text: str, refine: Refine | None) -> Path:
    match = re.fullmatch(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:/([\w./-]+?))?/?", text)
    if match is None or ".." in text:
        raise UserError(f"{text} must be {HUB}OWNER/NAME or {HUB}OWNER/NAME/SUBFOLDER")
    repository, folder = match[1], match[2] or ""
    prefix = f"{folder}/" if folder else ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        root = snapshot_download(
            repository,
            allow_patterns=[f"{prefix}*"],
            ignore_patterns=[f"{prefix}{name}" for name in REFINER_FILES[refine or "512"]],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{text} cannot be downloaded ({reason}); check the name and the network, or download "
            "it elsewhere and pass its directory"
        ) from error
    result = Path(root) / folder
    if not result.is_dir() or not any(result.iterdir()):
        raise UserError(f"{text} holds no files; check the name of the subfolder")
    return result
