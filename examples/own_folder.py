"""Trains on an image folder, evaluates the result and classifies a photo:

    python examples/own_folder.py FOLDER --epochs 100

FOLDER contains train/ and val/, each with one folder per class; without val/, a part of train/ is
held out. The options are those of `vitral train`. The run directory is runs/own; repeat the
command to resume an interrupted run.
"""

import sys

import vitral
from vitral.errors import UserError
from vitral.inference import find_images


def main(folder: str, *settings: str) -> None:
    photo = find_images([folder])[-1]  # sorted by name, so val/ comes after train/
    run = vitral.train("imagenette128", "--data", folder, "--out", "runs/own", *settings)
    scores = vitral.evaluate(run)
    print(f"top-1 {scores.top1:.1%} of {len(scores.labels):,} images")
    (prediction,) = vitral.load(run).predict(photo, top=3)
    for name, probability in zip(prediction.names, prediction.probabilities, strict=True):
        print(f"{photo}: {name} {probability:.1%}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
