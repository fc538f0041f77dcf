"""Broken training images: each is reported once, and too many are an error."""

from pathlib import Path

import numpy as np
import pytest

from vitral.data.records import Files
from vitral.errors import UserError
from vitral.training.broken import BrokenImages
from vitral.training.distributed import World


def files(count):
    """Returns records of `count` files, /data/0.jpg and so on, which are never read."""
    names = np.array([f"{i}.jpg".encode() for i in range(count)])
    zeros = np.zeros(count, np.int64)
    return Files(Path("/data"), names, zeros, zeros)


def first_of_two(other):
    """Returns the main process of two; the second one has found the images `other`."""

    class Two(World):
        def gather(self, value):
            return [value, other]

    return Two(0, 2)


@pytest.fixture
def lines():
    return []


def test_each_is_reported_once_by_name_and_reason(lines):
    broken = BrokenImages(files(5000), World(), (), lines.append)
    broken.add([])
    assert lines == []
    broken.add([(7, "cut short"), (3, "no image")])
    broken.add([(7, "cut short"), (4999, "empty")])
    template = "broken image, replaced by another: /data/{}.jpg: {}"
    assert lines == [
        template.format(3, "no image"),
        template.format(7, "cut short"),
        template.format(4999, "empty"),
    ]
    assert broken.known == {3: "no image", 7: "cut short", 4999: "empty"}


def test_images_known_before_a_resume_are_counted_but_not_reported(lines):
    broken = BrokenImages(files(2000), World(), [[1, "a"], [2, "b"]], lines.append)  # from JSON
    broken.add([(2, "b")])
    assert lines == []
    with pytest.raises(UserError, match="3 of 2,000 training images are broken"):
        broken.add([(3, "c")])


@pytest.mark.parametrize(("count", "allowed"), [(999, 0), (1000, 1), (1999, 1), (2000, 2)])
def test_one_in_a_thousand_is_allowed(lines, count, allowed):
    broken = BrokenImages(files(count), World(), (), lines.append)
    for index in range(allowed):
        broken.add([(index, "empty")])
    with pytest.raises(UserError) as error:
        broken.add([(allowed, "cut short")])
    message = str(error.value)
    verb = "are" if allowed else "is"
    assert f"data: {allowed + 1} of {count:,} training images {verb} broken" in message
    assert "more than 0.1%: /data/0.jpg" in message
    assert f"(the first: {'empty' if allowed else 'cut short'})" in message


def test_ten_are_named_and_the_rest_counted(lines):
    broken = BrokenImages(files(20_000), World(), (), lines.append)
    broken.add((index, "empty") for index in range(13))
    assert len(lines) == 11
    assert lines[-1] == "and 3 more"
    with pytest.raises(UserError) as error:
        broken.add((index, "empty") for index in range(100))
    assert str(error.value).count("/data/") == 10


def test_processes_synchronize_on_request(lines):
    world = first_of_two({5: "second", 2: "both"})
    broken = BrokenImages(files(3000), world, (), lines.append)
    broken.add([(9, "first"), (2, "both")])
    assert (lines, broken.known) == ([], {})
    broken.synchronize()
    assert list(broken.known.items()) == [(2, "both"), (5, "second"), (9, "first")]
    assert [line.rpartition(": ")[2] for line in lines] == ["both", "second", "first"]
    broken.synchronize()  # the second process finds the same images again
    assert len(lines) == 3
