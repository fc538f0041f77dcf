"""Contents of the report about likely label errors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from vitral.data.records import image_path
from vitral.errors import counted, printable
from vitral.evaluation.label_errors import FILE, LabelErrors
from vitral.report.thumbnails import thumbnail

MAX_SHOWN = 48
NAMES = {"train": "training image", "val": "validation image"}


@dataclass(frozen=True)
class LabelErrorReport:
    """The images whose labels are the least probable."""

    errors: LabelErrors
    file = FILE

    @property
    def counts(self) -> str:
        """For each split, the number of checked images and of estimated errors."""
        checked = [(split, int(np.sum(~np.isnan(split.scores)))) for split in self.errors.splits]
        return " and ".join(
            f"about {split.estimate:,} of {counted(count, NAMES[split.split])}"
            for split, count in checked
            if count
        )

    @property
    def only_validation(self) -> bool:
        """Whether no training image is checked."""
        return bool(np.isnan(self.errors.splits[0].scores).all())

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The images with the lowest scores, whose label is not the most probable class."""
        classes, found = self.errors.classes, []
        for split, i in islice(self.errors.ranked(), MAX_SHOWN):
            if split.suggested[i] >= 0:
                found.append(
                    {
                        "picture": thumbnail(split.records, i),
                        "image": printable(image_path(split.records, i)),
                        "split": NAMES[split.split],
                        "label": classes[split.records.labels[i]],
                        "suggested": classes[split.suggested[i]],
                        "confidence": split.confidence[i],
                    }
                )
        return found
