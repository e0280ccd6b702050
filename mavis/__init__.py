"""Value-guided decoding: steer any causal LM between objectives at decoding time.

A critic holds one small value head per objective; `MavisTilt` weighs them and tilts the policy's distribution over its
top-k candidates at every step; `generate` sets the tilt and the policy's `generate` to agree; `respond` goes from
prompts and conversations to texts; `improve` trains a critic, `distill` makes one of several and `evaluate` measures
it.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from mavis.version import __version__

if TYPE_CHECKING:
    from mavis.critics import Critic, CriticGroup, HiddenStateCritic, ValueModelCritic, import_official
    from mavis.decoding import MavisTilt, generate, respond
    from mavis.errors import MavisError
    from mavis.evaluation import evaluate
    from mavis.policies import embedded
    from mavis.training import distill, improve

__all__ = [
    "Critic",
    "CriticGroup",
    "HiddenStateCritic",
    "MavisError",
    "MavisTilt",
    "ValueModelCritic",
    "__version__",
    "distill",
    "embedded",
    "evaluate",
    "generate",
    "import_official",
    "improve",
    "respond",
]

_HOMES = {
    "mavis.critics": ("Critic", "CriticGroup", "HiddenStateCritic", "ValueModelCritic", "import_official"),
    "mavis.decoding": ("MavisTilt", "generate", "respond"),
    "mavis.errors": ("MavisError",),
    "mavis.evaluation": ("evaluate",),
    "mavis.training": ("distill", "improve"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, in which the command line would be neither quick nor stoppable."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    if name == "embedded":
        return importlib.import_module("mavis.policies.embedded")
    if name in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"mavis.{name}")
    raise AttributeError(f"module 'mavis' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what can be asked for."""
    return sorted({*globals(), *__all__})
