"""Bringing an exported folder to the model hub, under the name and with the token of whoever is logged in."""

from __future__ import annotations

from pathlib import Path

from fedhpc.errors import UserError


class PushError(UserError):
    """A folder that is written could not be brought to the hub."""


def require_name(repository: str) -> None:
    """UserError for a name that no repository of the hub can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"command line: --push '{repository}' is no name of a repository", remedy="give OWNER/NAME"
        ) from error


def push(folder: Path, repository: str, message: str) -> str:
    """Upload `folder` as one commit of a model repository, which is made private where there is none; its address.

    PushError without network or token, and where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Of which library the errors of the network are depends on the release; this class derives from them.
    of_network: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))
    except (OSError, ValueError, of_network) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PushError(
            f"--push: '{repository}' could not be brought to the hub: {reason}",
            remedy="see that there is a network (HF_HUB_OFFLINE must not be 1), and log in with: hf auth login",
        ) from error
