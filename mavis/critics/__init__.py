"""Critics: the heads of all objectives, what they read, and their normalisation."""

from mavis.critics.base import Attachment, Critic
from mavis.critics.calibration import Calibration
from mavis.critics.checkpoint import describe_critic, load_critic
from mavis.critics.group import CriticGroup
from mavis.critics.hidden_state import HiddenStateCritic
from mavis.critics.official import import_official
from mavis.critics.value_model import ValueModelCritic

__all__ = [
    "Attachment",
    "Calibration",
    "Critic",
    "CriticGroup",
    "HiddenStateCritic",
    "ValueModelCritic",
    "describe_critic",
    "import_official",
    "load_critic",
]
