"""The formulas, against published values, independent packages and cases one can reason out."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.linalg import sqrtm

from evaluations import metrics, neighbours, resizing
from evaluations.metrics import (
    Gaussian,
    RunningMoments,
    density_coverage,
    frechet_distance,
    gaussian_kernel_distance,
    gaussian_of,
    inception_score,
    interval_of_replicates,
    jackknife_interval,
    jackknife_replicates,
    kernel_distance,
    neighbour_radii,
    precision_recall,
)
from evaluations.neighbours import nearest
from tests.evaluations.graph_writer import GOLDEN
from tests.evaluations.metric_packages import ROWS, inputs

REFERENCE, SAMPLES, WEIGHTS = inputs()
PUBLISHED = json.loads((GOLDEN / "metric_values.json").read_text())
PACKAGES = json.loads((GOLDEN / "metric_packages.json").read_text())
FIDELITY, PRDC = PACKAGES["torch-fidelity"], PACKAGES["prdc"]


def random_features(rows: int, width: int, seed: int, rank: int | None = None) -> np.ndarray:
    """Correlated features whose covariance has the given rank."""
    rng = np.random.default_rng(seed)
    rank = rank or width
    mixing = rng.standard_normal((rank, width)) * np.exp(-np.arange(rank) / rank * 4)[:, None]
    return rng.standard_normal((rows, rank)) @ mixing + rng.standard_normal(width)


def matrix_gaussian(features: np.ndarray) -> Gaussian:
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False))


def test_published_values():
    distance = frechet_distance(gaussian_of(REFERENCE), gaussian_of(SAMPLES))
    assert distance == pytest.approx(PUBLISHED["frechet_distance"], rel=1e-7)
    precise, recalled = precision_recall(REFERENCE, SAMPLES)
    assert precise.mean() == PUBLISHED["precision"]
    assert recalled.mean() == PUBLISHED["recall"]


def test_independent_packages():
    distance = frechet_distance(gaussian_of(REFERENCE), gaussian_of(SAMPLES))
    assert distance == pytest.approx(FIDELITY["frechet_inception_distance"], rel=1e-7)
    kid = kernel_distance(REFERENCE[:ROWS], SAMPLES, subsets=1, subset_size=ROWS)
    assert kid.value == pytest.approx(FIDELITY["kernel_inception_distance_mean"], rel=1e-5)
    score = inception_score(SAMPLES, WEIGHTS, split=len(SAMPLES) // 2)
    assert score.value == pytest.approx(FIDELITY["inception_score_mean"], rel=1e-6)
    assert score.deviation == pytest.approx(FIDELITY["inception_score_std"], rel=1e-4)
    precise, recalled = precision_recall(REFERENCE, SAMPLES, arithmetic="float32")
    assert precise.mean() == pytest.approx(FIDELITY["precision"], abs=1e-6)
    assert recalled.mean() == pytest.approx(FIDELITY["recall"], abs=1e-6)
    precise, recalled = precision_recall(REFERENCE, SAMPLES, k=5, arithmetic="float32")
    assert precise.mean() == pytest.approx(PRDC["precision"], abs=1e-9)
    assert recalled.mean() == pytest.approx(PRDC["recall"], abs=1e-9)
    balls, covered = density_coverage(REFERENCE, SAMPLES)
    assert balls.mean() == pytest.approx(PRDC["density"], rel=1e-9)
    assert covered.mean() == pytest.approx(PRDC["coverage"], rel=1e-9)


def test_distance_is_that_of_sqrtm_where_sqrtm_is_good():
    a, b = random_features(400, 60, 0), random_features(300, 60, 1)
    first, second = matrix_gaussian(a), matrix_gaussian(b)
    shift = first.mean - second.mean
    root = np.trace(sqrtm(first.covariance @ second.covariance)).real
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(shift @ shift + spread, rel=1e-9)


@pytest.mark.parametrize("rank_a, rank_b", [(80, 80), (80, 30), (25, 80), (25, 30)])
def test_distance_of_singular_covariances_is_exact(rank_a, rank_b):
    """Given as samples or as matrices, of full rank or not: one value, that of the small form."""
    a, b = random_features(200, 80, 2, rank_a), random_features(300, 80, 3, rank_b)
    centred = [(f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in (a, b)]
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    exact = shift @ shift + sum(np.sum(c**2) for c in centred) - 2 * trace
    forms = [
        (gaussian_of(a), gaussian_of(b)),
        (matrix_gaussian(a), matrix_gaussian(b)),
        (gaussian_of(a[:60]), matrix_gaussian(b)),
    ]
    for first, second in forms[:2]:
        assert frechet_distance(first, second) == pytest.approx(exact, rel=1e-9)
    few = forms[2]
    assert few[0].rows is not None
    assert frechet_distance(*few) == pytest.approx(frechet_distance(*few[::-1]), rel=1e-12)
    as_matrix = Gaussian(few[0].mean, few[0].full_covariance())
    assert frechet_distance(as_matrix, few[1]) == pytest.approx(frechet_distance(*few), rel=1e-9)


def test_distance_of_nearly_singular_covariances_is_exact():
    """Half the directions a billion times narrower: roots of eigenvalues would be off by 1e-7."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((100, 100)))[0]
    turned = np.linalg.qr(np.eye(100) + 0.02 * rng.standard_normal((100, 100)))[0]
    spread = np.where(np.arange(100) < 50, 1.0, 1e-9)
    covariances = [(a * spread) @ a.T for a in (axes, axes @ turned)]
    roots = [a * np.sqrt(spread) for a in (axes, axes @ turned)]
    trace = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    exact = sum(np.trace(c) for c in covariances) - 2 * trace
    got = frechet_distance(*(Gaussian(np.zeros(100), c) for c in covariances))
    assert got == pytest.approx(exact, rel=1e-9)


def test_distance_of_a_set_from_itself_is_zero():
    for features in (REFERENCE, random_features(20, 50, 4)):
        assert frechet_distance(gaussian_of(features), gaussian_of(features)) < 1e-9


def test_distance_of_a_set_without_spread():
    """All its points are one: the mean square distance of the others from that point."""
    point = REFERENCE[:1].repeat(30, axis=0)
    expected = (gaussian_of(REFERENCE).mean - point[0]) @ (gaussian_of(REFERENCE).mean - point[0])
    expected += np.trace(gaussian_of(REFERENCE).covariance)
    for gaussian in (gaussian_of(point), gaussian_of(point[:5]), matrix_gaussian(point)):
        assert frechet_distance(gaussian_of(REFERENCE), gaussian) == pytest.approx(expected)


def test_distance_refuses_what_has_none():
    good = gaussian_of(REFERENCE)
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(good, Gaussian(good.mean, good.covariance * np.nan))
    with pytest.raises(ValueError, match="23 dimensions"):
        frechet_distance(good, gaussian_of(REFERENCE[:, :23]))


@pytest.mark.parametrize("rows", [1, 2, 24, 25, 49, 300])
def test_moments_of_a_stream_are_those_of_the_whole(rows):
    features = REFERENCE[:rows] + 1000  # far from zero: one-pass sums of squares would lose digits
    moments = RunningMoments()
    for start in range(0, rows, 7):
        moments.add(features[start : start + 7])
    gaussian = moments.gaussian()
    assert gaussian.count == rows
    np.testing.assert_allclose(gaussian.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(features, rowvar=False) if rows > 1 else np.zeros((24, 24))
    np.testing.assert_allclose(gaussian.full_covariance(), expected, rtol=1e-9, atol=1e-9)
    if rows > 24:
        with pytest.raises(ValueError, match="no rows can follow"):
            moments.add(features)


def pairs_of(u: np.ndarray, *v: np.ndarray) -> neighbours.Pairs:
    origin = u.mean(axis=0)
    return neighbours.Pairs(*(neighbours.Points(x, origin=origin) for x in (u, *v)))


def half_arithmetic(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The published distances in NumPy's own half precision, but for the order of the norms."""
    norms = [neighbours._half_norms(x).astype(np.float16) for x in (u, v)]
    products = u.astype(np.float16).astype(np.float32) @ v.astype(np.float16).T.astype(np.float32)
    return (norms[0][:, None] - np.float16(2) * products.astype(np.float16)) + norms[1]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4, 10.0])
def test_distances_are_rounded_as_half_precision_is(scale, monkeypatch):
    """Blocks and their mirror images, down to sizes where half precision runs out of bits."""
    monkeypatch.setattr(neighbours, "_BLOCK", 16)
    rng = np.random.default_rng(0)
    u, v = (scale * rng.standard_normal((n, 24)).astype(np.float32) for n in (50, 70))
    got = np.empty((50, 70), np.float32)
    for block in pairs_of(u, v).blocks():
        got[block.rows, block.columns] = block.distances()
        everywhere = np.indices(block.shape).reshape(2, -1)
        np.testing.assert_array_equal(block.at(*everywhere), block.distances().ravel())
    own = np.full((50, 50), np.nan, np.float32)
    for block in pairs_of(u).blocks():
        for way in (block, block.mirror()):
            own[way.rows, way.columns] = way.distances()
    # A product may fall on the other side of a tie when BLAS adds in another order.
    assert np.mean(got == half_arithmetic(u, v)) > 0.999
    assert np.mean(own == half_arithmetic(u, u)) > 0.999


def near_and_far(rows: int, kind: str, width: int = 270) -> np.ndarray:
    """Features with what may lead coarse distances astray."""
    rng = np.random.default_rng(rows)
    features = np.maximum(rng.standard_normal((rows, width)), 0).astype(np.float32)
    if kind == "far from zero":
        features += 3
    elif kind == "outliers":
        features[::50] *= 8
    elif kind == "tiny":
        features *= 1e-4
    elif kind == "the same":
        features[:] = features[0]
    elif kind == "twins":
        features[1::2] = features[::2]
    return features


@pytest.mark.parametrize("native", [True, False])
def test_rounding_to_half_precision_is_numpy_s(monkeypatch, native):
    """Of all its numbers, of the middles between two, and of what lies next to these."""
    if not native:
        monkeypatch.setattr(neighbours, "_torch", lambda: None)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate([halves, middles, np.float32([65519.996, 65520, 7e4, 5e34, 3e38])])
    values = np.concatenate([np.nextafter(values, way, dtype=np.float32) for way in (0, 9e9)])
    values = np.concatenate([values, halves, middles, [np.inf]]).astype(np.float32)
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(neighbours._half(values), expected)


def test_infinities_of_one_tile_leave_the_others_alone(monkeypatch, recwarn):
    """A row beyond half precision turns its own tile to float32."""
    monkeypatch.setattr(neighbours, "PUBLISHED_TILE", 40)
    u, v = (np.random.default_rng(n).standard_normal((80, 24)).astype(np.float32) for n in (0, 1))
    whole = precision_recall(u[:79], v[:79])
    u[-1, 0] = v[-1, 0] = 7e4
    for got, expected in zip(precision_recall(u, v), whole, strict=True):
        assert np.mean(got[:79] == expected) > 0.95  # half of the tiles are not rounded now
    assert density_coverage(u, v, 3, "float16")[0][:79].mean() > 0.5
    assert not [one for one in recwarn if issubclass(one.category, RuntimeWarning)]


KINDS = ["plain", "far from zero", "outliers", "tiny", "the same", "twins"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", neighbours.ARITHMETICS)
@pytest.mark.parametrize("native", [True, False])
def test_coarse_distances_overlook_nothing(native, arithmetic, kind, monkeypatch):
    """Whether the processor multiplies bfloat16 or it is imitated (PyTorch can on any)."""
    monkeypatch.setattr(neighbours, "cpu_has_bfloat16", lambda: native)
    u, v = near_and_far(300, kind), near_and_far(260, kind)
    points = neighbours.Points(u, arithmetic)
    (block,) = neighbours.Pairs(points, neighbours.Points(v, arithmetic, points.origin)).blocks()
    for way in (block, block.mirror()):
        distances = way.distances()
        everywhere = np.indices(way.shape).reshape(2, -1)
        low, high = way.bounds(everywhere[0], way.codes.ravel())
        assert (low <= distances.ravel()).all() and (distances.ravel() <= high).all()
        limits = np.sort(distances, axis=1)[:, 3]
        assert (way.smallest(4) >= limits).all()
        found, wanted = np.zeros(way.shape, bool), distances <= limits[:, None]
        found[way.near(limits)] = True
        assert found[wanted].all()
        if kind in ("plain", "far from zero", "twins"):
            assert found.sum() < 3 * wanted.sum()  # and few others
        limits = np.zeros(way.shape[0], np.float32)
        others = np.sort(distances, axis=0)[3]
        found = np.zeros(way.shape, bool)
        found[way.near(limits, others)] = True
        assert found[distances <= others].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", neighbours.ARITHMETICS)
@pytest.mark.parametrize("pending", [0, 64])
def test_neighbours_are_those_of_all_distances(pending, arithmetic, kind, monkeypatch):
    """With many pairs that look near, and where distances are computed early and late."""
    monkeypatch.setattr(neighbours, "_BLOCK", 64)
    monkeypatch.setattr(neighbours, "_PENDING", pending)
    u, v = near_and_far(300, kind, 40), near_and_far(130, kind, 40)
    points = neighbours.Points(u, arithmetic)
    others = neighbours.Points(v, arithmetic, points.origin)
    own, between = np.empty((300, 300), np.float32), np.empty((300, 130), np.float32)
    for block in neighbours.Pairs(points).blocks():
        for way in (block.mirror(), block):
            own[way.rows, way.columns] = way.distances()
    for block in neighbours.Pairs(points, others).blocks():
        between[block.rows, block.columns] = block.distances()
    # A product may fall on the other side of a tie when BLAS adds in another order.
    near = {"rtol": 2e-3 if arithmetic == "float16" else 1e-4, "atol": 1e-10}
    radii = [neighbour_radii(u, 3, arithmetic), neighbour_radii(v, 3, arithmetic)]
    np.testing.assert_allclose(radii[0], np.sort(own, axis=1)[:, 3], **near)
    rows, distances = nearest(v, u, 5, arithmetic)
    positive = np.maximum(between, 0)  # rounded sums of tiny numbers may be below
    np.testing.assert_allclose(distances**2, np.sort(positive, axis=1)[:, :5], **near)
    np.testing.assert_allclose(np.take_along_axis(positive, rows, axis=1), distances**2, **near)
    precise, recalled = precision_recall(u, v, 3, arithmetic)
    assert np.mean(precise == (between <= radii[0][:, None]).any(axis=0)) > 0.99
    assert np.mean(recalled == (between <= radii[1]).any(axis=1)) > 0.99
    balls, covered = density_coverage(u, v, 3, arithmetic)
    inside = between < radii[0][:, None]
    assert np.mean(balls == inside.sum(axis=0) / 3) > 0.99
    assert np.mean(covered == inside.any(axis=1)) > 0.99


def test_overflow_of_half_precision_leads_to_float32():
    rng = np.random.default_rng(0)
    u, v = (rng.standard_normal((n, 24)).astype(np.float32) * 60 for n in (40, 30))
    (block,) = pairs_of(u, v).blocks()
    got = block.distances()
    exact = ((u[:, None].astype(np.float64) - v) ** 2).sum(axis=-1)
    assert exact.max() > 65504
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    # An infinity in one tile leaves the others alone.
    u[:20] /= 100
    for tile in (20, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbours, "PUBLISHED_TILE", tile)
            blocks = [block.distances() for block in pairs_of(u, u[:20]).blocks()]
        with np.errstate(over="ignore"):
            is_half = [np.array_equal(b, b.astype(np.float16)) for b in blocks]
        assert is_half == ([True, False] if tile == 20 else [False])


@pytest.mark.parametrize("width", [3, 8, 24, 30, 40, 64, 72, 100, 1000, 1024, 2048])
def test_half_precision_norms_are_tensorflows(width):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(width)
    rows = rng.standard_normal((64, width)).astype(np.float16)
    expected = tf.reduce_sum(tf.square(tf.constant(rows)), axis=1).numpy()
    got = neighbours._half_norms(rows.astype(np.float32))
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("arithmetic", neighbours.ARITHMETICS)
def test_radii_do_not_depend_on_blocks(arithmetic, monkeypatch):
    whole = neighbour_radii(REFERENCE, 3, arithmetic)
    monkeypatch.setattr(neighbours, "_BLOCK", 37)
    np.testing.assert_allclose(neighbour_radii(REFERENCE, 3, arithmetic), whole, rtol=1e-3)
    exact = np.sort(((REFERENCE[:, None] - REFERENCE) ** 2).sum(axis=-1), axis=1)[:, 3]
    np.testing.assert_allclose(whole, exact, rtol=1e-2)


def test_precision_and_recall_are_not_swapped():
    """Samples in one of the reference's two clusters: all precise, half of it recalled."""
    rng = np.random.default_rng(0)
    clusters = rng.standard_normal((2, 200, 4)) + np.array([0.0, 50.0])[:, None, None]
    reference = clusters.reshape(400, 4).astype(np.float32)
    samples = (0.5 * rng.standard_normal((100, 4))).astype(np.float32)
    for arithmetic in neighbours.ARITHMETICS:
        precise, recalled = precision_recall(reference, samples, arithmetic=arithmetic)
        assert (len(precise), len(recalled)) == (100, 400)
        assert precise.mean() > 0.9
        assert 0.05 < recalled.mean() <= 0.5
        assert not recalled[200:].any()
    balls, covered = density_coverage(reference, samples)
    assert (len(balls), len(covered)) == (100, 400)
    assert balls.mean() > 1.0
    assert not covered[200:].any()


def test_nearest_points_in_order(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 16)  # so that several blocks have to be joined
    samples = SAMPLES[:20]
    rows, distances = nearest(REFERENCE, samples, 3)
    every = np.linalg.norm(samples[:, None].astype(float) - REFERENCE[None], axis=2)
    np.testing.assert_array_equal(rows, np.argsort(every, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :3], rtol=1e-3)
    with pytest.raises(ValueError, match="2 points: at least 3"):
        nearest(REFERENCE[:2], samples, 3)


def test_too_few_points_for_neighbours():
    with pytest.raises(ValueError, match="3 points: at least 4"):
        neighbour_radii(REFERENCE[:3], 3)
    assert neighbour_radii(REFERENCE[:4], 3).shape == (4,)


def test_inception_score_bounds():
    """1 for equal probabilities, the number of classes for sure and balanced ones; no NaN."""
    classes = 8
    sure = np.eye(classes, dtype=np.float32).repeat(5, axis=0)
    weights = 1000 * np.eye(classes, dtype=np.float32)
    assert inception_score(sure, weights).value == pytest.approx(classes)
    assert inception_score(np.ones_like(sure), weights).value == pytest.approx(1)
    # Two blocks of different scores: their mean and deviation.
    both = np.concatenate([sure, np.ones_like(sure)])
    score = inception_score(both, weights, split=len(sure))
    assert score.value == pytest.approx((classes + 1) / 2)
    assert score.deviation == pytest.approx((classes - 1) / 2)


def test_kernel_distance_is_unbiased_and_seeded():
    rng = np.random.default_rng(0)
    same = kernel_distance(rng.standard_normal((500, 6)), rng.standard_normal((400, 6)), 30, 100)
    assert abs(same.value) < 4 * same.deviation
    far = kernel_distance(REFERENCE, SAMPLES, 5, 50)
    assert far.value > 0
    assert far == kernel_distance(REFERENCE, SAMPLES, 5, 50)
    assert far != kernel_distance(REFERENCE, SAMPLES, 5, 50, seed=1)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(REFERENCE[:1], SAMPLES)


@pytest.mark.parametrize("rows, of_reference", [(80, 300), (300, 80), (80, 80)])
def test_kernel_distance_of_sets_that_are_one_subset(rows, of_reference):
    """All rows of both, unequal in number or not, and no deviation of equal subsets."""
    x, y = REFERENCE[:of_reference].astype(float), SAMPLES[:rows].astype(float)
    got = kernel_distance(REFERENCE[:of_reference], SAMPLES[:rows], subset_size=80)
    xx, yy, xy = ((a @ b.T / 24 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = [k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)]
    assert got.value == pytest.approx(sum(off) - 2 * xy.mean(), rel=1e-5)
    assert got.deviation is None


def test_sums_over_pairs_take_the_memory_of_a_block():
    """Of 6,000 and 5,000 rows all pairs at once are 240 MB, one block's rows against all 49 MB."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6000, 8)) + 3, rng.standard_normal((5000, 8)) + 3
    for distance in (kernel_distance, gaussian_kernel_distance):
        options = {"subset_size": 6000} if distance is kernel_distance else {}
        tracemalloc.start()
        distance(x, y, **options)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 48e6


def test_sums_over_pairs_do_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((130, 8)), rng.standard_normal((90, 8)) + 1
    whole = kernel_distance(x, y).value, gaussian_kernel_distance(x, y).value
    monkeypatch.setattr(metrics, "_KERNEL_ROWS", 32)
    blocks = kernel_distance(x, y).value, gaussian_kernel_distance(x, y).value
    assert blocks == pytest.approx(whole, rel=1e-12)


def test_threads_are_as_many_as_the_cores_we_may_use(monkeypatch):
    """Not as many as the machine has: a job on a cluster gets a few of them."""
    workers = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count):
            workers.append(count)
            super().__init__(count)

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(metrics, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(resizing, "ThreadPoolExecutor", Pool)
    jackknife_replicates(lambda rows: float(rows.mean()), 10, groups=5)
    resizing.resized(np.zeros((8, 4, 4, 3), np.uint8), (2, 2))
    assert workers == [1, 1]


def test_kernel_distance_has_a_deviation_only_of_subsets_that_differ():
    assert kernel_distance(REFERENCE, SAMPLES, 5, 70).deviation > 0
    assert kernel_distance(REFERENCE, SAMPLES, 5, len(SAMPLES) - 1).deviation is None
    assert kernel_distance(REFERENCE, SAMPLES, 1, 70).deviation is None


def test_jackknife_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).standard_normal(400)
    low, high = jackknife_interval(lambda rows: values[rows].mean(), 400, groups=400)
    half_width = 1.966 * values.std(ddof=1) / 20  # Student's with 399 degrees
    assert low == pytest.approx(values.mean() - half_width, rel=1e-3)
    assert high == pytest.approx(values.mean() + half_width, rel=1e-3)


def positive_features(rng: np.random.Generator, rows: int, scale: float) -> np.ndarray:
    mixing = np.random.default_rng(9).standard_normal((16, 16))
    mixing *= np.exp(-np.arange(16) / 5)[:, None]
    return np.abs(scale * rng.standard_normal((rows, 16)) @ mixing + 1.1).astype(np.float32)


def frechet_of_rows(reference: np.ndarray, samples: np.ndarray):
    gaussian = gaussian_of(reference)
    return lambda rows: frechet_distance(gaussian, gaussian_of(samples[rows]))


def mean_of_rows(points: np.ndarray):
    return lambda rows: points[rows].mean()


ESTIMATES = {
    "fid": frechet_of_rows,
    "precision": lambda r, s: mean_of_rows(precision_recall(r, s, arithmetic="float32")[0]),
    "density": lambda r, s: mean_of_rows(density_coverage(r, s)[0]),
}


@pytest.mark.parametrize("metric", ESTIMATES)
def test_intervals_cover_what_they_say(metric):
    """Of 150 sets some 95 % of the intervals hold the mean figure of sets of that size.

    Chance moves the count by 1.8 % (one standard deviation). The bootstrap's intervals of the
    Fréchet distance are a third wider than they should be.
    """
    rng = np.random.default_rng(0)
    reference = positive_features(rng, 300, 1.0)
    everything = np.arange(80)
    estimates = [ESTIMATES[metric](reference, positive_features(rng, 80, 1.1)) for _ in range(150)]
    values = np.array([estimate(everything) for estimate in estimates])
    options = {"groups": 40, "logarithmic": metric == "fid"}
    intervals = [jackknife_interval(estimate, 80, **options) for estimate in estimates]
    covered = np.mean([low <= values.mean() <= high for low, high in intervals])
    assert 0.91 <= covered <= 0.99
    width = np.mean([high - low for low, high in intervals])
    assert width == pytest.approx(2 * 2.02 * values.std(), rel=0.2)


@pytest.mark.parametrize(("change", "widest"), [("contrast", 1.2), ("noise", 1.45)])
def test_intervals_of_paired_differences_cover_what_they_say(change, widest):
    """Two sets that share their images but for a small change: 150 times their difference.

    The width is right for a change that all images share; for noise of each image's own it errs
    by a quarter to the wide side at 5 images a dimension. Unpaired it would be several times that.
    """
    rng = np.random.default_rng(1)
    reference = positive_features(rng, 300, 1.0)
    differences, paired, unpaired = [], [], []
    for _ in range(150):
        one = positive_features(rng, 80, 1.1)
        noise = 0.3 * rng.standard_normal(one.shape).astype(np.float32)
        replicates = [
            jackknife_replicates(frechet_of_rows(reference, samples), 80, groups=40)
            for samples in (one, one * 1.05 if change == "contrast" else one + noise)
        ]
        difference = replicates[1] - replicates[0]
        differences.append(difference[0])
        paired.append(interval_of_replicates(difference))
        unpaired.append(np.hypot(*(np.diff(interval_of_replicates(r))[0] for r in replicates)))
    covered = np.mean([low <= np.mean(differences) <= high for low, high in paired])
    assert covered >= 0.91
    width = np.mean([high - low for low, high in paired])
    assert 0.85 < width / (2 * 2.02 * np.std(differences)) < widest
    assert np.mean(unpaired) > 2 * width


def test_replicates_are_computed_with_one_thread_of_blas_each():
    """Threads of BLAS spin while they wait, which a busy machine takes 40 times as long over."""
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads() -> set[int]:
        return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}

    seen = []
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        replicates = jackknife_replicates(
            lambda rows: seen.append(threads()) or float(rows.sum()), 10, groups=5
        )
        assert threads() == before
    assert seen[0] == before == {2} and seen[1:] == [{1}] * 5
    # In the order of the groups, whichever was done first.
    order = np.random.default_rng(0).permutation(10).reshape(5, 2)
    np.testing.assert_array_equal(replicates, [45.0, *(45.0 - order.sum(axis=1))])
