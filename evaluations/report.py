"""How results are printed and saved: their names, as lines, JSON, a Markdown table, a PNG."""

import dataclasses
import os
import re

import numpy as np

from esddpm_io.files import short_names
from esddpm_io.images import ImageSource, enlarge, image_grid, open_images, save_png, with_caption
from evaluations.evaluation import Evaluation, Result
from evaluations.features import OTHER, PUBLISHED
from evaluations.resizing import PUBLISHED_RESIZE
from evaluations.scoring import METRICS, PUBLISHED_METRICS

_PAIR_WIDTH = 128  # pixels of an image of the PNG, at least
_PAIRS_A_ROW = 4
_IS_FID = re.compile(r"\s*s?FID\s*", re.IGNORECASE)


class Names:
    """What to call the metrics.

    The graph decides: figures of the published 2015 Inception graph have their published names,
    whatever `metric_name` says. Of a graph that has its nodes but is not known to have its weights
    they are `FID (unverified graph)` and the like. With any other graph they are
    `Frechet distance (FEATURES)` and the like, where FEATURES is what stands in the brackets of
    `metric_name` or, where that is not given or is FID, the graph's file name. A network of a
    .pt or .pt2 file is called by its own name, as in `FD (dinov2_vitl14)`. `clean resize` or a
    precision, as in `FID (bfloat16)`, is added where images were resized or the network ran like
    that; `features`, the name of the features alone, has it too.
    """

    def __init__(self, evaluation: Evaluation, metric_name: str | None = None):
        self._published = evaluation.identity != OTHER
        self._known = evaluation.identity == PUBLISHED
        self.features = "Inception 2015" if self._known else "unverified graph"
        if not self._published:
            stem = os.path.splitext(os.path.basename(evaluation.graph))[0].replace("_", " ")
            given = re.search(r"\((.+)\)", metric_name or "")
            name = given.group(1) if given else metric_name
            self.features = stem if name is None or _IS_FID.fullmatch(name) else name
        self._network = evaluation.network
        self.features = self._network or self.features
        how = []
        if evaluation.settings.resize != PUBLISHED_RESIZE:
            how.append(f"{evaluation.settings.resize} resize")
        if evaluation.settings.precision != "float32":
            how.append(evaluation.settings.precision)
        remarks = how if self._known else [self.features, *how]
        self._remark = f" ({', '.join(remarks)})" if remarks else ""
        self.features = ", ".join([self.features, *how])

    def label(self, metric: str) -> str:
        names = METRICS[metric]
        name = names.published if self._published else names.other
        if self._network:  # as papers have it: FD and KD of other features
            name = name.replace("Frechet distance", "FD").replace("Kernel distance", "KD")
        return name + self._remark

    def key(self, metric: str) -> str:
        return metric if self._published else METRICS[metric].key


def lines(result: Result, names: Names) -> list[str]:
    """`Name: value`, one a metric, in the order asked for, to 6 digits (JSON has all of them)."""
    out = []
    for metric, value in result.metrics.items():
        text = f"{names.label(metric)}: {value.value:.6g}"
        if value.deviation is not None and metric not in PUBLISHED_METRICS:  # others parse these
            text += f" ± {value.deviation:.2g}"
        if metric in result.intervals:
            low, high = result.intervals[metric]
            text += f" (95 % interval {low:.6g} to {high:.6g})"
        out.append(text)
    return out


def table(evaluation: Evaluation, names: Names) -> str:
    """A Markdown table, one row a sample batch; deviations and intervals after the value.

    Of paths so much is shown as tells them apart.
    """
    metrics = list(evaluation.results[0].metrics)
    rows = [["Samples", "Images", *map(names.label, metrics)]]
    samples = short_names([result.sample for result in evaluation.results])
    for sample, result in zip(samples, evaluation.results, strict=True):
        cells = [_cell(result, metric) for metric in metrics]
        rows.append([sample, str(result.images), *cells])
    rows.insert(1, ["---", *["---:"] * (len(metrics) + 1)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(result: Result, metric: str) -> str:
    value = result.metrics[metric]
    text = f"{value.value:.6g}"
    if value.deviation is not None:
        text += f" ± {value.deviation:.2g}"
    if metric in result.intervals:
        text += " [{:.6g}, {:.6g}]".format(*result.intervals[metric])
    return text


def as_json(evaluation: Evaluation, names: Names) -> dict:
    """Settings, graph and results as plain data: `results[i]["metrics"]` has one number a key."""
    settings = dataclasses.asdict(evaluation.settings)
    settings.update(backend=evaluation.backend, inception_path=evaluation.graph)
    return {
        "reference": evaluation.reference,
        "features": names.features,
        "graph_sha256": evaluation.graph_sha256,
        "graph": evaluation.identity,
        "settings": settings,
        "results": [_result_json(result, names) for result in evaluation.results],
    }


def _result_json(result: Result, names: Names) -> dict:
    out = {
        "sample": result.sample,
        "images": result.images,
        "metrics": {names.key(m): value.value for m, value in result.metrics.items()},
        "labels": {names.key(m): names.label(m) for m in result.metrics},
        "deviations": {
            names.key(m): value.deviation
            for m, value in result.metrics.items()
            if value.deviation is not None
        },
        "warnings": list(result.warnings),
    }
    if result.suspicious:
        out["suspicious"] = [list(pair) for pair in result.suspicious]
    if result.intervals:
        out["intervals"] = {names.key(m): list(i) for m, i in result.intervals.items()}
        out["replicates"] = {names.key(m): r.tolist() for m, r in result.replicates.items()}
    return out


def draw_suspicious(path: str, result: Result, reference: str) -> None:
    """A PNG of the samples nearest to the reference, each with the reference's image beside it.

    Captions are the two indices and the distance.
    """
    samples, rows, distances = zip(*result.suspicious, strict=True)
    sides = [
        _enlarged(open_images(result.sample, flag="SAMPLE"), samples),
        _enlarged(open_images(reference, flag="REF"), rows),
    ]
    height = max(image.shape[0] for side in sides for image in side.values())
    pairs = []
    for *indices, distance in zip(samples, rows, distances, strict=True):
        both = [side[index] for side, index in zip(sides, indices, strict=True)]
        padded = [np.pad(one, ((0, height - len(one)), (0, 0), (0, 0))) for one in both]
        caption = f"{indices[0]} | {indices[1]}: {distance:.3g}"
        pairs.append(with_caption(np.concatenate(padded, axis=1), caption))
    save_png(path, image_grid(pairs, min(_PAIRS_A_ROW, len(pairs))))


def _enlarged(source: ImageSource, indices: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Images by index, `_PAIR_WIDTH` wide or more; read in order, for files that are unpacked."""
    times = -(-_PAIR_WIDTH // source.shape[2])
    return {i: enlarge(source.read(i, i + 1)[0], times) for i in sorted(set(indices))}
