import itertools
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch

from vitral.bench import rounds
from vitral.bench.data import REFERENCE
from vitral.cli import main
from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.records import Packed
from vitral.data.tools.rates import (
    choose_decoder,
    images_per_second,
    input_speed_message,
    measure_rate,
)
from vitral.errors import UserError

CPU = torch.device("cpu")
TINY = "--model.dim 16 --model.depth 1 --model.num-heads 2 --model.num-kv-heads 1".split()
TINY += "--model.image-size 16 --model.patch-size 8 --train.batch-size 8 --data.workers 1".split()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(rounds, "SECONDS", 0.01)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_config(path, **data):
    return Config(
        model=ViTConfig(image_size=16, patch_size=8),
        data=DataConfig(path=str(path), **data),
        augment=AugmentConfig(policy="randaugment", mixup=0.8),
        train=TrainConfig(batch_size=8),
    )


def packed():
    images = np.zeros((4, 3, 8, 8), np.uint8)
    return Packed(images, np.full((4, 2), 8), np.array([b"a"] * 4), np.arange(4), "", np.arange(4))


@pytest.mark.parametrize("decode", ["auto", "cpu"])
def test_a_single_decoder_is_not_measured(image_folder, decode):
    config = make_config(image_folder, decode=decode)
    train = open_dataset(config.data, 16, 0).train
    for records in (train, packed(), open_dataset(DataConfig(path="digits"), 8, 0).train):
        assert choose_decoder(records, config, 0, CPU) == ("cpu", {})


def test_requesting_a_missing_gpu_is_an_error(image_folder):
    config = make_config(image_folder, decode="gpu")
    records = open_dataset(config.data, 16, 0).train
    with pytest.raises(UserError, match=r"^data\.decode: gpu: .* got a cpu device; pass --data"):
        choose_decoder(records, config, 0, CPU)
    for device in (CPU, torch.device("cuda")):
        with pytest.raises(UserError, match="got images that are already decoded"):
            choose_decoder(packed(), config, 0, device)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_faster_of_two_input_paths_is_chosen(image_folder):
    config = make_config(image_folder)
    records = open_dataset(config.data, 16, 0).train
    decoder, rates = choose_decoder(records, config, 2, torch.device("cuda"))
    assert set(rates) == {"cpu", "gpu"}
    assert rates[decoder] == max(rates.values()) > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_a_measurement_stops_its_workers(image_folder, workers, decoder):
    config = make_config(image_folder)
    records = open_dataset(config.data, 16, 0).train
    assert measure_rate(records, config, workers, CPU, decoder, 0.01) > 0
    assert not multiprocessing.active_children()


def test_the_first_batches_are_not_measured():
    taken = []

    def counts():
        for n in itertools.count():
            taken.append(n)
            yield 0 if n < 3 else 5

    assert images_per_second(counts(), 3, CPU, 0.01) > 0
    assert len(taken) % 3 == 0
    assert images_per_second(itertools.chain([7] * 3, itertools.repeat(0)), 3, CPU, 0.01) == 0


def test_input_speed_messages():
    assert (
        input_speed_message(0.03, packed=False)
        == "input keeps up with the model, which waits 3% of the time"
    )
    starved = input_speed_message(11 / 21, packed=False)
    assert starved.startswith("input slows the model down 2.1x: the model waits 52% of the time; ")
    assert "--data.workers" in starved
    assert "data pack" in starved
    assert "data pack" not in input_speed_message(11 / 21, packed=True)


def test_runs_alternate(monkeypatch):
    order = []

    def run(name, rates):
        found = iter(rates)
        return lambda: order.append(name) or next(found)

    runs = {"ours": run("a", [20.0, 21.0, 24.0]), REFERENCE: run("b", [10.0, 42.0, 40.0])}
    own, reference = rounds.table(rounds.interleaved_rates(runs), REFERENCE)
    assert "".join(order) == "abbaab"
    assert re.search(r" 21 images/s .* 0\.60 times torchvision$", own)
    assert re.search(r" 40 images/s .* 1\.00 times torchvision$", reference)


def numbers(pattern, text):
    return [float(n.replace(",", "")) for n in re.findall(pattern, text, re.MULTILINE)]


def test_bench_data_of_files(image_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "val" / "dark" / "00.jpg").write_bytes(b"")
    (folder / "val" / "dark" / "01.jpg").unlink()
    (folder / "val" / "dark" / "01.jpg").symlink_to("nowhere.jpg")
    assert main(["bench", "data", str(folder), "digits", *TINY]) == 0
    out = capsys.readouterr().out
    assert "10 images of images, read repeatedly, on cpu" in out
    assert "\nworkers: 1\n" in out
    assert len(numbers(r"^vitral.* ([\d,]+) images/s", out)) == 3
    assert numbers(r"^torchvision.* ([\d.]+) times torchvision", out) == [1, 1]


def test_bench_data_requires_images_that_can_be_decoded(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.jpg").write_bytes(b"no image")
    assert main(["bench", "data", str(tmp_path), *TINY]) == 2
    assert "expected images that can be decoded" in capsys.readouterr().err


def test_bench_data_of_decoded_images(capsys):
    assert main(["bench", "data", "digits", *TINY]) == 0
    out = capsys.readouterr().out
    assert len(numbers(r" ([\d,]+) images/s", out)) == 1
    assert "torchvision" not in out
    assert numbers(r"^augmentation only, 64 images of \d+ pixels: ([\d.]+) ms", out)[0] > 0


@pytest.mark.parametrize("path", ["folder", "digits"])
def test_bench_train_prints_both_rates_and_their_ratio(image_folder, monkeypatch, capsys, path):
    monkeypatch.setattr(rounds, "ROUNDS", 1)
    data = str(image_folder) if path == "folder" else path
    assert main(["bench", "train", "digits", "--data", data, *TINY]) == 0
    out = capsys.readouterr().out
    (synthetic,), (real,) = (numbers(rf"^{n} +([\d,]+) im", out) for n in ("synthetic", "training"))
    (ratio,) = numbers(r"^ratio +([\d.]+)%", out)
    assert ratio == pytest.approx(100 * real / synthetic, rel=0.1)  # the rates are rounded
    assert "micro-batches of 8 images of 16 pixels" in out
