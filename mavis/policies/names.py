"""Names of policies and of repositories on the hub, and what is said of those that cannot be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mavis.errors import MavisError, first_sentence

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def policy_name(policy: Any) -> str | None:
    """Return the name of a policy: its id on the hub, or the last part of its folder, without the private path.

    Args:
        policy: a causal LM.

    Returns:
        The name, or None if the policy has none.
    """
    name = str(getattr(policy, "name_or_path", "") or "")
    if not name:
        return None
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a repository on the hub rather than a local folder."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()


def check_source(source: str, argument: str, kind: type[MavisError], revision: str | None = None) -> None:
    """Refuse a folder that does not exist before the hub is asked for it, which takes most of a minute without network.

    Args:
        source: a folder, or a name on the hub.
        argument: what the error calls it.
        kind: of the error.
        revision: branch, tag or commit on the hub; None for the default branch.

    Raises:
        MavisError: of class `kind`, if the source is no folder and cannot be a name on the hub, or if it looks like a
            path, since its parent is a folder, and the hub does not have it at the first attempt.
    """
    path = Path(source).expanduser()
    if path.exists():
        return
    hint = "correct the path, or give the name of a repository on the hub."
    if path.is_absolute() or source.startswith((".", "~")) or source.endswith(("/", "\\")) or source.count("/") > 1:
        raise kind(f"{argument} is {source!r}, which does not exist.", hint)
    if path.parent == Path() or not path.parent.is_dir():
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(source, revision=revision, timeout=10)
    except Exception as error:  # errors of the client, and of its HTTP library
        raise kind(
            f"{argument} is {source!r}, which does not exist, and the hub has no such model: {first_sentence(error)}.",
            hint,
        ) from error


@contextmanager
def load_errors(subject: str, kind: type[MavisError], hint: str) -> Iterator[None]:
    """Say of whatever a library raises while it loads a model what could not be loaded.

    Args:
        subject: the beginning of the message, such as `policy.path is 'a', which`.
        kind: of the error.
        hint: of the error.

    Raises:
        MavisError: of class `kind`, for anything that is raised within; only a lack of memory, which is not the model's
            fault, is passed on.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, some of the libraries that transformers uses
        raise kind(f"{subject} cannot be loaded: {first_sentence(error)}.", hint) from error
