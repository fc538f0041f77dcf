"""Evaluates accuracy, per-class accuracy and calibration, counting each image once."""

from vitral.evaluation.evaluate import at_sizes, evaluate, open_set, sweep
from vitral.evaluation.scores import Scores, measure, merge, summarize
from vitral.evaluation.suite import evaluate_suite
from vitral.evaluation.testsets import find_suite

__all__ = [
    "Scores",
    "at_sizes",
    "evaluate",
    "evaluate_suite",
    "find_suite",
    "measure",
    "merge",
    "open_set",
    "summarize",
    "sweep",
]
