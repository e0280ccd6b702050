"""Evaluation: sweeps, the optimal frontier, fronts, value calibration, speed, plots."""

from mavis.evaluation.report import write_report
from mavis.evaluation.sweep import EvaluationSettings, evaluate

__all__ = ["EvaluationSettings", "evaluate", "write_report"]
