"""Evaluation: sweeps over weights and β, frontier efficiency, Pareto fronts, value calibration, speed, plots."""

from mavis.evaluation.report import EvaluationReport
from mavis.evaluation.report_files import write_report
from mavis.evaluation.settings import EvaluationSettings
from mavis.evaluation.sweep import evaluate
from mavis.evaluation.sweep_row import SweepRow

__all__ = ["EvaluationReport", "EvaluationSettings", "SweepRow", "evaluate", "write_report"]
