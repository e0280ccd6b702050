"""Training: fit, improvement loop, distillation and calibration of critics; the recipe of the embedded policy."""

from mavis.training.calibrate import calibrate
from mavis.training.descent import DescentSettings
from mavis.training.distill import DistillReport, DistillSettings, distill
from mavis.training.fit import FitReport, FitSettings, fit
from mavis.training.improve import ImprovementSettings, improve
from mavis.training.iteration import IterationReport

__all__ = [
    "DescentSettings",
    "DistillReport",
    "DistillSettings",
    "FitReport",
    "FitSettings",
    "ImprovementSettings",
    "IterationReport",
    "calibrate",
    "distill",
    "fit",
    "improve",
]
