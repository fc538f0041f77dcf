"""Tests of the page in a real browser: console messages, network requests and rendering.

Skipped if Chromium is not installed.
"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from vitral import train
from vitral.cli import main

CHROMIUM = shutil.which("chromium")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
--disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr
--proxy-server=127.0.0.1:9"""
DARK, LIGHT = 0, 1  # values of Blink's setting

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def browse(place, page, *more):
    """Opens a page in a new profile; returns standard output, console lines and requested URLs."""
    log = place / "net.json"
    words = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={place / 'profile'}", *more]
    words += [f"--log-net-log={log}", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # Chromium's own requests do not have an origin.
    urls = [e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin"]
    urls = [url for url in urls if not url.startswith(("file:", "data:"))]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], urls


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a short run on digits, in a separate folder."""
    root = tmp_path_factory.mktemp("runs")
    short = "--model.dim 16 --model.depth 1 --train.epochs 2 --optim.warmup-epochs 0"
    run = train("digits", *short.split(), "--train.threads", "1", "--out", str(root / "run"))
    assert main(["report", str(run), "--out", str(root / "alone" / "page.html")]) == 0
    return root / "alone" / "page.html"


@pytest.mark.parametrize(
    ("scheme", "width", "background"), [(LIGHT, 1280, (255, 255, 255)), (DARK, 390, (15, 18, 23))]
)
def test_the_page_renders_and_loads_nothing(page, tmp_path, scheme, width, background):
    screenshot = tmp_path / "screenshot.png"
    options = [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},3000"]
    _, console, urls = browse(tmp_path, page, f"--screenshot={screenshot}", *options)
    assert console == []
    assert urls == []
    pixels = np.asarray(Image.open(screenshot).convert("RGB"))
    assert pixels.shape[1] == width
    assert tuple(pixels[2000, 2]) == background
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    drawn = (pixels != pixels[2000, 2]).any(2).reshape(10, 300, width).mean((1, 2))
    assert (drawn > 0.02).all()


def test_requests_of_a_page_are_detected(page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.log('hello')</script>")
    _, console, urls = browse(tmp_path, bad, "--dump-dom")
    assert len(console) >= 1
    assert urls == ["http://127.0.0.1:9/x.png"]
    text = page.read_text()
    guarded = tmp_path / "guarded.html"
    guarded.write_text(text.replace("<main>", f"<main>{bad.read_text()}"))
    _, console, urls = browse(tmp_path, guarded, "--dump-dom")
    assert "Content Security Policy" in " ".join(console)
    assert urls == []


def test_the_page_fits_on_a_phone(page, tmp_path):
    frame = tmp_path / "frame.html"
    measure = "document.title = this.contentDocument.documentElement.scrollWidth"
    content = html.escape(re.sub("<meta http-equiv[^>]*>", "", page.read_text()))
    frame.write_text(
        f"<iframe style='width:390px;border:0' onload='{measure}' srcdoc=\"{content}\"></iframe>"
    )
    text, _, _ = browse(tmp_path, frame, "--dump-dom")
    assert "<title>390</title>" in text
