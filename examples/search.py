"""Finds the photos of a folder that look most like a given one:

    python examples/search.py WEIGHTS FOLDER QUERY.jpg

WEIGHTS is a run or weight folder. Prints the nearest photos in FOLDER and its folders with their
cosine similarity, and draws them, the query first, in nearest.jpg. What the model sees in each
photo of FOLDER is kept in search.npz: the next query costs only photos that are new or changed.
Both files lie in the current folder.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

import vitral
from vitral.errors import UserError
from vitral.inference import Classifier, find_images

INDEX, SHEET = Path("search.npz"), Path("nearest.jpg")
NUM_SHOWN, COLUMNS, SIDE = 11, 4, 200


def indexed(classifier: Classifier, paths: list[str]) -> NDArray[np.float32]:
    """The vectors of photos, (n, D): kept ones where weights, path, size and time are the same."""
    model = hashlib.sha256((classifier.path / "manifest.json").read_bytes()).hexdigest()
    stats = [Path(path).stat() for path in paths]
    stamps = [
        f"{model} {s.st_size} {s.st_mtime_ns} {Path(path).resolve()}"
        for path, s in zip(paths, stats, strict=True)
    ]
    known: dict[str, NDArray[np.float32]] = {}
    if INDEX.exists():
        with np.load(INDEX) as kept:
            known = dict(zip(kept["stamps"].tolist(), kept["vectors"], strict=True))
    new = {stamp: path for stamp, path in zip(stamps, paths, strict=True) if stamp not in known}
    print(f"{len(paths):,} photos, {len(new):,} of them new")
    known.update(zip(new, classifier.embed(list(new.values())), strict=True))
    vectors = np.stack([known[stamp] for stamp in stamps])
    building = INDEX.with_suffix(".new.npz")
    np.savez(building, stamps=np.array(stamps), vectors=vectors)
    building.replace(INDEX)
    return vectors


def draw(photos: list[tuple[str, str]]) -> None:
    """Draws photos, each with its caption, row by row."""
    rows = -(-len(photos) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + 20)), "white")
    for i, (path, caption) in enumerate(photos):
        x, y = i % COLUMNS * SIDE, i // COLUMNS * (SIDE + 20)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        sheet.paste(ImageOps.pad(upright, (SIDE - 4, SIDE - 4), color="white"), (x + 2, y + 2))
        ImageDraw.Draw(sheet).text((x + 4, y + SIDE), caption, "black", font_size=14)
    sheet.save(SHEET, quality=90)


def main(weights: str, folder: str, query: str) -> None:
    classifier = vitral.load(weights)
    (target,) = classifier.embed(query)
    if np.isnan(target).any():
        raise SystemExit(f"{query}: {classifier.predict(query)[0].error}")
    found = find_images([folder])
    paths = [path for path in found if Path(path).exists() and not Path(path).samefile(query)]
    if not paths:
        raise SystemExit(f"{folder}: expected a folder with photos beside the query, got none")
    vectors = indexed(classifier, paths)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(target)
    cosines = vectors @ target / lengths  # NaN, and sorted last, for what cannot be read
    order = [i for i in np.argsort(-cosines)[:NUM_SHOWN] if not np.isnan(cosines[i])]
    nearest = [(paths[i], f"{cosines[i]:.3f}") for i in order]
    for path, cosine in nearest:
        print(f"{cosine} {path}")
    draw([(query, "query"), *nearest])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
