"""Critics on the hub: up by one commit, down into the hub client's own cache."""

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
            place = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(place, branch=revision, exist_ok=True)
            # All files in one commit, so that nobody ever downloads half of one critic and half of another.
            added = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
            done = api.create_commit(place, added, commit_message=message, revision=revision)
        except Exception as error:  # the client's own errors, and those of whatever it speaks HTTP with
            raise CriticError(
                f"repo_id is {repo_id!r}, where nothing could be uploaded: {first_sentence(error)}.",
                "log in with `hf auth login` or pass a token that may write there, and name it 'owner/name'.",
            ) from error
    return str(done.commit_url)


def download_critic(repo_id: str, files: list[str], revision: str | None) -> Path:
    """Download a critic folder, or find it in the cache.

    Args:
        repo_id: `owner/name`.
        files: which are wanted.
        revision: branch, tag or commit; None is the default branch.

    Returns:
        The folder in the cache.

    Raises:
        CriticError: if there is no such repository, or it can be reached neither there nor in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # the client's own errors, and those of whatever it speaks HTTP with
        raise CriticError(
            f"folder is {repo_id!r}, which does not exist, and the hub gave no such critic: {first_sentence(error)}.",
            "name a folder, train a critic first by mavis train, or log in with `hf auth login` if it is private.",
        ) from error
