import csv

import numpy as np
import pytest
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.training import progress_plot
from guided_diffusion.training.progress_plot import draw_progress
from tests.guided_diffusion.test_train_util import train_loop


def write(path, *rows):
    names = sorted({name for row in rows for name in row})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def pixels(path):
    return np.asarray(Image.open(path))


def test_rows_are_finite_figures_and_a_step_made_again_counts_as_the_second_time(tmp_path):
    table = tmp_path / "progress.csv"
    write(
        table,
        {"step": 1, "loss": 3.0, "val_loss": ""},
        {"step": 3, "loss": "nan", "val_loss": 2.0},
        {"step": 2, "loss": 5.0},
        {"step": 3, "loss": 4.0, "note": "text"},
        {"loss": 9.0},
    )
    rows = progress_plot._rows(table)
    assert list(rows) == [1, 2, 3]
    assert rows[3] == {"step": 3, "loss": 4.0} and rows[1] == {"step": 1, "loss": 3.0}


def test_a_curve_needs_two_rows_and_follows_the_figures(tmp_path):
    table, picture = tmp_path / "progress.csv", tmp_path / "progress.png"
    assert not draw_progress(table, picture)
    write(table, {"step": 1, "loss": 3.0})
    assert not draw_progress(table, picture) and not picture.exists()
    seen = []
    for last in (2.0, 0.5):
        write(table, {"step": 1, "loss": 3.0}, {"step": 2, "loss": last})
        assert draw_progress(table, picture)
        seen.append(pixels(picture))
    assert seen[0].shape == seen[1].shape and not np.array_equal(*seen)
    write(table, {"step": 1, "loss": 3.0, "lr": 1, "loss_q0": 2}, {"step": 2, "lr": 0, "loss": 1})
    assert draw_progress(table, picture)
    assert pixels(picture).shape[1] == 2 * seen[0].shape[1], "a panel for lr, none for quarters"


@pytest.mark.parametrize("formats", [["csv"], ["log"]])
def test_a_run_draws_its_table_at_each_save(tmp_path, formats, monkeypatch):
    logger.configure(str(tmp_path), formats)
    drawn = []
    monkeypatch.setattr(
        "guided_diffusion.training.loop.draw_progress",
        lambda table, picture: drawn.append(draw_progress(table, picture)),
    )
    train_loop(iterations=6, save_interval=4).run_loop()
    logger.reset()
    # At steps 4 and 6 of a log of every second step.
    assert drawn == ([True, True] if formats == ["csv"] else [False, False])
    assert (tmp_path / "progress.png").exists() == (formats == ["csv"])
