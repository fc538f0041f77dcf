"""The same images as a folder, as tar shards, and as the archives of ILSVRC2012."""

import io
import json
import tarfile
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.imagenet import validation_labels, wnids
from vitral.data.loader import train_batches
from vitral.errors import UserError

WNIDS = ("n01440764", "n02012849", "n03126707", "n07753592")
NUMBER = {"n01440764": 7, "n02012849": 2, "n03126707": 9, "n07753592": 0}  # labels in the shards
AUGMENT = AugmentConfig(policy="trivialaugment", erasing=0.5, mixup=0.8)


def draw(seed):
    colors = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(colors).resize((20 + seed % 5, 18)).save(content, "JPEG")
    return content.getvalue()


TRAIN = {f"{w}/{w}_{i}.JPEG": draw(100 * n + i) for n, w in enumerate(WNIDS) for i in range(6, 12)}


def val_images(numbered_on):
    """Three images per class, named as in the release, or with numbers from 1."""
    true = [w for _ in range(3) for w in WNIDS]
    if numbered_on:
        numbers = range(1, 13)
    else:
        all_of = {w: 1 + np.flatnonzero(validation_labels() == wnids().index(w)) for w in WNIDS}
        numbers = [int(all_of[w][5 * i]) for i, w in zip(np.arange(12) // 4, true, strict=True)]
    names = [f"{w}/ILSVRC2012_val_{n:08d}.JPEG" for w, n in zip(true, numbers, strict=True)]
    return {name: draw(1000 + i) for i, name in enumerate(names)}


def put_folder(root, val):
    for split, images in (("train", TRAIN), ("val", val)):
        for name, content in images.items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def tarred(members, **options):
    """An archive of (name or header, bytes)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", **options) as tar:
        for name, data in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return content.getvalue()


def header(name, kind):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, "other"
    return found


def base(name):
    return name.rpartition("/")[2]


def inner_tars():
    """Tars of the classes in reverse order, each with its images in reverse order."""
    return {
        w: tarred([(base(n), data) for n, data in reversed(TRAIN.items()) if n.startswith(w)])
        for w in reversed(WNIDS)
    }


def put_ilsvrc(root, val=None, train=True):
    root.mkdir(exist_ok=True)
    if train:
        members = [("._n01440764.tar", b"?"), *((f"{w}.tar", t) for w, t in inner_tars().items())]
        (root / "ILSVRC2012_img_train.tar").write_bytes(tarred(members))
    if val:
        flat = sorted((f"./{base(name)}", data) for name, data in val.items())
        flat = [(header("./", tarfile.DIRTYPE), b""), ("./README", b""), *flat]
        (root / "ILSVRC2012_img_val.tar").write_bytes(tarred(flat))
    return root


def cls(name):
    return {"cls": b"%d\n" % NUMBER[name[:9]]}


def js(name):
    return {"json": json.dumps({"label": NUMBER[name[:9]], "width": 20}).encode()}


def both(name):  # as in timm's shards; KEY.json may contain the label of another dataset
    return cls(name) | {"json": json.dumps({"label": 3, "filename": base(name)}).encode()}


def text(name):
    return {"cls": name[:9].encode()}


def shard(images, about=cls):
    members = [("about.json", b'{"made by": "no one"}')]
    for name, data in images:
        fields = about(name)
        key = base(name).removesuffix(".JPEG")
        members += [(f"{key}.{suffix}", fields[suffix]) for suffix in fields]
        members.insert(-1, (f"{key}.jpg", data))
    return tarred(members)


def put_shards(root, val, pattern="test-{}-{:04d}.tar", about=cls):
    for split, images in (("train", TRAIN), ("val", val)):
        shuffled = sorted(images.items(), key=lambda item: crc32(item[1]))
        for i in range(3):
            path = root / pattern.format(split, i)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shard(shuffled[i::3], about))
    return root


def endless(content):
    """An archive that ends exactly after its last member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    return content[: last.offset_data + -(-last.size // 512) * 512]


def two(*members):
    """A shard of two labeled images and the given members."""
    labeled = [("a.jpg", b"?"), ("a.cls", b"1"), ("b.jpg", b"?"), ("b.cls", b"2")]
    return tarred([*labeled, *members])


def opened(root, train=True, **options):
    return open_dataset(DataConfig(path=str(root), **options), 16, 0, train=train)


def contents(records):
    return [records.read(i) for i in range(len(records))]


def batches(root, workers=0):
    dataset = opened(root)
    config = Config(
        model=ViTConfig(image_size=16, patch_size=4),
        data=DataConfig(path=str(root)),
        augment=AUGMENT,
        train=TrainConfig(batch_size=16),
    )
    found = train_batches(
        dataset.train,
        config,
        len(dataset.classes),
        steps=range(3),
        total_steps=3,
        micro_batch=8,
        workers=workers,
        device=torch.device("cpu"),
    )
    return [tensor for batch in found for tensor in (batch.images, batch.targets)]


def assert_same(root, folder, workers=0):
    ours, expected = opened(root), opened(folder)
    assert ours.classes == expected.classes == WNIDS
    for split in ("train", "val"):
        records, reference = getattr(ours, split), getattr(expected, split)
        assert records.labels.tolist() == reference.labels.tolist()
        assert contents(records) == contents(reference)
    pairs = zip(batches(root, workers), batches(folder), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    validation = opened(root, train=False)
    assert (validation.train, validation.classes) == (None, WNIDS)
    assert contents(validation.val) == contents(expected.val)
    assert validation.val.labels.tolist() == expected.val.labels.tolist()


def error_message(root, train=True):
    with pytest.raises(UserError) as caught:
        opened(root, train)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (str(root), "expected", "got", "; "))
    return message
