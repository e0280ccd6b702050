"""Training: fit, improvement loop and calibration of critics; the recipe of the embedded policy."""

from mavis.training.calibrate import calibrate
from mavis.training.fit import FitReport, FitSettings, fit
from mavis.training.improve import ImprovementSettings, improve
from mavis.training.iteration import IterationReport

__all__ = ["FitReport", "FitSettings", "ImprovementSettings", "IterationReport", "calibrate", "fit", "improve"]
