"""Upload of an export to the Hugging Face hub, with a model card that describes it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from model.checkpoint import CONFIG, WEIGHTS, read_config
from model.inference.checkpoint_source import HUB
from pipeline.core.errors import RunError, UserError
from pipeline.core.files import write_atomically
from pipeline.core.provenance import commit_of_code
from train.data.attribution import ATTRIBUTION

log = logging.getLogger(__name__)

CARD = "README.md"


def push_export(
    folder: Path,
    repository: str,
    *,
    licence: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Write the model card of an export and upload the export to the hub in one commit.

    The repository is created if there is none. The token is the one of `hf auth login` or of
    HF_TOKEN.

    Args:
        folder: The export.
        repository: "OWNER/NAME".
        licence: Licence of the weights, such as "apache-2.0". None states none.
        private: Whether a new repository is private.
        endpoint: URL of the hub. None takes the public one, or HF_ENDPOINT.

    Returns:
        The URL of the commit.

    Raises:
        UserError: If the hub refuses the token, the name or the files.
        RunError: If the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the library's HTTP client
        LocalTokenNotFoundError,
    )

    write_atomically(folder / CARD, model_card(folder, repository, licence).encode())
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[CARD, ATTRIBUTION, f"*/{CONFIG}", f"*/{WEIGHTS}"],
            commit_message="Add an export of sparse3d",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise UserError(
            f"{repository} cannot be pushed to ({str(error).strip().splitlines()[0]}); check the "
            "name, and log in with `hf auth login` to an account that may write there"
        ) from error
    except (OSError, HTTPError) as error:
        raise RunError(
            f"the hub cannot be reached ({error}); the export is complete in {folder}, so run the "
            "same command again later"
        ) from error
    log.info("%s is at %s.", folder, commit.commit_url)
    return commit.commit_url


def model_card(folder: Path, repository: str, licence: str | None) -> str:
    """Return the model card of an export: its stages, how to use it, licence and training data.

    Args:
        folder: The export.
        repository: "OWNER/NAME", where it will be.
        licence: Licence of the weights. None states none.

    Raises:
        UserError: If the directory holds no exported stage.
    """
    stages = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not stages:
        raise UserError(f"{folder} holds no exported stage; export one first")
    metadata = ["---", "library_name: sparse3d", "pipeline_tag: image-to-3d"]
    metadata += [f"license: {licence}"] if licence else []
    metadata += ["tags:", "- image-to-3d", "- sparse-sdf", "- direct3d-s2", "---"]
    lines = [
        *metadata,
        "",
        f"# {repository.rpartition('/')[2]}",
        "",
        "Weights that turn one picture of an object into a closed 3D mesh, trained with sparse3d, "
        "an open implementation of Direct3D-S2 (arXiv 2505.17412).",
        "",
        "## Use",
        "",
        "```",
        f"python -m model.generate chair.png --checkpoint {HUB}{repository} -o chair.glb",
        f"python -m model.app --checkpoint {HUB}{repository}",
        "```",
        "",
        "## Stages",
        "",
        "| stage | model | parameters | recommended sampling |",
        "|---|---|---:|---|",
        *(_stage_row(stage) for stage in stages),
        "",
        "## Training data and licence",
        "",
        f"[{ATTRIBUTION}]({ATTRIBUTION}) names the authors and the licence of every asset that was "
        "trained on."
        if (folder / ATTRIBUTION).exists()
        else "The export does not list the assets that it was trained on.",
        "",
        f"The weights are licensed under {licence}."
        if licence
        else "No licence of the weights was stated.",
        "",
        f"Exported with the code of commit {commit_of_code() or 'unknown'}.",
        "",
    ]
    return "\n".join(lines)


def _stage_row(stage: Path) -> str:
    """Return the row of an exported stage in the table of the model card."""
    from safetensors import safe_open

    described = read_config(stage)
    with safe_open(stage / WEIGHTS, "pt") as file:
        count = sum(_size(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    recommended: dict[str, Any] = described.get("recommended") or {}
    sampling = ", ".join(f"{name} {value:g}" for name, value in recommended.items())
    return f"| {stage.name} | {described['model']} | {count / 1e6:.2f} M | {sampling or '-'} |"


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
