"""The curves of progress.csv as a picture: is the run well, and does it still learn?"""

import csv
import math
from pathlib import Path

from esddpm_io.atomic import atomic_path

# Losses have these names; those of a quarter of the timesteps end in _q0 … _q3.
_LOSSES = ("loss", "train_loss", "val_loss")
_BESIDE = ("grad_norm", "lr")
_INCHES = (3.6, 2.7)  # of a panel


def draw_progress(table: Path, picture: Path) -> bool:
    """Draw the losses, the length of the gradients and lr of `table` against the step.

    Loss of quarters of the timesteps are thin lines. A step that a killed and resumed run made
    twice counts as it went the second time. Returns whether there was anything to draw: a curve
    needs two rows. ImportError without matplotlib.
    """
    rows = _rows(table) if table.exists() else {}
    if len(rows) < 2:
        return False
    from matplotlib.figure import Figure

    panels = [[n for n in _columns(rows) if n.partition("_q")[0] in _LOSSES]]
    panels += [[name] for name in _BESIDE if name in _columns(rows)]
    figure = Figure(figsize=(_INCHES[0] * len(panels), _INCHES[1]), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(step, row[name]) for step, row in rows.items() if name in row]
            axes.plot(*zip(*points, strict=True), label=name, lw=0.8 if "_q" in name else 1.6)
        positive = all(row.get(name, 1) > 0 for row in rows.values() for name in names)
        axes.set(xlabel="step", yscale="log" if positive else "linear")
        axes.legend(fontsize=7, frameon=False)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _rows(table: Path) -> dict[float, dict[str, float]]:
    """Finite figures by step, in the order of the steps."""
    with open(table, encoding="utf-8", newline="") as file:
        numbers = [
            {name: _number(cell) for name, cell in row.items()} for row in csv.DictReader(file)
        ]
    finite = [{n: value for n, value in row.items() if math.isfinite(value)} for row in numbers]
    by_step = {row["step"]: row for row in finite if "step" in row}
    return {step: by_step[step] for step in sorted(by_step)}


def _columns(rows: dict[float, dict[str, float]]) -> list[str]:
    return sorted({name for row in rows.values() for name in row})


def _number(cell: object) -> float:
    try:
        return float(str(cell))
    except ValueError:
        return math.nan
