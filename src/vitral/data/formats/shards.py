"""A folder of tar shards, as in webdataset: KEY.jpg with KEY.cls or KEY.json."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitral.config import DataConfig
from vitral.data.archives import REDOWNLOAD, check_unique, members, progress
from vitral.data.decode import SUFFIXES
from vitral.data.imagenet import validation_labels, wnids
from vitral.data.index import ArchiveIndex, Row, index_archives
from vitral.data.splits import VALIDATION, Dataset, Split, class_name, merge_splits
from vitral.documents import parse_json
from vitral.errors import counted, data_error, first_few, printable
from vitral.files import open_regular, read_regular

CLASSES = "classes.txt"
MAX_CLASSES, MAX_LABEL = 1 << 24, 1 << 20  # bytes of classes.txt, and of a KEY.cls or KEY.json
MAX_NAME = 255  # bytes of a class name, as for a folder's name
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def matches(root: Path) -> bool:
    """Returns whether `root` or its split folders contain shards."""
    return bool(_find_splits(root))


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Opens the dataset in the shards in `root`, or in its folders, such as `train` and `val`.

    Classes are sorted by name, or by number if they have no other names. Their names are the lines
    of `classes.txt`, the labels if these are text, or the wnids in the names of the images.

    Raises:
        UserError: if a shard or its labels cannot be used.
    """
    splits, skipped = _find_splits(root), Counter[str]()
    held_out = next((name for name in VALIDATION if name in splits), None)
    if held_out is None:
        (training,) = splits
        (split,) = _open(root, [splits[training]], 1, skipped)
        if not train and not training:
            return merge_splits(root, None, split, config, seed, skipped)
        return merge_splits(root, split, None, config, seed, skipped)
    if train and "train" not in splits:
        expected = f"train shards in addition to those of {held_out}"
        raise data_error(root, expected, "none", "put the training shards there")
    order = [splits[name] for name in (held_out, "train") if name in splits]
    val, *known = _open(root, order, 2 if train else 1, skipped)
    dataset = merge_splits(root, known[0] if known else None, val, config, seed, skipped)
    if held_out != "test":
        return dataset
    choice = f"{dataset.name} has no val shards: using those of test for validation"
    return replace(dataset, choices=(choice,))


def _find_splits(root: Path) -> dict[str, list[Path]]:
    """Returns the shards by split; the key is "" if the file names do not contain a split."""
    if not root.is_dir():
        return {}
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    named = {split: folders[split] for split in ("train", *VALIDATION) if split in folders}
    if named:
        found = {split: _shards(folder) for split, folder in named.items()}
        return {split: shards for split, shards in found.items() if shards}
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in _shards(root):
        words = re.split("[^a-z]+", path.name.lower())
        split_names = [word for word in words if word in ("train", *VALIDATION)]
        splits[split_names[-1] if split_names else ""].append(path)
    if "" in splits and len(splits) > 1:
        expected = f"train, {', '.join(VALIDATION[:-1])} or test in the name of each shard"
        raise data_error(root, expected, splits[""][0].name, "rename or move it")
    return splits


def _shards(folder: Path) -> list[Path]:
    """Returns the archives in a folder; none if it has image folders, which take precedence."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [path for path in entries if path.name.lower().endswith(ARCHIVES)]
    files = (file for path in entries if found and path.is_dir() for file in path.iterdir())
    return [] if any(file.suffix.lower() in SUFFIXES for file in files) else found


def _open(
    root: Path, splits: Sequence[Sequence[Path]], count: int, skipped: Counter[str]
) -> list[Split]:
    """Opens the first `count` splits; indexes others only if needed to name the classes."""
    found = [index_archives(shards, read_shards) for shards in splits[:count]]
    for each in found:
        skipped.update(each.skipped)
    lines = _read_classes(root / CLASSES)
    names = [_class_names(each, root, lines) for each in found]
    rest = [] if all(names) else [index_archives(shards, read_shards) for shards in splits[count:]]
    others = (_class_names(each, root, lines) for each in rest)
    spare = next(filter(None, (*names, *others)), {})
    return [_label(root, each, own or spare) for each, own in zip(found, names, strict=True)]


def _read_classes(path: Path) -> list[bytes]:
    """Returns the lines of the list of classes, or an empty list if it is missing."""
    if not path.is_file():
        return []
    lines = [line.strip() for line in read_regular(path, MAX_CLASSES).split(b"\n")]
    lines = lines[: -1 if not lines[-1] else None]
    check_unique(path, map(printable, lines))
    return lines


def _class_names(found: ArchiveIndex, root: Path, lines: list[bytes]) -> dict[bytes, bytes]:
    """Returns class names by label value; empty if the labels are numbers without names."""
    values, wnids = found.values.tolist(), found.wnids.tolist()
    if lines:
        numbered = values[0].isdigit()
        names = {b"%d" % i if numbered else line: line for i, line in enumerate(lines)}
        unlisted = [printable(value) for value in values if value not in names]
        if unlisted:
            fix = "list each class, in order of label from 0"
            expected = counted(len(lines), "label")
            raise data_error(root / CLASSES, expected, first_few(unlisted), fix)
        return names
    if not values[0].isdigit():
        return dict(zip(values, values, strict=True))
    if not all(wnids) or len({*wnids}) < len(wnids):
        return {}
    return dict(zip(values, wnids, strict=True))


def _label(root: Path, found: ArchiveIndex, names: dict[bytes, bytes]) -> Split:
    values = found.values.tolist()
    if not names.keys() >= {*values}:
        names = dict(zip(values, values, strict=True))
    plain = all(name.isdigit() for name in names.values())
    classes = sorted(names.values(), key=_number if plain else _composed)
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[names[value]] for value in values])
    return tuple(map(printable, classes)), found.relabeled(labels[found.spans.labels])


def _number(digits: bytes) -> tuple[int, bytes]:
    """Returns a sort key that orders numbers without leading zeros by value, for any length."""
    return len(digits), digits


def _composed(name: bytes) -> bytes:
    return os.fsencode(class_name(os.fsdecode(name)))


def read_shards(archives: Sequence[Path]) -> tuple[list[Row], dict[bytes, bytes], Counter[str]]:
    """Reads the images in shards, their label values, and the wnid shared by images of a value."""
    rows: list[Row] = []
    called: dict[bytes, set[str]] = defaultdict(set)
    skipped = Counter[str]()
    for number, archive in enumerate(progress(archives)):
        for row, wnid in _read_shard(number, archive, skipped):
            rows.append(row)
            called[row[0]].add(wnid)
    folder = archives[0].parent
    if not rows:
        raise data_error(
            folder, f"images ({', '.join(SUFFIXES)}) in the shards", "none", REDOWNLOAD
        )
    check_unique(folder, (printable(name.rpartition(b".")[0]) for _, name, *_ in rows))
    numbers = [printable(label) for label in called if label.isdigit()]
    texts = [printable(label) for label in called if not label.isdigit()]
    if numbers and texts:
        got = f"numbers {first_few(numbers)} and text {first_few(texts)}"
        raise data_error(folder, "labels that are all numbers or all text", got, REDOWNLOAD)
    wnids = {label: min(names).encode() for label, names in called.items() if len(names) == 1}
    return rows, wnids, skipped


def _read_shard(number: int, archive: Path, skipped: Counter[str]) -> list[tuple[Row, str]]:
    """Returns a row for each image of a shard, and the wnid in the image's name.

    Members with the same key may be in any order. If both have a label, KEY.cls takes precedence
    over KEY.json.
    """
    place = printable(archive)
    if archive.suffix.lower() != ".tar":
        fix = "decompress it"
        raise data_error(archive, "an uncompressed tar archive", "a compressed one", fix)
    images: dict[str, tuple[str, tarfile.TarInfo]] = {}
    metadata: dict[str, dict[str, Any]] = {}
    seen: list[str] = []
    with open_regular(archive) as file:
        for name, member in members(file, place, (".cls", ".json", *SUFFIXES), skipped=skipped):
            key, _, suffix = name.rpartition(".")
            if f".{suffix.lower()}" in SUFFIXES:
                images[key] = name, member
                seen.append(key)  # KEY.png next to KEY.jpg would be a second image
                continue
            if member.size > MAX_LABEL:
                got = f"{member.size:,}"
                raise data_error(
                    f"{place}: {name}", f"at most {MAX_LABEL:,} bytes", got, REDOWNLOAD
                )
            file.seek(member.offset_data)
            content, known = file.read(member.size), metadata.get(key, {})
            if suffix.lower() == "cls":
                metadata[key] = known | {"label": content}
            else:
                metadata[key] = _parse(content, f"{place}: {name}") | known
            seen.append(name)
    check_unique(archive, seen)
    rows = []
    for key, (name, image) in _labeled_images(archive, images, metadata, skipped).items():
        known = metadata.get(key, {})
        value = _value(known.get("label"), f"{place}: {name}", key)
        wnid = _wnid(name) or _wnid(str(known.get("filename")))
        rows.append(((value, os.fsencode(name), number, image.offset_data, image.size), wnid))
    return rows


def _labeled_images(
    archive: Path,
    images: dict[str, tuple[str, tarfile.TarInfo]],
    metadata: dict[str, dict[str, Any]],
    skipped: Counter[str],
) -> dict[str, tuple[str, tarfile.TarInfo]]:
    """Returns name and header of each image by the key of its label.

    The key is the part of the image's name before the last dot or, as in webdataset, before the
    first dot: KEY for KEY.left.jpg. An image is skipped if its label belongs to KEY.jpg.
    """
    found = {key: image for key, image in images.items() if "label" in metadata.get(key, {})}
    image_keys = {*found}
    for key, image in images.items():
        folder, slash, base = key.rpartition("/")
        first = folder + slash + base.partition(".")[0]
        if key in image_keys:
            continue
        if first in image_keys:
            skipped[image[0].removeprefix(first)] += 1
        elif "label" not in metadata.get(first, {}):
            found[key] = image  # without a label; the caller raises an error
        elif first in found:
            names = f"{found[first][0]} and {image[0]}"
            fix = f"rename one of them to {first}{os.path.splitext(image[0])[1]}"  # noqa: PTH122
            raise data_error(archive, f"one image for the label of {first}", names, fix)
        else:
            found[first] = image
    unmatched = sorted(key for key in metadata.keys() - found.keys() if "label" in metadata[key])
    if unmatched:
        expected = f"an image for each label ({', '.join(SUFFIXES)})"
        raise data_error(archive, expected, f"none for {first_few(unmatched)}", REDOWNLOAD)
    return found


def _parse(content: bytes, place: str) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError as error:
        raise data_error(place, "JSON", str(error), REDOWNLOAD) from error
    return found if isinstance(found, dict) else {}


def _value(label: Any, place: str, key: str) -> bytes:
    """Returns a label as bytes; numbers without leading zeros."""
    if type(label) in (int, str):  # isinstance would accept bool
        label = str(label).encode("utf-8", "backslashreplace")
    if isinstance(label, bytes) and len(label.strip()) > MAX_NAME:
        got = f"one of {len(label):,} bytes"
        raise data_error(place, f"a label of at most {MAX_NAME} bytes", got, REDOWNLOAD)
    if not isinstance(label, bytes) or not label.strip():
        expected = f'a number or text in {key}.cls, or as "label" in {key}.json'
        raise data_error(place, expected, repr(label), REDOWNLOAD)
    text = label.strip()
    return (text.lstrip(b"0") or b"0") if text.isdigit() else text


def _wnid(path: str) -> str:
    """Returns the wnid of an ImageNet image from its file name, or an empty string."""
    match = re.match("(n[0-9]{8})_|ILSVRC2012_val_([0-9]{8})", path.rpartition("/")[2])
    if match is None or match[1]:
        return match[1] if match else ""
    position, truth = int(match[2]) - 1, validation_labels()
    return wnids()[truth[position]] if 0 <= position < len(truth) else ""
