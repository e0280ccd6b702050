"""Critics: the heads of all objectives, what they read, and their normalisation."""

from mavis.critics.attachment import Attachment
from mavis.critics.base import Critic
from mavis.critics.calibration import Calibration
from mavis.critics.group import CriticGroup
from mavis.critics.hidden_state import HiddenStateCritic
from mavis.critics.official import import_official
from mavis.critics.trained_decoding import TrainedDecoding
from mavis.critics.value_model import ValueModelCritic

__all__ = [
    "Attachment",
    "Calibration",
    "Critic",
    "CriticGroup",
    "HiddenStateCritic",
    "TrainedDecoding",
    "ValueModelCritic",
    "import_official",
]
