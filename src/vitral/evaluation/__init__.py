"""Exact accuracy over every image once, per class, and calibration."""

from vitral.evaluation.evaluate import evaluate
from vitral.evaluation.scores import Scores, measure, merge, summarise

__all__ = ["Scores", "evaluate", "measure", "merge", "summarise"]
