"""benchmarks/startup.py: opening a folder, and the imports of commands."""

import pytest

from vitral.config import DataConfig
from vitral.data.formats import open_dataset


@pytest.fixture
def startup(benchmarks):
    import startup

    return startup


def test_a_created_folder_has_the_requested_files(startup, tmp_path):
    startup.create(tmp_path / "images", classes=3, images=60)
    dataset = open_dataset(DataConfig(path=str(tmp_path / "images")), 8, 0)
    assert (len(dataset.classes), len(dataset.train), len(dataset.val)) == (3, 30, 150)
    table = open_dataset(DataConfig(path=str(tmp_path / "images" / "labels.csv")), 8, 0)
    assert (table.classes, len(table.train), len(table.val)) == (dataset.classes, 30, 150)


def test_the_table_contains_medians_of_ratios(startup):
    cost = startup.Cost
    costs = {
        "torch": [cost(1, 2, 100), cost(2, 2, 200), cost(4, 8, 300)],
        "train": [cost(3, 4, 150), cost(4, 3, 250), cost(6, 9, 350)],
    }
    assert startup.table(costs) == [
        "torch             2.00 s of processor time (1.00 times),   2.00 s (1.00 times),   200 MB",
        "train             4.00 s of processor time (2.00 times),   4.00 s (1.50 times),   250 MB",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["commands", "folder"])
def test_measurements_run(startup, tmp_path, monkeypatch, capsys, what):
    startup.create(tmp_path / "images", classes=2, images=60)
    path = [str(tmp_path / "images")] if what == "folder" else []
    monkeypatch.setattr("sys.argv", ["startup.py", what, *path, "--rounds", "1"])
    startup.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == [
        *(startup.COMMANDS if what == "commands" else startup.OPEN)
    ]
