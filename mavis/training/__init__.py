"""Training: improvement, distillation and calibration of critics; alignment of policies; reward models."""

from mavis.training.alignment.loop import align
from mavis.training.alignment.settings import AlignReport, AlignSettings
from mavis.training.distillation.loop import distill
from mavis.training.distillation.settings import DistillReport, DistillSettings
from mavis.training.improvement.calibrate import calibrate
from mavis.training.improvement.fit import FitReport, FitSettings, fit
from mavis.training.improvement.loop import improve
from mavis.training.improvement.report import IterationReport
from mavis.training.improvement.settings import ImprovementSettings
from mavis.training.regression import RegressionSettings
from mavis.training.reward_model.classifier import load_backbone
from mavis.training.reward_model.loop import train_reward_model
from mavis.training.reward_model.settings import RewardModelReport, RewardModelSettings

__all__ = [
    "AlignReport",
    "AlignSettings",
    "DistillReport",
    "DistillSettings",
    "FitReport",
    "FitSettings",
    "ImprovementSettings",
    "IterationReport",
    "RegressionSettings",
    "RewardModelReport",
    "RewardModelSettings",
    "align",
    "calibrate",
    "distill",
    "fit",
    "improve",
    "load_backbone",
    "train_reward_model",
]
