"""Uploading an exported folder to the Hub, if asked to."""

from pathlib import Path
from typing import Any, Protocol


class Hub(Protocol):
    """What is needed of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any: ...


def hub_for(repository: str) -> Hub:
    """The Hub with the token that stands in HF_TOKEN or was stored by `hf auth login`.

    ValueError, before anything is exported, where the upload cannot succeed.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {error}") from None
    if repository.count("/") != 1:
        raise ValueError(f"--push {repository}: name it as ORG/NAME, with your user name or organisation in front")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, and --push needs the Hub: unset it, or export without --push")
    token = get_token()
    if token is None:
        raise ValueError("--push needs a token that may write: set HF_TOKEN, or run `hf auth login`")
    return HfApi(token=token)


def push(folder: Path, repository: str, public: bool, hub: Hub) -> str:
    """Uploads everything in the folder, to a repository that is made if need be; its address.

    A repository that is there stays as private or public as it is. ValueError in a sentence when the Hub refuses or
    cannot be reached; the folder is there then.
    """
    from httpx import HTTPError

    try:
        made = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by rlalign")
    except (OSError, HTTPError) as error:  # HfHubHTTPError is an OSError
        again = f"what was exported is in {folder}, and `hf upload {repository} {folder}` tries again"
        raise ValueError(f"could not upload to {repository}: {error}; {again}") from error
    return str(made)
