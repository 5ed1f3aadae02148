"""All points of a sweep's folder side by side: `sweep.json`, `sweep.csv` and a table to read."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esddpm_io.atomic import atomic_path, write_json
from esddpm_io.files import join, list_names, read_json
from guided_diffusion.sampling.gathering import METRICS_FILE

JSON_FILE, CSV_FILE = "sweep.json", "sweep.csv"
DISTANCES = ("fid", "frechet_distance")  # as the evaluator calls it, by the graph
Row = dict[str, Any]  # a point: its folder's name, and all of its metrics.json


def write_tables(output: str) -> str:
    """Write the tables of all points in the folder that have metrics; return one to print."""
    rows = read_points(output)
    differences = paired_differences(rows)
    over_seeds = _over_seeds(rows)
    tables = {"points": rows, "differences": differences, "over_seeds": over_seeds}
    write_json(join(output, JSON_FILE), tables)
    with atomic_path(join(output, CSV_FILE)) as temporary:
        temporary.write_text(_csv(rows, differences), encoding="utf-8")
    return "\n".join(_lines(rows, differences, over_seeds))


def read_points(output: str) -> list[Row]:
    """The points of a sweep's folder, by what they were sampled with, then T', then seed."""
    rows = []
    for name in list_names(output):
        record = read_json(join(output, name, METRICS_FILE))
        if isinstance(record, dict) and record.get("point"):
            rows.append({"folder": name, **record})
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple:
    """The generator first, and of points sampled the same way those from noise last."""
    point = row["point"]
    how = [point[name] for name in ("steps", "guidance_scale", "eta")]
    from_noise = point["t_prime"] is None
    return (
        bool(point["steps"]),
        point["checkpoint"] or "",
        point["sampler"] or "",
        *how,
        from_noise,
        point["start_images"] or "",
        point["t_prime"] or 0,
        point["seed"] or 0,
    )


def metrics_of(row: Row) -> dict[str, float]:
    """The metrics of a point by their names in JSON."""
    return row["evaluation"]["results"][0]["metrics"]


def distance_of(row: Row) -> float:
    """The Fréchet distance of a point, of whatever features."""
    return next(metrics_of(row)[name] for name in DISTANCES if name in metrics_of(row))


def paired_differences(rows: Sequence[Row]) -> dict[str, Row]:
    """By folder: Fréchet distance minus that of the best point, with its 95 % interval.

    Points are compared that have the same seed, number of samples and evaluation: these share
    their start noise index by index, so leaving out the same indices from both tells how certain
    their difference is (see `metrics.interval_of_replicates`). The generator's images, which have
    no seed, are compared within the first. Interval None: of the best itself, or where there are no
    replicates.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[_comparable(row)].append(row)
    found: dict[str, Row] = {}
    for group in groups.values():
        seeds = sorted({row["point"]["seed"] for row in group if row["point"]["seed"] is not None})
        for seed in seeds or [None]:
            members = [row for row in group if row["point"]["seed"] in (seed, None)]
            best = min(members, key=distance_of)
            for row in members:
                found.setdefault(row["folder"], _difference(row, best))
    return found


def _comparable(row: Row) -> str:
    result = row["evaluation"]["results"][0]
    known = row.get("inputs") or {}  # not in the oldest
    inputs = [
        known[name]["sha256"] if name in known else row["scoring"][name]
        for name in ("reference", "graph")
    ]
    return json.dumps([row["point"]["samples"], inputs, sorted(result["metrics"])])


def _difference(row: Row, best: Row) -> Row:
    from evaluations.metrics import interval_of_replicates

    difference = {"to": best["folder"], "difference": distance_of(row) - distance_of(best)}
    ours, theirs = _replicates(row), _replicates(best)
    interval = None
    if row is not best and ours is not None and theirs is not None and len(ours) == len(theirs):
        interval = list(interval_of_replicates(ours - theirs))
    return {**difference, "interval": interval}


def _replicates(row: Row) -> np.ndarray | None:
    all_of_them = row["evaluation"]["results"][0].get("replicates", {})
    found = [all_of_them[name] for name in DISTANCES if name in all_of_them]
    return np.array(found[0]) if found else None


def _over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Of points that differ in nothing but the seed: each metric's mean, lowest and highest."""
    groups = defaultdict(list)
    of_the_seed = ("seed", "seconds_per_image")
    for row in rows:
        values = {name: value for name, value in row["point"].items() if name not in of_the_seed}
        groups[json.dumps([values, _comparable(row)], sort_keys=True)].append(row)
    found = []
    for group in groups.values():
        if len(group) < 2:
            continue
        values = {name: [metrics_of(row)[name] for row in group] for name in metrics_of(group[0])}
        metrics = {
            name: {"mean": float(np.mean(v)), "lowest": min(v), "highest": max(v)}
            for name, v in values.items()
        }
        folders = [row["folder"] for row in group]
        seeds = [row["point"]["seed"] for row in group]
        found.append({"folders": folders, "seeds": seeds, "metrics": metrics})
    return found


def _csv(rows: Sequence[Row], differences: Mapping[str, Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in metrics_of(row)))
    columns = ["folder", "t_prime", "steps", "sampler", "eta", "guidance", "seed", "samples"]
    columns += [*names, "network_evaluations", "seconds_per_image"]
    columns += ["best", "difference", "difference_low", "difference_high"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        point, difference = row["point"], differences[row["folder"]]
        low, high = difference["interval"] or (None, None)
        writer.writerow(
            {
                **{name: point[name] for name in columns if name in point},
                **metrics_of(row),
                "folder": row["folder"],
                "t_prime": "scratch" if point["t_prime"] is None else point["t_prime"],
                "guidance": point["guidance_scale"],
                "best": difference["to"],
                "difference": difference["difference"],
                "difference_low": low,
                "difference_high": high,
            }
        )
    return text.getvalue()


def _lines(
    rows: Sequence[Row], differences: Mapping[str, Row], over_seeds: Sequence[Row]
) -> list[str]:
    """Distances with their differences, then means over seeds."""
    if not rows:
        return ["no point has metrics yet"]
    label = rows[0]["evaluation"]["results"][0]["labels"]
    title = next(label[name] for name in DISTANCES if name in label)
    width = max(len(row["folder"]) for row in rows)
    lines = [f"{'point':<{width}}  {title}, and what it lies above the best (95 % interval)"]
    for row in rows:
        entry = differences[row["folder"]]
        behind = "best" if entry["to"] == row["folder"] else f"{entry['difference']:+.4g}"
        if entry["interval"]:
            behind += " ({:+.4g} … {:+.4g})".format(*entry["interval"])
        lines.append(f"{row['folder']:<{width}}  {distance_of(row):<8.5g}  {behind}")
    for entry in over_seeds:
        value = next(entry["metrics"][name] for name in DISTANCES if name in entry["metrics"])
        spread = "{mean:.5g}, {lowest:.5g} … {highest:.5g}".format(**value)
        count = len(entry["seeds"])
        lines.append(f"{entry['folders'][0]:<{width}}  mean of {count} seeds {spread}")
    return lines
