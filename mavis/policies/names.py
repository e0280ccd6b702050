"""What a policy or a repository on the hub is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def policy_name(policy: Any) -> str | None:
    """Tell a policy's name: its id on the hub, or of a folder the last part, since the rest is nobody's business.

    Args:
        policy: a causal LM.

    Returns:
        The name, None if the policy does not say.
    """
    name = str(getattr(policy, "name_or_path", "") or "")
    if not name:
        return None
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Say whether a name can be that of a repository on the hub and not of a folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()
