"""Time, memory and error of the evaluator's formulas beside the plain ways to compute them.

    python benchmarks/evaluator_formulas.py [--rows 10000] [--width 2048] [--threads 2]

Fréchet distance: SciPy's `sqrtm` of the product of the covariances, for covariances of full rank
and for singular ones, against the exact value from the singular values of the data. Precision and
recall: TensorFlow's float16 distances of whole sets with a partition of each row, which is what the
published evaluator does, and the same in NumPy float32. Statistics: NumPy's mean and covariance.
sFID: both, of 2023 features, against a reference that is given. `sqrtm` comes with the estimate of
its error, a product more, that the published evaluator asks it for. "no bfloat16" is ours as on a
processor without. Every measurement is a process of its own, one after the other in one run; memory
is its peak above what it held before the call.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
from scipy.linalg import sqrtm

SPATIAL = 2023  # features of sFID
K = 3  # neighbours of precision and recall


def features(rows: int, width: int, seed: int) -> np.ndarray:
    """Non-negative, correlated features float32 whose size is that of Inception's pool."""
    rng = np.random.default_rng(7)
    mixing = rng.standard_normal((width, width), np.float32) * np.float32(0.3 / np.sqrt(width))
    mixing *= np.exp(-3.0 * np.arange(width, dtype=np.float32) / width)[:, None]
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((rows, width), np.float32)
    return np.maximum(latent @ mixing * np.float32(4) + np.float32(0.3 + 0.01 * seed), 0)


def exact_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance from the data itself, with no covariance in between, float64."""
    means = [x.mean(axis=0, dtype=np.float64) for x in (a, b)]
    roots = [(x - m) / np.sqrt(len(x) - 1) for x, m in zip((a, b), means, strict=True)]
    reduced = [np.linalg.qr(root, mode="r") for root in roots]
    trace = np.linalg.svd(reduced[0] @ reduced[1].T, compute_uv=False).sum()
    shift = means[0] - means[1]
    return float(shift @ shift + sum(np.sum(root**2) for root in roots) - 2 * trace)


def sqrtm_distance(a, b) -> float:
    shift = a.mean - b.mean
    product = a.covariance @ b.covariance
    root = sqrtm(product)
    _ = np.linalg.norm(root @ root - product) ** 2 / np.linalg.norm(product)
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    return float(shift @ shift + spread)


def numpy_gaussian(x: np.ndarray):
    from evaluations.metrics import Gaussian

    return Gaussian(x.mean(axis=0), np.cov(x, rowvar=False))


def plain_precision_recall(reference, samples, distances) -> tuple[float, float]:
    """k-NN precision and recall from whole distance matrices."""
    radii = [np.partition(distances(x, x), K, axis=1)[:, K].copy() for x in (reference, samples)]
    between = distances(reference, samples)
    return (
        float((between <= radii[0][:, None]).any(axis=0).mean()),
        float((between <= radii[1]).any(axis=1).mean()),
    )


def numpy_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    norms = [np.einsum("nd,nd->n", x, x) for x in (u, v)]
    return (norms[0][:, None] - 2 * (u @ v.T)) + norms[1]


def tensorflow_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    u, v = tf.constant(u, tf.float16), tf.constant(v, tf.float16)
    norms = [tf.reduce_sum(tf.square(x), axis=1) for x in (u, v)]
    distances = (norms[0][:, None] - 2 * tf.matmul(u, v, transpose_b=True)) + norms[1]
    return tf.cast(distances, tf.float32).numpy()


def status(field: str) -> float:
    """A size in MiB that Linux states of this process."""
    with open("/proc/self/status") as stream:
        return next(int(x.split()[1]) / 1024 for x in stream if x.startswith(field + ":"))


def forget_peak() -> float:
    """Set the highest memory use so far back to the present one, which is returned, MiB."""
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    return status("VmRSS")


def measure(case: str, rows: int, width: int) -> dict:
    """One measurement, in this process."""
    from evaluations import neighbours
    from evaluations.metrics import Gaussian, frechet_distance, gaussian_of, precision_recall

    singular = "singular" in case
    count = width * 3 // 4 if singular else rows
    a, b = (features(count, width, seed) for seed in (1, 2))
    if case.startswith("statistics"):
        gaussian = {"blocks": gaussian_of, "numpy": numpy_gaussian}[case.split()[1]]

        def call(x):
            return float(np.trace(gaussian(x).covariance))

        arguments = [a]
    elif case.startswith("sfid"):
        given = numpy_gaussian(a[:, :SPATIAL].astype(np.float64))
        b = np.ascontiguousarray(b[:, :SPATIAL])

        def call(x):
            if "numpy" in case:
                return sqrtm_distance(given, numpy_gaussian(x))
            return frechet_distance(given, gaussian_of(x))

        arguments = [b]
    elif "frechet" in case or "sqrtm" in case:
        gaussians = [
            Gaussian(x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False)) for x in (a, b)
        ]
        call = {"frechet": frechet_distance, "sqrtm": sqrtm_distance}[case.split()[0]]
        arguments = gaussians
    elif case.startswith("blocks"):
        arithmetic = case.split()[1].removesuffix(",")
        if "no bfloat16" in case:
            neighbours.cpu_has_bfloat16 = lambda: False

        def call(x, y):
            precise, recalled = precision_recall(x, y, K, arithmetic)
            return float(precise.mean()), float(recalled.mean())

        call(a[:8], b[:8])  # loads what has to be loaded
        arguments = [a, b]
    else:
        distances = tensorflow_distances if "tensorflow" in case else numpy_distances
        distances(a[:8], b[:8])  # loads what has to be loaded

        def call(x, y):
            return plain_precision_recall(x, y, distances)

        arguments = [a, b]
    before = forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    value = call(*arguments)
    out = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "value": value}
    out["mib"] = status("VmHWM") - before
    if "frechet" in case:
        out["exact"] = exact_distance(a, b)
    if case.startswith("sfid"):
        out["exact"] = exact_distance(a[:, :SPATIAL], b)
    if case.startswith("statistics"):
        out["exact"] = float(a.var(axis=0, dtype=np.float64, ddof=1).sum())
    return out


CASES = (
    "frechet full rank",
    "sqrtm full rank",
    "frechet singular",
    "sqrtm singular",
    "tensorflow float16",
    "numpy float32",
    "blocks float16",
    "blocks float16, no bfloat16",
    "blocks float32",
    "statistics numpy",
    "statistics blocks",
    "sfid numpy",
    "sfid blocks",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.rows, args.width)))
        return
    threads = str(args.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "TF_NUM_INTRAOP_THREADS": threads}
    env.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    print(f"{args.rows} x {args.width} features, {threads} threads")
    print("| case | wall s | CPU s | MiB | relative error, or precision and recall |")
    print("| --- | ---: | ---: | ---: | --- |")
    exact = {}  # by kind of covariance, from the case that is measured first
    for case in args.cases:
        command = [sys.executable, __file__, "--one", case]
        command += ["--rows", str(args.rows), "--width", str(args.width)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        got = json.loads(done.stdout)
        kind = case.split(maxsplit=1)[1]
        if "exact" in got:
            exact[kind] = got["exact"]
        if isinstance(got["value"], float):
            note = f"{abs(got['value'] / exact[kind] - 1):.1e}" if kind in exact else "unknown"
        else:
            note = "{:.4f} {:.4f}".format(*got["value"])
        print(
            f"| {case} | {got['wall']:.2f} | {got['cpu']:.2f} | {got['mib']:.0f} | {note} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
