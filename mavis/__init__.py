"""Value-guided decoding: steer any causal LM between objectives at decoding time.

A critic holds one small value head per objective; `MavisTilt` weighs them and tilts the policy's distribution over its
top-k candidates at every step; `generate` sets the tilt and the policy's `generate` to agree; `respond` goes from
prompts and conversations to texts; `improve` trains a critic, `distill` makes one of several and `evaluate` measures
it.
"""

from mavis.critics import Critic, CriticGroup, HiddenStateCritic, ValueModelCritic, import_official
from mavis.decoding import MavisTilt, generate, respond
from mavis.errors import MavisError
from mavis.evaluation import evaluate
from mavis.policies import embedded
from mavis.training import distill, improve
from mavis.version import __version__

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
