"""Trains on a folder of your own, measures the result and predicts a photo:

    python examples/own_folder.py FOLDER --train.epochs 100

FOLDER has train/ and val/, and in each a folder for every class. What follows are settings, as
`vitral train` takes them. The run lies in runs/own; the same command goes on with one that stopped.
"""

import sys
from pathlib import Path

import vitral


def main(folder: str, *settings: str) -> None:
    run = vitral.train("imagenette128", "--data", folder, "--out", "runs/own", *settings)
    scores = vitral.evaluate(run)
    print(f"top-1 {scores.top1:.1%} of {len(scores.labels):,} images")
    photo = min(path for path in Path(folder, "val").glob("*/*") if path.is_file())
    (prediction,) = vitral.load(run).predict(photo, top=3)
    for name, probability in zip(prediction.names, prediction.probabilities, strict=True):
        print(f"{photo}: {name} {probability:.1%}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
