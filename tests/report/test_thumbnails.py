"""Tests of thumbnails and attention pictures as data URIs."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from vitral import weights
from vitral.data.records import Files, Packed, Pixels
from vitral.inference.attention import attention_weights
from vitral.report.thumbnails import attention_pictures, data_uri, thumbnail


def opened(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_thumbnails_are_small_and_keep_their_shape():
    rng = np.random.default_rng(0)
    assert opened(data_uri(Image.new("RGB", (400, 200)), 112)).size == (112, 56)
    small = torch.from_numpy(rng.integers(0, 256, (1, 3, 8, 8), np.uint8))
    picture = np.asarray(opened(thumbnail(Pixels(small, np.array([0])), 0)), float)
    assert picture.shape == (112, 112, 3)
    blocks = picture.reshape(8, 14, 8, 14, 3).mean((1, 3))
    assert np.abs(blocks - small[0].permute(1, 2, 0).numpy()).mean() < 30  # JPEG subsamples colors
    squares = rng.integers(0, 256, (1, 3, 64, 64), np.uint8)
    packed = Packed(
        squares, np.array([[300, 100]]), np.array([b"x"]), np.array([0]), "", np.arange(1)
    )
    assert opened(thumbnail(packed, 0)).size == (37, 112)


def test_attention_highlights_the_relevant_patches(run):
    found = weights.load(run)
    gray = torch.tensor([10, 210], dtype=torch.uint8).view(2, 1, 1, 1)
    records = Pixels(gray.expand(2, 3, 8, 8), np.zeros(2, int))
    original, lit = (np.asarray(opened(a), float) for a in attention_pictures(found, records, 1))
    assert np.abs(original - 210).max() <= 2

    data = found.description.config.data
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    _, layers = attention_weights(found.model, (records.images[1:] / 255 - mean) / std)
    flow = np.eye(17)
    for layer in layers:
        flow = (layer[0].mean(0).double().numpy() + np.eye(17)) / 2 @ flow
    expected = flow[0, 1:].reshape(4, 4)
    light = lit.mean(2).reshape(4, 28, 4, 28).mean((1, 3))
    assert np.corrcoef(light.ravel(), expected.ravel())[0, 1] > 0.9
    assert lit.min() < 0.25 * 210 < 0.9 * 210 < lit.max() <= 215


def test_an_image_that_cannot_be_read_has_no_thumbnail(run, tmp_path):
    Image.new("RGB", (30, 20), (200, 100, 0)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")
    names = np.array([b"0.png", b"1.png", b"2.png"])
    records = Files(tmp_path, names, np.ones(3, int), np.zeros(3, int))
    assert opened(thumbnail(records, 0)).size == (90, 60)  # enlarged by an integer factor
    found = weights.load(run)
    assert attention_pictures(found, records, 0) is not None
    for index in (1, 2):
        assert thumbnail(records, index) is None
        assert attention_pictures(found, records, index) is None
