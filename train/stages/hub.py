"""Upload of an export to the Hugging Face hub, with a model card that describes it."""

from __future__ import annotations

import logging
from pathlib import Path

from model.checkpoint import CONFIG, WEIGHTS
from pipeline.core.errors import RunError, UserError
from train.data.attribution import ATTRIBUTION
from train.stages.config import CardOptions
from train.stages.model_card import CARD, model_card, write_card

log = logging.getLogger(__name__)


def push_export(
    folder: Path,
    repository: str,
    *,
    licence: str | None = None,
    sources: CardOptions | None = None,
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
        sources: What the model card says besides. None takes nothing.
        private: Whether a new repository is private.
        endpoint: URL of the hub. None takes the public one, or HF_ENDPOINT.

    Returns:
        The URL of the commit.

    Raises:
        UserError: If the hub refuses the token, the name or the files, or a file that `sources`
            names cannot be used.
        RunError: If the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the library's HTTP client
        LocalTokenNotFoundError,
    )

    write_card(folder, model_card(folder, repository, licence, sources))
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
