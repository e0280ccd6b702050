"""Names of policies and of repositories on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
