import gzip
import io
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.imagenet import validation_labels, wnids
from vitral.data.loader import train_batches
from vitral.data.records import OPEN, Spans
from vitral.errors import UserError

WNIDS = ("n01440764", "n02012849", "n03126707", "n07753592")
NUMBER = {"n01440764": 7, "n02012849": 2, "n03126707": 9, "n07753592": 0}  # as shards have them
KIT = "ILSVRC2012_devkit_t12"
AUGMENT = AugmentConfig(policy="trivialaugment", erasing=0.5, mixup=0.8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAL_CACHE", str(place))
    return place / "index"


def draw(seed):
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(colours).resize((20 + seed % 5, 18)).save(content, "JPEG")
    return content.getvalue()


TRAIN = {f"{w}/{w}_{i}.JPEG": draw(100 * n + i) for n, w in enumerate(WNIDS) for i in range(6, 12)}


def val_images(numbered_on):
    """Three of each class, called as in the release, or with their numbers from 1 on."""
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
    """The tars of the classes, out of order, and so their images."""
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


def kit_files(val, ids):
    """meta.mat, with a synset that has children too, and the ground truth."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children"]
    synsets = np.zeros((len(ids) + 1, 1), [(field, object) for field in fields])
    for i, (wnid, number) in enumerate([*ids.items(), ("n00001740", 1001)]):
        synsets[i, 0] = (number, wnid, "entity, thing", 3 if number > 1000 else 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    in_order = sorted(val, key=base)
    truth = "".join(f"{ids[name[:9]]}\n" for name in in_order)
    return {
        f"{KIT}/data/meta.mat": meta.getvalue(),
        f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


IDS = {"n02012849": 1, "n07753592": 2, "n01440764": 3, "n03126707": 4}


def put_kit(root, val, ids=IDS, packed=True, change=lambda files: None):
    files = kit_files(val, ids)
    change(files)
    if packed:
        with tarfile.open(root / f"{KIT}.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    else:
        (root / KIT / "data").mkdir(parents=True)
        for name, data in files.items():
            (root / name).write_bytes(data)


def cls(name):
    return {"cls": b"%d\n" % NUMBER[name[:9]]}


def js(name):
    return {"json": json.dumps({"label": NUMBER[name[:9]], "width": 20}).encode()}


def both(name):  # as timm has them; there may be another set's label in KEY.json
    return cls(name) | {"json": json.dumps({"label": 3, "filename": base(name)}).encode()}


def text(name):
    return {"cls": name[:9].encode()}


def shard(images, about=cls):
    members = [("about.json", b'{"made by": "nobody"}')]
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
    ours, theirs = opened(root), opened(folder)
    assert ours.classes == theirs.classes == WNIDS
    for split in ("train", "val"):
        mine, reference = getattr(ours, split), getattr(theirs, split)
        assert mine.labels.tolist() == reference.labels.tolist()
        assert contents(mine) == contents(reference)
    pairs = zip(batches(root, workers), batches(folder), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    alone = opened(root, train=False)
    assert (alone.train, alone.classes) == (None, WNIDS)
    assert contents(alone.val) == contents(theirs.val)
    assert alone.val.labels.tolist() == theirs.val.labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_ilsvrc_without_kit_equals_the_folder(tmp_path, workers):
    val = val_images(numbered_on=False)
    root = put_ilsvrc(tmp_path / "tars", val)
    folder = put_folder(tmp_path / "folder", val)
    assert_same(root, folder, workers)
    assert_same(root / "ILSVRC2012_img_train.tar", folder)
    name = "n01440764.tar/n01440764_10.JPEG"
    assert opened(root).train.where(0) == f"{root}/ILSVRC2012_img_train.tar: {name}"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_ids_of_the_kit_are_not_the_order_of_wnids(tmp_path, packed, train):
    val = val_images(numbered_on=True)
    root = put_ilsvrc(tmp_path / "tars", val, train)
    put_kit(root, val, packed=packed)
    if train:
        assert_same(root, put_folder(tmp_path / "folder", val))
    else:
        found = opened(root, train=False)
        assert found.classes == WNIDS
        assert contents(found.val) == [val[name] for name in sorted(val)]
        assert found.val.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_validation_tar_alone_has_the_thousand_classes(tmp_path):
    val = val_images(numbered_on=False)
    root = put_ilsvrc(tmp_path / "tars", val, train=False)
    for path in (root, root / "ILSVRC2012_img_val.tar"):
        found = opened(path, train=False)
        assert found.classes == wnids()
        assert [wnids()[label] for label in found.val.labels] == [name[:9] for name in sorted(val)]


def test_folders_beside_the_archives_come_first(tmp_path):
    val = val_images(numbered_on=False)
    put_ilsvrc(put_folder(tmp_path, val), val)
    (tmp_path / "val.tar.gz").write_bytes(b"?")
    assert opened(tmp_path).train.where(0).startswith(str(tmp_path / "train"))
    (tmp_path / "train/backup.tar").write_bytes(b"?")
    assert opened(tmp_path / "train").train.where(0).startswith(str(tmp_path / "train/n"))
    shutil.rmtree(tmp_path / "val")  # half extracted
    assert "ILSVRC2012_img_train.tar" in opened(tmp_path).train.where(0)


@pytest.mark.parametrize("about", [cls, js, both, text])
@pytest.mark.parametrize("pattern", ["test-{}-{:04d}.tar", "{}/{:06d}.tar"])
def test_shards_equal_the_folder(tmp_path, about, pattern):
    val = val_images(numbered_on=False)
    root = put_shards(tmp_path / "shards", val, pattern, about)
    assert_same(root, put_folder(tmp_path / "folder", val), workers=2 * (about is cls))


def anonymous(label):
    """Shards whose keys say nothing: numbers and `label` for each image."""

    def put(root, split, images, first=0):
        named = {f"x{first + i:03d}": name for i, name in enumerate(sorted(images))}
        members = []
        for key, name in named.items():
            members += [(f"{key}.png", images[name]), *label(key, name)]
        root.mkdir(exist_ok=True)
        (root / f"{split}.tar").write_bytes(tarred(members))

    return put


def test_wnids_from_json_of_one_split_name_the_other(tmp_path):
    val = val_images(numbered_on=True)
    told = {"n01440764": 3, "n02012849": 2, "n03126707": 1, "n07753592": 0}

    def by_file_name(key, name):
        fields = {"label": told[name[:9]], "filename": base(name)}
        return [(f"{key}.json", json.dumps(fields).encode())]

    anonymous(by_file_name)(tmp_path, "train", TRAIN)
    anonymous(lambda key, name: [(f"{key}.cls", b"%d" % told[name[:9]])])(tmp_path, "val", val)
    for train in (True, False):
        found = opened(tmp_path, train=train)
        assert found.classes == WNIDS
        assert contents(found.val) == [val[name] for name in sorted(val)]
    assert contents(opened(tmp_path).train) == [TRAIN[name] for name in sorted(TRAIN)]


def test_each_split_knows_its_own_wnids_best(tmp_path):
    val = val_images(numbered_on=False)
    (tmp_path / "train-0.tar").write_bytes(shard(TRAIN.items()))
    other = {name: b"%d" % (9 - NUMBER[name[:9]]) for name in val}
    (tmp_path / "val-0.tar").write_bytes(shard(val.items(), lambda name: {"cls": other[name]}))
    found = opened(tmp_path)
    assert found.classes == WNIDS
    assert found.val.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert contents(found.val) == [val[name] for name in sorted(val)]
    assert contents(found.train) == [TRAIN[name] for name in sorted(TRAIN)]


@pytest.mark.parametrize("groups", [3, 8])
def test_wnids_that_do_not_fit_the_labels_are_no_names(tmp_path, groups):
    label = {name: b"%d" % (i * groups // 24) for i, name in enumerate(sorted(TRAIN))}
    (tmp_path / "all.tar").write_bytes(shard(TRAIN.items(), lambda name: {"cls": label[name]}))
    assert opened(tmp_path).classes == tuple("01234567"[:groups])


@pytest.mark.parametrize(
    ("lines", "classes"),
    [
        ("", ("0", "2", "7", "10")),
        ("d\n-\nb\n-3\n-4\n-5\n-6\na\n-8\n-9\nc\n", None),
    ],
)
def test_names_of_numbered_labels(tmp_path, lines, classes):
    told = {"n01440764": 7, "n02012849": 2, "n03126707": 10, "n07753592": 0}
    put = anonymous(lambda key, name: [(f"{key}.cls", b"%02d" % told[name[:9]])])
    put(tmp_path, "train", TRAIN)
    put(tmp_path, "validation", val_images(numbered_on=True))
    if lines:
        (tmp_path / "classes.txt").write_text(lines)
    found = opened(tmp_path)
    assert found.classes == (classes or tuple(sorted(lines.split())))
    shown = {c: set() for c in "abcd"}
    names = dict(zip(("0", "2", "7", "10"), "dbac", strict=True))
    for content, label in zip(contents(found.train), found.train.labels, strict=True):
        shown[names.get(found.classes[label], found.classes[label])].add(content)
    for letter, wnid in zip("abcd", WNIDS, strict=True):
        assert shown[letter] == {data for name, data in TRAIN.items() if name.startswith(wnid)}


@pytest.mark.parametrize("kind", ["ilsvrc", "shards"])
def test_without_validation_a_part_is_held_out(tmp_path, kind):
    if kind == "ilsvrc":
        put_ilsvrc(tmp_path)
    else:
        (tmp_path / "all-000.tar").write_bytes(shard(TRAIN.items()))
    found = opened(tmp_path, val_fraction=0.34)
    assert np.bincount(found.val.labels).tolist() == [2, 2, 2, 2]
    assert sorted(contents(found.train) + contents(found.val)) == sorted(TRAIN.values())
    assert "held out" in found.notes[0]
    again = opened(tmp_path, train=False, val_fraction=0.34)
    assert len(again.val) == (8 if kind == "ilsvrc" else 24)  # shards alone: all of them


def test_test_shards_are_validated_on_and_said_so(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(shard(TRAIN.items()))
    (tmp_path / "test-0.tar").write_bytes(shard(val_images(numbered_on=False).items()))
    found = opened(tmp_path)
    assert len(found.val) == 12
    assert "test" in found.notes[0]


def test_validation_alone_leaves_the_training_archives_alone(tmp_path):
    val = val_images(numbered_on=False)
    tars, shards = put_ilsvrc(tmp_path / "tars", val), put_shards(tmp_path / "shards", val)
    broken = tarred([(f"{w}.tar", b"?") for w in WNIDS])
    (tars / "ILSVRC2012_img_train.tar").write_bytes(broken)
    (shards / "test-train-0001.tar").write_bytes(b"?")
    for root in (tars, shards):
        assert opened(root, train=False).classes == WNIDS
        with pytest.raises(UserError, match="train"):
            opened(root)


def overwrite(path, content):
    """Other bytes, but the same size and times."""
    times = path.stat()
    assert len(content) == times.st_size
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def spoil_headers(root):
    for path in root.glob("*.tar"):
        content = path.read_bytes()
        overwrite(path, b"?" * 512 + content[512:])


@pytest.mark.parametrize("put", [put_ilsvrc, put_shards])
def test_the_index_is_read_instead_of_the_archives(tmp_path, cache, put):
    root = put(tmp_path, val_images(numbered_on=False))
    first = opened(root)
    assert sorted(path.suffix for path in cache.iterdir()) == [".npz", ".npz"]
    if put is put_shards:  # of the train tar the outer headers are read for the classes alone
        spoil_headers(root)
    else:
        overwrite(root / "ILSVRC2012_img_train.tar", b"?" * first.train.stamps[0][0])
    second = opened(root)
    assert second.fingerprint == first.fingerprint
    assert second.train.offsets.tolist() == first.train.offsets.tolist()
    shutil.rmtree(cache)
    with pytest.raises(UserError):
        opened(root)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"\x93NUMPY?"]
)
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    root = put_shards(tmp_path, val_images(numbered_on=False))
    first = opened(root).fingerprint
    for path in cache.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert opened(root).fingerprint == first
    spoil_headers(root)
    assert opened(root).fingerprint == first


def test_a_changed_archive_is_indexed_anew_and_never_read_by_an_old_index(tmp_path):
    root = put_ilsvrc(tmp_path, val_images(numbered_on=False))
    before = opened(root)
    images = [(base(name), data[::-1]) for name, data in val_images(numbered_on=False).items()]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tarred(images, format=tarfile.PAX_FORMAT))
    os.utime(root / "ILSVRC2012_img_val.tar", ns=(1, 1))
    wanted = {data[::-1] for data in val_images(numbered_on=False).values()}
    assert {*contents(opened(root).val)} == wanted
    with pytest.raises(FileNotFoundError, match="changed"):
        before.val.read(0)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    root = put_shards(tmp_path / "shards", val_images(numbered_on=False))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "file"))
    assert len(opened(root).train) == 24
    monkeypatch.delenv("VITRAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    opened(root)
    assert len([*(tmp_path / "xdg/vitral/index").iterdir()]) == 2


def test_a_disk_that_fills_up_leaves_no_half_index(tmp_path, cache):
    root = put_shards(tmp_path, val_images(numbered_on=False))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert len(opened(root).train) == 24
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*cache.iterdir()]


def test_an_index_is_of_one_place_and_one_way_to_read(tmp_path):
    for folder, number in (("a", b"1"), ("b", b"3")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "all.tar"
        path.write_bytes(two(("c.jpg", b"?"), ("c.cls", number)))
        os.utime(path, ns=(1, 1))
    assert opened(tmp_path / "a").classes == ("1", "2")
    assert opened(tmp_path / "b", train=False).classes == ("1", "2", "3")
    assert "a tar for each of two classes" in refusal(tmp_path / "b/all.tar")


def open_and_remove(root, cache, wanted, barrier):
    barrier.wait()
    for _ in range(15):
        assert opened(root).fingerprint == wanted
        for path in cache.glob("*.npz"):
            path.unlink(missing_ok=True)


def test_processes_may_build_the_index_at_once(tmp_path, cache):
    root = put_shards(tmp_path, val_images(numbered_on=False))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (root, cache, opened(root).fingerprint, barrier)
    others = [context.Process(target=open_and_remove, args=arguments) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert not [path for path in cache.iterdir() if path.suffix != ".npz"]


def refusal(root, train=True):
    with pytest.raises(UserError) as caught:
        opened(root, train)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (str(root), "expected", "got", "; "))
    return message


def endless(content):
    """An archive cut exactly behind its last member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    return content[: last.offset_data + -(-last.size // 512) * 512]


SHARD = shard(TRAIN.items())
FIRST_END = 512 * (2 + 1 + 1 + 1) + -(-len(TRAIN["n01440764/n01440764_6.JPEG"]) // 512) * 512


def sparse():
    found = header("a.jpg", tarfile.GNUTYPE_SPARSE)
    return tarred([(found, b""), ("a.cls", b"1")])


def looping():
    """A size that leads back to the header it is in."""
    found = tarfile.TarInfo("a.jpg")
    found.size = -512
    return endless(tarred([("b.jpg", b"?")])) + found.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def two(*members):
    """A shard of two labelled images, and these."""
    whole = [("a.jpg", b"?"), ("a.cls", b"1"), ("b.jpg", b"?"), ("b.cls", b"2")]
    return tarred([*whole, *members])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a tar archive"),
        (looping(), "cut off or damaged at a.jpg"),
        (b"not a tar archive at all, " * 99, "a tar archive"),
        (gzip.compress(SHARD), "a tar archive, uncompressed"),
        (SHARD[: len(SHARD) // 3], "cut off or damaged at n"),
        (SHARD[:FIRST_END], "cut off or damaged at n01440764_6.cls"),
        (SHARD[: FIRST_END + 100], "cut off or damaged at n01440764_6.cls"),
        (endless(SHARD), "cut off or damaged at n07753592_11.cls"),
        (SHARD[:FIRST_END] + b"?" * 512 + SHARD[FIRST_END + 512 :], "cut off or damaged"),
        (two(("../c.jpg", b"?")), "inside the archive, got ../c.jpg"),
        (two(("c/../../c.txt", b"?")), "inside the archive, got c/../../c.txt"),
        (two(("/etc/c.jpg", b"?")), "inside the archive, got /etc/c.jpg"),
        (two((header("c.jpg", tarfile.SYMTYPE), b"")), "c.jpg: expected a plain file"),
        (two((header("c.jpg", tarfile.LNKTYPE), b"")), "c.jpg: expected a plain file"),
        (two((header("c.cls", tarfile.CHRTYPE), b"")), "c.cls: expected a plain file"),
        (two(("c.jpg", b"?")), "a number or text in c.cls"),
        (two(("c.jpg", b"?"), ("c.json", b'{"caption": "dog"}')), "as label in c.json, got None"),
        (two(("c.jpg", b"?"), ("c.json", b'{"label": 1.5}')), "as label in c.json, got 1.5"),
        (two(("c.jpg", b"?"), ("c.json", b'{"label": true}')), "as label in c.json, got True"),
        (two(("c.jpg", b"?"), ("c.json", b"{label: 3}")), "c.json: expected JSON"),
        (two(("c.jpg", b"?"), ("c.cls", b" \n")), "a number or text in c.cls"),
        (two(("c.cls", b"1"), ("d.cls", b"1")), "an image beside each label"),
        (two(("a.jpg", b"?")), "each name once, got a more than once"),
        (two(("a.png", b"?")), "each name once, got a more than once"),
        (two(("a.cls", b"2")), "each name once, got a.cls more than once"),
        (two(("c.jpg", b"?"), ("c.cls", b"cat")), "all numbers or all text, got 1, 2 beside cat"),
        (two(("c.jpg", b"?"), ("c.cls", b"-1")), "all numbers or all text, got 1, 2 beside -1"),
        (tarred([("README", b"?"), ("._a.jpg", b"?"), ("__MACOSX/a.jpg", b"?")]), "got none"),
        (tarred([]), "got none"),
        (sparse(), "a.jpg: expected a plain file"),
    ],
)
def test_a_bad_shard_is_refused(tmp_path, content, words, cache):
    (tmp_path / "train-0.tar").write_bytes(content)
    assert words in refusal(tmp_path)
    assert not cache.exists()


def test_bad_folders_of_shards_are_refused(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(two())
    (tmp_path / "train-1.tar").write_bytes(tarred([("b.png", b"?"), ("b.cls", b"2")]))
    assert "each name once, got b more than once" in refusal(tmp_path)
    (tmp_path / "train-1.tar").rename(tmp_path / "extra-1.tar")
    assert "got extra-1.tar" in refusal(tmp_path)
    (tmp_path / "extra-1.tar").rename(tmp_path / "train-1.tar.gz")
    assert "gunzip it" in refusal(tmp_path)
    (tmp_path / "train-1.tar.gz").unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert "classes.txt: expected 2 labels, got 2;" in refusal(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    assert "each name once, got cat more than once" in refusal(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "train-0.tar").rename(tmp_path / "val-0.tar")
    assert "train shards beside those of val" in refusal(tmp_path)
    (tmp_path / "val-0.tar").write_bytes(tarred([("c.jpg", b"?"), ("c.cls", b"3")]))
    assert "two classes or more, got 3 alone" in refusal(tmp_path, train=False)


def train_tar(**changed):
    tars = inner_tars() | changed
    return tarred([(f"{name}.tar", content) for name, content in tars.items()])


INNER = inner_tars()["n02012849"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (train_tar()[:-12_000], "cut off or damaged at n01440764.tar"),
        (endless(train_tar()), "cut off or damaged at n01440764.tar"),
        (train_tar(n02012849=INNER[:1100]), "n02012849.tar: expected a whole tar archive"),
        (train_tar(n02012849=endless(INNER)), "cut off or damaged at n02012849_6.JPEG"),
        (train_tar(n02012849=INNER[:512]), "cut off or damaged at n02012849_11.JPEG"),
        (train_tar(n02012849=b""), "n02012849.tar: expected a tar archive"),
        (train_tar(n02012849=b"?" * 1024), "n02012849.tar: expected a tar archive"),
        (train_tar(n02012849=tarred([("../a.JPEG", b"?")])), "inside the archive, got ../a.JPEG"),
        (train_tar(n02012849=tarred([("a.txt", b"?")])), "n02012849.tar: expected images"),
        (train_tar(n02012849=tarred([("a.jpg", b"?")] * 2)), "got a.jpg more than once"),
        (tarred([("a/n1.tar", INNER), ("b/n1.tar", INNER)]), "got n1 more than once"),
        (tarred([("n01440764.tar", INNER)]), "two classes or more inside it, got n01440764.tar"),
        (tarred((base(name), data) for name, data in TRAIN.items()), "got n01440764_6.JPEG"),
        (tarred([]), "two classes or more inside it, got none"),
    ],
)
def test_a_bad_train_tar_is_refused(tmp_path, content, words, cache):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(content)
    assert words in refusal(tmp_path)
    assert words in refusal(path)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tarred([("ILSVRC2012_val_00050001.JPEG", b"?")]), "got labels of 50,000"),
        (tarred([("ILSVRC2012_val_00000000.JPEG", b"?")]), "got labels of 50,000"),
        (tarred([("val_1.JPEG", b"?")]), "names like ILSVRC2012_val_00000001.JPEG, got val_1"),
        (tarred([("ILSVRC2012_val_00000001.JPEG", b"?")] * 2), "each name once"),
        (tarred([("ILSVRC2012_val_00000001.JPEG", b"?")]), "the 4 classes of ILSVRC2012_img_train"),
        (tarred([("README", b"?")]), "expected images"),
    ],
)
def test_a_bad_validation_tar_is_refused(tmp_path, content, words):
    put_ilsvrc(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(content)
    assert words in refusal(tmp_path)


def replace_truth(change):
    def apply(files):
        name = f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt"
        files[name] = change(files[name])

    return apply


def replace_meta(content):
    def apply(files):
        files[f"{KIT}/data/meta.mat"] = content

    return apply


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("change", "ids", "words"),
    [
        (replace_truth(lambda t: t[:-2]), IDS, "12 images to 12 in ILSVRC2012_img_val.tar, got"),
        (replace_truth(lambda t: t + b"1\n"), IDS, "got labels of 13"),
        (replace_truth(lambda t: b"5" + t[1:]), IDS, "an ILSVRC2012_ID of data/meta.mat in each"),
        (replace_truth(lambda t: b"1001" + t[1:]), IDS, "got 1001"),  # an inner synset's
        (replace_truth(lambda t: b"?" + t[1:]), IDS, "got ?"),
        (replace_truth(lambda t: b""), IDS, "got none"),
        (replace_truth(lambda t: t), dict.fromkeys(IDS, 4) | {"n99999999": 4}, "got n99999999"),
        (replace_meta(b"no MATLAB file " * 99), IDS, "expected synsets with ILSVRC2012_ID"),
        (replace_meta(b""), IDS, "expected synsets with ILSVRC2012_ID"),
        (dict.popitem, IDS, "ILSVRC2012_validation_ground_truth.txt"),
    ],
)
def test_a_wrong_kit_is_refused(tmp_path, packed, change, ids, words):
    val = val_images(numbered_on=True)
    put_ilsvrc(tmp_path, val)
    put_kit(tmp_path, val, ids, packed, change)
    assert words in refusal(tmp_path)


def test_a_kit_cut_short_is_refused(tmp_path):
    val = val_images(numbered_on=True)
    put_ilsvrc(tmp_path, val)
    put_kit(tmp_path, val)
    path = tmp_path / f"{KIT}.tar.gz"
    for end in (0, 15, len(path.read_bytes()) // 2):
        path.write_bytes(path.read_bytes()[:end])
        assert "a whole archive with data/meta.mat" in refusal(tmp_path)


def test_training_needs_the_train_tar(tmp_path):
    put_ilsvrc(tmp_path, val_images(numbered_on=False), train=False)
    assert "expected ILSVRC2012_img_train.tar, got none" in refusal(tmp_path)


def test_few_archives_are_kept_open(tmp_path):
    paths = [tmp_path / f"{k}.tar" for k in range(OPEN + 9)]
    for k, path in enumerate(paths):
        path.write_bytes(b"%04d" % k)
    stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    everything = np.arange(len(paths))
    columns = (np.zeros_like(everything), np.full(len(paths), 4), np.array([b"x"] * len(paths)))
    spans = Spans(tuple(paths), stamps, everything, *columns, everything)
    before = len([*Path("/proc/self/fd").iterdir()])
    for i in [*everything, *everything[::-1], 0, len(paths) - 1]:
        assert spans.read(i) == b"%04d" % i
    assert len([*Path("/proc/self/fd").iterdir()]) - before == OPEN
