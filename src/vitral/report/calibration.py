"""The section of a report on confidence: reliability, and accuracy against coverage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from vitral.evaluation import Scores
from vitral.evaluation.calibration import Coverage, coverage
from vitral.report import figures

TARGETS = (0.95, 0.99)  # accuracies whose thresholds are shown


@dataclass(frozen=True)
class CalibrationReport:
    """Contents of the section on calibration."""

    raw: Scores
    """The scores with the confidence of the logits."""

    @cached_property
    def scores(self) -> Scores:
        """The scores with the confidence that `predict` shows, after temperature scaling."""
        return self.raw.after_temperature()

    @property
    def diagram(self) -> Markup:
        """The reliability diagram."""
        return figures.reliability(self.scores.reliability())

    @cached_property
    def coverage(self) -> Coverage:
        """Accuracy against the fraction of the images that are answered."""
        return coverage(self.scores.confidence, self.scores.hits(1))

    @property
    def chart(self) -> Markup:
        """The chart of accuracy against coverage."""
        return figures.coverage(
            list(zip(self.coverage.coverage, self.coverage.accuracy, strict=True))
        )

    @property
    def thresholds(self) -> list[tuple[float, tuple[float, float] | None]]:
        """Accuracy, and the lowest confidence that reaches it with its coverage."""
        return [(target, self.coverage.threshold(target)) for target in TARGETS]
