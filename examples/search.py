"""Finds the photos in a folder that are most similar to a query:

    python examples/search.py WEIGHTS FOLDER QUERY.jpg

WEIGHTS is a run directory or a weight directory. The program searches FOLDER recursively, prints
the most similar photos with their cosine similarity, and draws them after the query in nearest.jpg.
The feature vectors of the photos are cached in search.npz, so later queries compute vectors only
for new and changed photos. Both files are written to the current directory.
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
    """Returns the feature vectors of photos, (n, D).

    Cached vectors are used if the weights and the path, size and modification time of the photo are
    unchanged.
    """
    model = hashlib.sha256((classifier.path / "manifest.json").read_bytes()).hexdigest()
    stats = [Path(path).stat() for path in paths]
    stamps = [
        f"{model} {s.st_size} {s.st_mtime_ns} {Path(path).resolve()}"
        for path, s in zip(paths, stats, strict=True)
    ]
    cached: dict[str, NDArray[np.float32]] = {}
    if INDEX.exists():
        with np.load(INDEX) as index:
            cached = dict(zip(index["stamps"].tolist(), index["vectors"], strict=True))
    new = {stamp: path for stamp, path in zip(stamps, paths, strict=True) if stamp not in cached}
    print(f"{len(paths):,} photos, {len(new):,} of them new")
    cached.update(zip(new, classifier.embed(list(new.values())), strict=True))
    vectors = np.stack([cached[stamp] for stamp in stamps])
    temporary = INDEX.with_suffix(".new.npz")
    np.savez(temporary, stamps=np.array(stamps), vectors=vectors)
    temporary.replace(INDEX)
    return vectors


def draw(photos: list[tuple[str, str]]) -> None:
    """Draws photos with captions in a grid."""
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
        raise SystemExit(f"{folder}: expected a folder with photos other than the query, got none")
    vectors = indexed(classifier, paths)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(target)
    cosines = vectors @ target / lengths  # NaN for files that cannot be read; sorted last
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
