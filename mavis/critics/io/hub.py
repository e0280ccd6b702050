"""Uploading critics to the hub and downloading them into the cache of the hub client."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mavis.critics.io.files import SavableCritic
from mavis.critics.io.save import save_critic
from mavis.errors import CriticError, first_sentence


def push_critic(
    critic: SavableCritic, repo_id: str, *, private: bool | None, revision: str | None, message: str, token: str | None
) -> str:
    """Upload a critic folder; see `Critic.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_critic(critic, Path(folder) / "critic")
        files = sorted((Path(folder) / "critic").iterdir())
        try:
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            # One commit for all files, so that no download mixes two critics.
            added = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
            commit = api.create_commit(repository, added, commit_message=message, revision=revision)
        except Exception as error:  # errors of the client, and of its HTTP library
            raise CriticError(
                f"repo_id is {repo_id!r}, to which the upload failed: {first_sentence(error)}.",
                "log in with `hf auth login` or pass a token with write permission, and write repo_id as 'owner/name'.",
            ) from error
    return str(commit.commit_url)


def download_critic(repo_id: str, files: list[str], revision: str | None) -> Path:
    """Download a critic folder, unless it is in the cache.

    Args:
        repo_id: `owner/name`.
        files: names of the files to download.
        revision: branch, tag or commit; None for the default branch.

    Returns:
        The folder in the cache.

    Raises:
        CriticError: if there is no such repository, or the hub cannot be reached and it is not in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # errors of the client, and of its HTTP library
        raise CriticError(
            f"folder is {repo_id!r}, which does not exist, and the hub has no such critic: {first_sentence(error)}.",
            "name a folder, train a critic with `mavis train`, or log in with `hf auth login` if it is private.",
        ) from error
