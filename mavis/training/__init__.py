"""Training: fit, improvement loop, distillation and calibration of critics; alignment and the embedded recipe."""

from mavis.training.align import align
from mavis.training.align_settings import AlignReport, AlignSettings
from mavis.training.calibrate import calibrate
from mavis.training.descent import DescentSettings
from mavis.training.distill import DistillReport, DistillSettings, distill
from mavis.training.fit import FitReport, FitSettings, fit
from mavis.training.improve import ImprovementSettings, improve
from mavis.training.iteration import IterationReport

__all__ = [
    "AlignReport",
    "AlignSettings",
    "DescentSettings",
    "DistillReport",
    "DistillSettings",
    "FitReport",
    "FitSettings",
    "ImprovementSettings",
    "IterationReport",
    "align",
    "calibrate",
    "distill",
    "fit",
    "improve",
]
