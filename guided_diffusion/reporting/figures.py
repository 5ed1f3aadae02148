"""Plots of groups of settings, as files for papers and as SVG that takes its colours from a page.

matplotlib is loaded when the first one is drawn, and without its state of the whole process.
"""

import contextlib
import io
import itertools
import os
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError
from esddpm_io.images import enlarge
from guided_diffusion.reporting.points import Group, Setting
from guided_diffusion.reporting.strips import Strip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from guided_diffusion.proposal import Proposal

# Told apart by all kinds of colour vision (Okabe and Ito), and by their markers. On a page each has
# a variable of its own in place of the colour, which changes with the theme.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0578d", "#a87b00", "#3f8fc4", "#6b5bb5")
_MARKERS = "os^DvPX"
_INK, _MUTED, _RULE = "#1f1f1d", "#6a6a66", "#dcdcd6"
_VARIABLES = {_INK: "currentColor", _MUTED: "var(--muted)", _RULE: "var(--rule)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS)
}
_PANEL_INCHES = (4.0, 2.9)
_PAPER_DPI = 200
_LABEL_HEIGHT, _LABEL_WIDTH = 11.0, 16  # of a line of a label: points, most letters
_LOGARITHMIC_FROM = 5.0  # times the lowest distance, from which the others look all alike
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.edgecolor": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    # Text stays text; the same drawing is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "es-ddpm",
}
_SVG = "http://www.w3.org/2000/svg"
_BESIDE = ("precision", "recall")  # what else is drawn against T'


def panels(group: Group) -> list[tuple[str, str]]:
    """What can be drawn of a group: keys of metrics, and "t_prime" or "evaluations"."""
    keys = [group.chosen_by, *(key for key in _BESIDE if key in group.metrics)]
    found = [(key, "t_prime") for key in dict.fromkeys(keys)]
    if len({one.about["network_evaluations"] for one in _sampled(group)}) > 1:
        found.insert(1, (group.chosen_by, "evaluations"))
    return found


def panel_svg(group: Group, key: str, against: str) -> ElementTree.Element:
    """One panel as an SVG element, its colours the page's `--series-0` …, `--muted`, `--rule`."""
    with _style():
        figure = _figure(_PANEL_INCHES)
        _draw(figure.subplots(), group, key, against)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    svg = ElementTree.fromstring(text[text.index("<svg") :])
    used = set(re.findall(r"#([\w-]+)", text))
    for element in svg.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    for name in ("width", "height"):
        del svg.attrib[name]
    for metadata in svg.findall(f"{{{_SVG}}}metadata"):
        svg.remove(metadata)
    label = f"{group.metrics[key]} against {_axis_name(against)}; the values are in the table"
    svg.attrib.update({"role": "img", "aria-label": label})
    return svg


def save_sweep_png(groups: list[Group], path: str | os.PathLike) -> None:
    """All panels of all groups, a row for each group, for a paper."""
    rows = [panels(group) for group in groups]
    columns = max(map(len, rows))
    with _style():
        size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * len(rows))
        figure = _figure(size)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, group, own in zip(axes, groups, rows, strict=True):
            for place, panel in itertools.zip_longest(row, own):
                if panel is None:
                    place.set_axis_off()
                else:
                    _draw(place, group, *panel)
        _save(figure, path, _PAPER_DPI)


def save_proposal_png(proposal: "Proposal", title: str, path: str | os.PathLike) -> None:
    """The measured distances against T', bars the interval of the difference to the best point."""
    points = proposal.points
    bars = [[p.difference - p.low for p in points], [p.high - p.difference for p in points]]
    with _style():
        figure = _figure(_PANEL_INCHES)
        axes = figure.subplots()
        axes.axvspan(proposal.low, proposal.high, color=_RULE, alpha=0.6)
        at, distances = [p.t_prime for p in points], [p.distance for p in points]
        axes.errorbar(at, distances, yerr=bars, color=COLOURS[0], marker=_MARKERS[0], capsize=2)
        axes.axvline(proposal.t_prime, color=COLOURS[1], linestyle="--")
        axes.annotate(
            f"T' = {proposal.t_prime}",
            (proposal.t_prime, max(distances)),
            color=COLOURS[1],
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
        )
        _scale(axes, min(distances), max(distances))
        axes.set_title(title, loc="left")
        axes.set_ylabel("Fréchet distance")
        axes.set_xlabel(
            "T'; bars: 95 % interval of the difference to the best\ngrey: cannot be told "
            "from the best"
        )
        _save(figure, path, _PAPER_DPI)


def save_strip_png(strips: list[Strip], path: str | os.PathLike) -> None:
    """Rows of samples at the same indices, each named, pixels repeated so that they are seen."""
    rows = [(strip, row) for strip in strips for row in strip.rows]
    height, width = strips[0].rows[0].images.shape[1:3]
    scale = max(1, round(96 / width))
    several = len(strips) > 1
    names = [f"{row.name}\n{strip.label}" if several else row.name for strip, row in rows]
    longest = max(len(line) for name in names for line in name.split("\n"))
    gap, left, top, per_inch = 4, 24 + 7 * longest, 26, 100
    cell = (height * scale + gap, width * scale + gap)
    most = max(len(strip.indices) for strip in strips)
    canvas = np.full((cell[0] * len(rows), cell[1] * most, 3), 255, np.uint8)
    for number, (_, row) in enumerate(rows):
        for column, image in enumerate(row.images):
            y, x = number * cell[0], column * cell[1]
            canvas[y : y + cell[0] - gap, x : x + cell[1] - gap] = enlarge(image, scale)
    whole = (canvas.shape[1] + left, canvas.shape[0] + top)
    with _style():
        figure = _figure((whole[0] / per_inch, whole[1] / per_inch), layout="none")
        # Pixel for pixel: nothing is resampled.
        figure.figimage(canvas, left, 0)
        for number, name in enumerate(names):
            y = 1 - (top + (number + 0.5) * cell[0]) / whole[1]
            figure.text((left - 10) / whole[0], y, name, ha="right", va="center")
        for column, index in enumerate(strips[0].indices):
            x = (left + (column + 0.5) * cell[1] - gap / 2) / whole[0]
            figure.text(x, 1 - top / 2 / whole[1], f"#{index}", ha="center", va="center")
        _save(figure, path, per_inch)


# --- one panel ---

# Place on the x axis (None: its right end), y, text and colour.
Label = tuple[float | None, float, str, str]


def _scale(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic axis where values reach far above the lowest."""
    if 0 < low * _LOGARITHMIC_FROM < high:
        axes.set_yscale("log")
        steps = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
        ticks = [step for step in steps if low / 1.3 < step < high * 1.3]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def _draw(axes: "Axes", group: Group, key: str, against: str) -> None:
    """Settings of a group with error bars, and the generator's own images as a line across."""
    if key == group.chosen_by:
        _scale(axes, min(group.values(key)), max(group.values(key)))
    draw = _draw_by_evaluations if against == "evaluations" else _draw_by_t_prime
    labels = draw(axes, group, key)
    for setting in group.generators:
        labels.append(_draw_across(axes, setting.value(key), "generator", _MUTED))
    axes.margins(x=0.06, y=0.15)
    about = []
    if len(labels) > len(group.generators) + 1:
        _write_labels(axes, labels)
    else:
        # A name of the only line would take its room.
        about += [label for _, _, label, colour in labels if colour != _MUTED and label]
        _write_labels(axes, [label for label in labels if label[-1] == _MUTED])
    if any(group.spread(setting, key) for setting in group.settings):
        about.append(f"bars: {group.spread_is}")
    axes.set_title(group.metrics[key], loc="left")
    axes.set_xlabel("\n".join([_axis_name(against), "; ".join(about)]).rstrip())


def _draw_by_t_prime(axes: "Axes", group: Group, key: str) -> list[Label]:
    """A line for each series; what starts from noise has no T' and goes across."""
    labels: list[Label] = []
    for setting in group.generators:
        _draw_line(axes, group, [setting], [0], key, _MUTED, "o")
    for number, series in enumerate(group.series):
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        if series.settings[0].t_prime is None:
            for setting in series.settings:
                labels.append(_draw_across(axes, setting.value(key), series.label, colour))
            continue
        places = [setting.t_prime or 0 for setting in series.settings]
        _draw_line(axes, group, series.settings, places, key, colour, marker)
        labels.append((places[-1], series.settings[-1].value(key), series.label, colour))
    ticks = sorted({one.t_prime for one in group.settings if one.t_prime is not None})
    if ticks and min(np.diff(ticks), default=1) * 11 >= ticks[-1] - ticks[0]:
        axes.set_xticks(ticks)
    return labels


def _draw_by_evaluations(axes: "Axes", group: Group, key: str) -> list[Label]:
    """Every setting, and a line through the best T' of each number of evaluations."""
    labels: list[Label] = []
    names = ("sampler", "eta", "guidance_scale", "checkpoint", "start_images")
    axes.set_xscale("log")
    for number, series in enumerate(group.series_by(names)):
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        for setting in series.settings:
            evaluations, value = setting.about["network_evaluations"], setting.value(key)
            axes.plot([evaluations], [value], marker, color=colour, alpha=0.3, markersize=3)
        best = group.best_by_evaluations(series.settings, key)
        _draw_line(axes, group, list(best.values()), list(best), key, colour, marker)
        for place, setting in best.items():
            if setting.t_prime is not None:
                offset = {"xytext": (5, -10), "textcoords": "offset points", "fontsize": 8}
                axes.annotate(setting.name, (place, setting.value(key)), color=colour, **offset)
        labels.append((max(best), best[max(best)].value(key), series.label, colour))
    ticks = sorted({setting.about["network_evaluations"] for setting in _sampled(group)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    return labels


def _draw_line(
    axes: "Axes",
    group: Group,
    settings: Sequence[Setting],
    places: Sequence[float],
    key: str,
    colour: str,
    marker: str,
) -> None:
    values = [setting.value(key) for setting in settings]
    spreads = [group.spread(setting, key) or (np.nan, np.nan) for setting in settings]
    bars = np.abs(np.transpose(spreads) - np.array(values))
    style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
    axes.errorbar(places, values, bars, **style, elinewidth=1)


def _draw_across(axes: "Axes", value: float, text: str, colour: str) -> Label:
    axes.axhline(value, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    return None, value, text, colour


def _write_labels(axes: "Axes", labels: list[Label]) -> None:
    """Text beside the ends of lines, moved up where two would lie on each other."""
    scale = axes.transScale.transform
    (_, low), (_, high) = (scale((1, limit)) for limit in axes.get_ylim())
    taken = -np.inf
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        lines = textwrap.wrap(text, _LABEL_WIDTH)
        half = len(lines) * _LABEL_HEIGHT / 2
        # In points above the x axis, which takes about 0.7 of a panel's height.
        own = (scale((1, y))[1] - low) / (high - low) * _PANEL_INCHES[1] * 72 * 0.7
        height = max(own, taken + half)
        taken = height + half
        where = (x, y) if x is not None else (1, y)
        axes.annotate(
            "\n".join(lines),
            where,
            xycoords="data" if x is not None else axes.get_yaxis_transform(),
            xytext=(7 if x is not None else 3, height - own),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def _axis_name(against: str) -> str:
    return {"t_prime": "T'", "evaluations": "network evaluations"}[against]


def _sampled(group: Group) -> list[Setting]:
    return [setting for series in group.series for setting in series.settings]


# --- matplotlib ---


def _style() -> contextlib.AbstractContextManager:
    """Our settings while the block runs; UserError if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need the matplotlib package: pip install matplotlib") from error
    inked = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), _INK)
    muted = dict.fromkeys(("xtick.color", "ytick.color"), _MUTED)
    return matplotlib.rc_context({**_STYLE, **inked, **muted})


def _figure(inches: tuple[float, float], layout: str = "constrained") -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout=layout)


def _save(figure: "Figure", path: str | os.PathLike, dpi: int) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
