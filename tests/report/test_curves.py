"""Tests of the lines plotted in the figure of loss and accuracy."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from vitral.report.curves import draw

ROWS = [
    {"epoch": 0.5, "loss": 2.0},
    {"epoch": 1.0, "loss": 1.5, "val_loss": 1.2, "val_top1": 0.25, "val_top5": 0.75},
    {"epoch": 1.5, "loss": 1.25},
    {"epoch": 2.0, "loss": 1.0, "val_loss": 1.1, "val_top1": 0.5, "val_top5": 1.0},
]


@pytest.fixture
def plotted(tmp_path, monkeypatch):
    """A function that plots rows and returns the axes of loss and accuracy."""
    figures, save = [], Figure.savefig

    def keep(figure, *given, **options):
        figures.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def plot(rows):
        draw(tmp_path / "curves.png", rows)
        return figures[-1].axes

    return plot


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_each_column_is_a_line_over_epochs(plotted):
    loss, accuracy = plotted(ROWS)
    assert lines(loss) == {
        "training": [[0.5, 2], [1, 1.5], [1.5, 1.25], [2, 1]],
        "validation": [[1, 1.2], [2, 1.1]],
    }
    assert lines(accuracy) == {"top-1": [[1, 25], [2, 50]], "top-5": [[1, 75], [2, 100]]}
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["top-1", "top-5"]


def test_moving_averages_have_separate_lines(plotted):
    loss, accuracy = plotted([{"epoch": 1.0, "ema_loss": 0.5, "ema_top1": 0.125}])
    assert lines(loss) == {"validation, EMA": [[1, 0.5]]}
    assert lines(accuracy) == {"top-1, EMA": [[1, 12.5]]}
    assert loss.get_legend() is None  # the title identifies a single line


def test_short_lines_have_markers(plotted):
    for rows, marker in ((ROWS[:1], "."), (ROWS[:2], "."), (ROWS, "None")):
        assert plotted(rows)[0].lines[0].get_marker() == marker


def test_a_run_without_rows_has_empty_curves(plotted, tmp_path):
    assert [lines(axes) for axes in plotted([])] == [{}, {}]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1320, 480)


def test_a_link_at_the_path_of_the_figure_is_replaced(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "curves.png").symlink_to(tmp_path / "precious")
    draw(tmp_path / "curves.png", ROWS)
    assert (tmp_path / "precious").read_text() == "kept"
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
