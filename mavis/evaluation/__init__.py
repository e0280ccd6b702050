"""Evaluation: sweeps, the optimal frontier, fronts, value calibration, speed, plots."""

from mavis.evaluation.evaluate import EvaluationSettings, evaluate
from mavis.evaluation.report import write_report

__all__ = ["EvaluationSettings", "evaluate", "write_report"]
