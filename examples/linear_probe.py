"""Fits a linear classifier to the features of a trained model, and prints its accuracy:

    python examples/linear_probe.py WEIGHTS FOLDER

WEIGHTS is a run directory, a weight directory or a pretrained model, such as
timm:vit_small_patch14_dinov2. FOLDER contains train/ and val/, each with one folder per class. The
classes may differ from those of the model, and the model is not changed. scikit-learn fits a
logistic regression to the features of train/ and evaluates it on val/.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import vitral
from vitral.errors import UserError
from vitral.inference import Classifier
from vitral.inference.embed import embed


def embedded(classifier: Classifier, split: Path) -> tuple[NDArray[np.float32], list[str]]:
    """Returns the feature vectors of the images in a split, and the names of their folders."""
    paths = sorted(str(path) for path in split.glob("*/*") if path.is_file())
    found = embed(classifier, paths)
    print(f"{split}: {len(paths):,} files, {len(found.paths):,} of them images")
    classes = [Path(path).parent.name for path in found.paths]
    if len(set(classes)) < 2:
        raise SystemExit(f"{split}: expected images in two or more folders, one folder per class")
    return found.vectors, classes


def main(weights: str, folder: str) -> None:
    classifier = vitral.load(weights)
    train, val = (embedded(classifier, Path(folder, split)) for split in ("train", "val"))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*train)
    print(f"accuracy {probe.score(*val):.1%} on {folder}/val")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
