"""Evaluates accuracy, per-class metrics and calibration, counting each image once."""

from vitral.evaluation.evaluate import at_sizes, evaluate, open_set, sweep
from vitral.evaluation.metrics import Results
from vitral.evaluation.output import summarize
from vitral.evaluation.scores import Scores, measure, merge
from vitral.evaluation.suite import evaluate_suite
from vitral.evaluation.testsets import find_suite

__all__ = [
    "Results",
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
