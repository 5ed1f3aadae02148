"""What independent packages make of the features in tests/golden/metric_features.npz.

    pip install --target PKG --no-deps prdc==0.2 torch-fidelity==0.4.0 \
        scikit-learn joblib threadpoolctl cloudpickle narwhals
    rm -r PKG/tests  # a stray package that hides ours
    PYTHONPATH=.:PKG python tests/evaluations/metric_packages.py

writes tests/golden/metric_packages.json, which the tests hold our formulas against.
"""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

from tests.evaluations.graph_writer import GOLDEN, normal

ROWS = 260  # kernel distance over one subset of all rows: nothing is left to chance
SPLITS = 2
CLASSES = 10


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference [300, 24] and sample [260, 24] features, classifier weights [24, 10]."""
    with np.load(GOLDEN / "metric_features.npz") as file:
        return file["reference"], file["samples"], normal("classes", (24, CLASSES)) * 0.2


def main() -> None:
    # The packages import torchvision for their data sets, which are not used here, and its wheel
    # for CUDA does not load beside torch's CPU build: an empty stand-in is all the imports need.
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{name}"] = MagicMock()
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    reference, samples, weights = inputs()
    tensors = torch.from_numpy(reference), torch.from_numpy(samples)
    statistics = [
        {"mu": f.mean(axis=0), "sigma": np.cov(f, rowvar=False)} for f in (reference, samples)
    ]
    fid = fid_statistics_to_metric(*statistics, verbose=False)
    kid = kid_features_to_metric(
        tensors[0][:ROWS], tensors[1], kid_subsets=1, kid_subset_size=ROWS, verbose=False
    )
    logits = torch.from_numpy(samples @ weights)
    isc = isc_features_to_metric(logits, splits=SPLITS, shuffle=False)
    prc = prc_features_to_metric(*tensors[::-1], prc_neighborhood=3, verbose=False)
    values = {
        "torch-fidelity": {
            name: float(value) for part in (fid, kid, isc, prc) for name, value in part.items()
        },
        "prdc": {k: float(v) for k, v in compute_prdc(reference, samples, nearest_k=5).items()},
    }
    Path(GOLDEN / "metric_packages.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
