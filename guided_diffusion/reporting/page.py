"""The page: one HTML file that needs nothing beside it."""

import itertools
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from string import Template
from typing import Any

from esddpm_io.atomic import atomic_path
from esddpm_io.files import join
from guided_diffusion.reporting import figures
from guided_diffusion.reporting.html import Content, Element, as_html, element, image
from guided_diffusion.reporting.nearest import Nearest
from guided_diffusion.reporting.points import Group, Point, Setting
from guided_diffusion.reporting.strips import Row, Strip
from guided_diffusion.sampling.gathering import METRICS_FILE

TEMPLATE = Path(__file__).with_name("page.html")
_DRIVER = "scripts/generate_processes_diffusion_and_reverse.py"
# CSS pixels that images are shown at, by repeating theirs as often as fits.
_IN_STRIP, _ENLARGED, _MOST_IN_STRIP = 72, 320, 128
_COLUMNS = {  # of the table, where settings differ in it
    "sampler": "Sampler",
    "eta": "Eta",
    "guidance_scale": "Guidance",
    "clip_denoised": "Clipping",
    "variance": "Variance",
    "checkpoint": "Checkpoint",
    "start_images": "Start images",
}


def write_page(
    groups: list[Group],
    strips: list[list[Strip]],
    nearest: Sequence[Nearest | str],
    path: str | os.PathLike,
) -> None:
    """Write the report of these groups, with the strips and the nearest real images of each."""
    points = [point for group in groups for one in group.settings for point in one.points]
    names = sorted({point.record.get("dataset") or "samples" for point in points})
    title = ", ".join(names)
    sections = [
        _section(group, own, near, several=len(groups) > 1)
        for group, own, near in zip(groups, strips, nearest, strict=True)
    ]
    header = [element("h1", title), *_summaries(groups), _facts(groups, points)]
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=as_html(element("title", f"{title}: early-stopped diffusion")),
        header=as_html(*header),
        sections=as_html(*sections),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- what was run ---


def _summaries(groups: list[Group]) -> list[Element]:
    found = [_summary(group) for group in groups]
    if len(groups) > 1:
        apart = (
            f"These runs were not all measured in the same way, so they stand in {len(groups)} "
            "parts. Numbers of one part may not be compared with those of another."
        )
        found.insert(0, element("p", apart, class_="notice"))
    return found


def _summary(group: Group) -> Element:
    """The best setting in a sentence."""
    key, best = group.chosen_by, group.best_setting
    if best is None:
        return element("p", "The generator's own images.", class_="lede")
    words = [f"Best {group.metrics[key]}: "]
    value = element("strong", _number(best.value(key)))
    rest = [f" at {_describe(group, best)}"]
    if group.generators:
        start = group.best_of(group.generators, key)
        rest.append(f"; the generator's own images have {_number(start.value(key))}")
        if group.best_of((start, best), key) is start:
            rest.append(", which is better: nothing was gained")
    rest.append(".")
    near = [one for one in group.settings if one.above and one.above[1] and one.above[1][0] <= 0]
    # Differences are to this one only if it is the best of the sweep's one seed, generator and all.
    if near and group.seeds == 1 and best.above and best.above[0] == 0:
        others = "; ".join(_describe(group, one) for one in near)
        rest.append(f" These images do not tell it apart from {others}.")
    return element("p", *words, value, "".join(rest), class_="lede")


def _describe(group: Group, setting: Setting) -> str:
    """T', sampler and number of evaluations in words."""
    about, evaluations = setting.about, setting.about["network_evaluations"]
    words = [setting.name, about.get("sampler") or "", f"{evaluations} network evaluations"]
    return ", ".join(word for word in words if word)


def _facts(groups: list[Group], points: list[Point]) -> Element:
    """Who measured what with what, each fact with all the values that it has."""

    def values(*keys: str) -> list[str]:
        found: dict[str, None] = {}
        for point in points:
            value: Any = point.record
            for key in keys:
                value = (value or {}).get(key)
            if value is not None:
                found[str(value)] = None
        return list(found)

    commits = values("provenance", "commit")
    devices = [(point.record.get("sampling") or {}).get("devices", {}) for point in points]
    facts = {
        "Date": _dates(values("provenance", "date")),
        "Metric": [group.metrics[group.chosen_by] for group in groups],
        "Reference": [PurePath(path).name for path in values("evaluation", "reference")],
        "Images": [f"{group.settings[0].points[0].result['images']:,}" for group in groups],
        "Runs": [str(len(points))],
        "Sampler": [point.about.get("sampler") for point in points],
        "Devices": list(itertools.chain.from_iterable(devices)),
        "Machine": values("provenance", "host"),
        "Version": [f"es-ddpm {version}" for version in values("provenance", "version")],
        "Commit": [one[:10] + "-dirty" * one.endswith("-dirty") for one in commits],
        "Software": [
            f"{name} {version}"
            for name in ("python", "torch")
            for version in values("provenance", name)
        ],
    }
    pairs = [
        element("div", element("dt", name), element("dd", ", ".join(filter(None, found))))
        for name, found in ((name, dict.fromkeys(all_of)) for name, all_of in facts.items())
        if any(found)
    ]
    return element("dl", *pairs, class_="facts")


def _dates(dates: list[str]) -> list[str]:
    """From when to when, as few words as it takes."""
    if not dates:
        return []
    first, last = (date[:16].replace("T", " ") for date in (min(dates), max(dates)))
    if first == last:
        return [f"{first} UTC"]
    return [f"{first} to {last[11:] if last[:10] == first[:10] else last} UTC"]


# --- a group ---


def _section(
    group: Group, strips: list[Strip], nearest: Nearest | str, *, several: bool
) -> Element:
    first = group.settings[0].points[0]
    reference = PurePath(first.record["evaluation"]["reference"]).name
    count = f"{first.result['images']:,} images"
    heading = f"{group.metrics[group.chosen_by]} of {count} against {reference}"
    level = 3 if several else 2
    views = [_view(group, strip, level + 1) for strip in strips]

    def heading_of(text: str) -> Element:
        return element(f"h{level}", text, class_="sub")

    return element(
        "section",
        element("h2", heading) if several else None,
        heading_of("Results"),
        _table(group),
        element("p", _about_table(group), class_="notes"),
        _warnings(group),
        _plots(group),
        heading_of("The same samples at every T'"),
        element(
            "p",
            "Samples of one column have the same index, and so the same start image and, with one"
            " seed, the same start noise. Choose one to enlarge it; the slider moves through T'.",
        ),
        *views,
        heading_of("Nearest real images"),
        *_nearest(group, nearest),
        heading_of("Settings and commands"),
        *[_details(point) for setting in group.settings for point in setting.points],
    )


def _plots(group: Group) -> Element:
    drawn = [
        element("div", figures.panel_svg(group, *panel), class_="plot")
        for panel in figures.panels(group)
    ]
    return element("div", *drawn, class_="plots")


def _warnings(group: Group) -> Element | None:
    found: dict[str, None] = {}
    for point in itertools.chain.from_iterable(one.points for one in group.settings):
        for warning in point.result.get("warnings", []):
            found[warning.removeprefix(f"{point.result.get('sample')}: ")] = None
    if not found:
        return None
    return element("ul", *[element("li", text) for text in found], class_="notes")


# --- the table ---


def _table(group: Group) -> Element:
    """One row a setting; the best of each metric is bold."""
    abouts = [one.about for one in group.settings if one.t_prime != 0]
    columns = {
        name: title
        for name, title in _COLUMNS.items()
        if len({str(about[name]) for about in abouts if about.get(name) is not None}) > 1
    }
    several = group.seeds > 1
    titles = ["T'", *(["Run"] if group.is_ambiguous else []), *columns.values()]
    heads = [_head(title) for title in titles]
    numbers: list[list[Content]] = [["Evaluations"], *([["Seeds"]] if several else [])]
    names: list[list[Content]] = [_split_name(label) for label in group.metrics.values()]
    if _knows_differences(group):
        names.insert(1, ["Above the best ", element("small", "(paired, 95 % interval)")])
    numbers += names
    heads += [_head(*words, class_="number") for words in (*numbers, ["Seconds per image"])]
    rows = [_row(group, setting, columns, several) for setting in group.settings]
    head = element("thead", element("tr", *heads))
    return _scrolling(element("table", head, element("tbody", *rows), class_="results"), "Results")


def _about_table(group: Group) -> str:
    spread = f" Small numbers: {group.spread_is}." if group.spread_is else ""
    return f"Bold: the best of a column.{spread} A heading sorts by its column."


def _row(group: Group, setting: Setting, columns: Iterable[str], several: bool) -> Element:
    about = setting.about
    order = math.inf if setting.t_prime is None else setting.t_prime
    start = {0: "0 (generator)", None: "from noise"}.get(setting.t_prime, str(setting.t_prime))
    cells = [element("th", start, scope="row", data_value=order)]
    if group.is_ambiguous:
        cells.append(_cell(setting.points[0].name, setting.points[0].name))
    for name in columns:
        value = None if setting.t_prime == 0 and name != "start_images" else about.get(name)
        text = None if value is None else group.words(name, value)
        cells.append(_cell(text or "–", value if isinstance(value, float) else text or ""))
    cells.append(_cell(str(about["network_evaluations"]), about["network_evaluations"]))
    if several:
        cells.append(_cell(str(len(setting.points)), len(setting.points)))
    metrics = [_metric_cell(group, setting, key) for key in group.metrics]
    if _knows_differences(group):
        metrics.insert(1, _difference_cell(setting))
    cells += metrics
    seconds = setting.seconds_per_image
    cells.append(_cell("–" if seconds is None else f"{seconds:.3g}", seconds))
    return element("tr", *cells)


def _metric_cell(group: Group, setting: Setting, key: str) -> Element:
    value, spread = setting.value(key), group.spread(setting, key)
    best = value == group.best(key) and len(set(group.values(key))) > 1
    digits = _digits(group.values(key))
    text = f"{value:.{digits}f}"
    small = None
    if spread:
        small = element("small", f"{spread[0]:.{digits}f} to {spread[1]:.{digits}f}")
    return _cell(element("strong" if best else "span", text), value, small)


def _knows_differences(group: Group) -> bool:
    return any(setting.above for setting in group.settings)


def _difference_cell(setting: Setting) -> Element:
    if setting.above is None:
        return _cell("–", None)
    value, interval = setting.above
    small = element("small", "{:.2f} to {:.2f}".format(*interval)) if interval else None
    return _cell(f"{value:.2f}", value, small)


def _digits(values: list[float]) -> int:
    """Decimals that show the largest of a column to four digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return max(0, 3 - math.floor(math.log10(largest))) if largest else 0


def _head(*content: Content, class_: str | None = None) -> Element:
    button = element("button", *content, type="button")
    return element("th", button, scope="col", class_=class_)


def _split_name(label: str) -> list[Content]:
    """A metric's name, the features that belong to it in smaller letters."""
    name, bracket, features = label.partition(" (")
    return [f"{name} ", element("small", f"({features}")] if bracket else [name]


def _cell(content: Content, value: object, small: Element | None = None) -> Element:
    kind = None if isinstance(value, str) else "number"
    return element("td", content, small, data_value="" if value is None else value, class_=kind)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _scrolling(content: Element, label: str) -> Element:
    """What may be wider than the page, in a frame that the keyboard can scroll."""
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


# --- samples ---


def _view(group: Group, strip: Strip, level: int) -> Element:
    """A strip, and the slider with one of its samples enlarged."""
    heads = [
        element("th", element("button", f"#{index}", type="button"), scope="col")
        for index in strip.indices
    ]
    rows = [_strip_row(group, strip, row) for row in strip.rows]
    table = element(
        "table",
        element("thead", element("tr", element("th", "T'", scope="col"), *heads)),
        element("tbody", *rows),
    )
    name = f"Samples, {strip.label}" if strip.label else "Samples"
    content = [_scrolling(table, name)]
    if strip.seed is None and any(one.setting and one.setting.t_prime != 0 for one in strip.rows):
        content.append(element("p", "These rows have no seed in common: their noise differs."))
    if len(strip.rows) > 1:
        content.insert(0, _enlarged(group, strip))
    heading = element(f"h{level}", strip.label, class_="series") if strip.label else None
    return element("div", heading, *content, class_="view")


def _strip_row(group: Group, strip: Strip, row: Row) -> Element:
    width = row.images.shape[2]
    shown = min(width * max(1, round(_IN_STRIP / width)), _MOST_IN_STRIP)
    cells = [
        element("td", image(pixels, f"Sample {index}, {row.name}", shown, loading="lazy"))
        for index, pixels in zip(strip.indices, row.images, strict=True)
    ]
    value = None if row.setting is None else _number(row.setting.value(group.chosen_by))
    small = element("small", value) if value else None
    about = f"{row.name}; {group.metrics[group.chosen_by]} {value}" if value else row.name
    return element("tr", element("th", row.name, small, scope="row"), *cells, data_about=about)


def _enlarged(group: Group, strip: Strip) -> Element:
    """Slider, choice of a sample, and the images that the script of the page puts in."""
    sampled = [row.setting for row in strip.rows if row.setting and row.setting.t_prime != 0]
    best = group.best_of(sampled, group.chosen_by) if sampled else strip.rows[0].setting
    place = next(number for number, row in enumerate(strip.rows) if row.setting is best)
    width = strip.rows[0].images.shape[2]
    shown = width * max(1, _ENLARGED // width)
    last = len(strip.rows) - 1
    ticks = [element("span", row.tick) for row in strip.rows]
    slider = element("input", type="range", min=0, max=last, step=1, value=place)
    options = [
        element("option", f"#{index}", value=column) for column, index in enumerate(strip.indices)
    ]
    pictures = [
        element("figure", element("img", width=shown, alt=""), element("figcaption"), class_=kind)
        for kind in ("first", "chosen")
    ]
    return element(
        "div",
        element("label", element("span", "T'"), slider, element("span", *ticks, class_="ticks")),
        element("label", element("span", "Sample"), element("select", *options)),
        element("div", *pictures, class_="pictures"),
        class_="enlarged",
        hidden=True,
    )


def _nearest(group: Group, nearest: Nearest | str) -> list[Element]:
    if isinstance(nearest, str):
        return [element("p", nearest)]
    features = nearest.setting.points[0].record["evaluation"].get("features", "its features")
    text = (
        f"Samples of {_describe(group, nearest.setting)}, and the images of the reference that are "
        f"next to them in feature space ({features}), with their distances."
    )
    width = nearest.samples.shape[2]
    shown = min(width * max(1, round(_IN_STRIP / width)), _MOST_IN_STRIP)
    rows = []
    for index, sample, real, distances in zip(
        nearest.indices, nearest.samples, nearest.real, nearest.distances, strict=True
    ):
        cells = [element("td", image(sample, f"Sample {index}", shown, loading="lazy"))]
        for pixels, distance in zip(real, distances, strict=True):
            picture = image(pixels, f"Real image near sample {index}", shown, loading="lazy")
            cells.append(element("td", picture, element("small", f"{distance:.3g}")))
        rows.append(element("tr", element("th", f"#{index}", scope="row"), *cells))
    count = nearest.real.shape[1]
    heads = ["Sample", "Generated", *[f"Real {number + 1}" for number in range(count)]]
    table = element(
        "table",
        element("thead", element("tr", *[element("th", text, scope="col") for text in heads])),
        element("tbody", *rows),
    )
    return [element("p", text), element("div", _scrolling(table, "Nearest"), class_="view nearest")]


# --- settings ---


def _details(point: Point) -> Element:
    """All settings of a run and the command that repeats it."""
    about = {name: value for name, value in point.about.items() if value not in (None, [], "")}
    result = point.result
    intervals = result.get("intervals") or {}
    metrics = {
        result["labels"][key]: _number(value)
        + (" (95 % interval {:.4g} to {:.4g})".format(*intervals[key]) if key in intervals else "")
        for key, value in result["metrics"].items()
    }
    shown = {
        "folder": point.folder,
        **metrics,
        **about,
        **{f"{name} (SHA-256)": item["sha256"] for name, item in _inputs(point).items()},
    }
    rows = [
        element("tr", element("th", name, scope="row"), element("td", _text(value)))
        for name, value in shown.items()
    ]
    again = ["python", _DRIVER, "--execute", "--again", join(point.folder, METRICS_FILE)]
    again += ["--output_dir", f"{point.folder.rstrip('/')}_again"]
    made = (point.record.get("provenance") or {}).get("command")
    commands = []
    if point.record.get("run"):
        commands += [element("p", "To repeat it:"), element("pre", shlex.join(again), tabindex=0)]
    if made:
        commands += [element("p", "It was made with:"), element("pre", made, tabindex=0)]
    setting = Setting((point,))
    title = f"{setting.name}: {point.name}"
    table = element("table", element("tbody", *rows), class_="settings")
    return element(
        "details", element("summary", title), *commands, _scrolling(table, f"Settings of {title}")
    )


def _inputs(point: Point) -> dict[str, dict[str, str]]:
    return point.record.get("inputs") or {}


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
