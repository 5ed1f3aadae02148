import numpy as np
import pytest

from evaluations.metrics import Gaussian, frechet_distance, gaussian_of
from guided_diffusion.proposal import propose

DIMENSIONS, IMAGES = 8, 200
REFERENCE = Gaussian(np.zeros(DIMENSIONS), np.eye(DIMENSIONS))


def distance(features: np.ndarray) -> float:
    return frechet_distance(REFERENCE, gaussian_of(features))


def search(shift, **limits):
    """The proposal where features from T' lie `shift(T')` off; and the values that it measured."""
    rows = np.random.default_rng(0).standard_normal((IMAGES, DIMENSIONS)).astype(np.float32)
    asked = []

    def features_at(t_prime: int) -> np.ndarray:
        asked.append(t_prime)
        return rows + np.float32(shift(t_prime))

    return propose(features_at, distance, **limits), asked


@pytest.mark.parametrize("lowest_at", [150, 290, 430, 610])
def test_finds_the_lowest_point_between_those_it_measures(lowest_at):
    found, asked = search(lambda t: 0.003 * abs(t - lowest_at))
    assert abs(found.t_prime - lowest_at) <= 50
    assert found.low <= found.best.t_prime <= found.high
    assert found.doubts == []
    assert len(asked) == len(set(asked)) <= 7 and asked[:5] == [0, 200, 400, 600, 800]


def test_points_that_cannot_be_told_from_the_best_are_its_interval():
    """Paired points: without the offsets all features are the same rows."""
    found, _ = search(lambda t: 0.0 if 200 <= t <= 500 else 1.0)
    assert (found.low, found.high) == (200, 400)
    worse = [point.t_prime for point in found.points if not point.as_good]
    assert worse == [0, 100, 600, 800]
    for point in found.points:
        assert point.low <= point.difference <= point.high
        assert np.isclose(point.difference, point.distance - found.best.distance)


def test_says_that_start_images_are_as_good():
    found, asked = search(lambda t: 0.002 * t)
    assert 100 in asked
    assert found.best.t_prime == 0 and found.t_prime == 100
    assert "no T' is measurably better than the start images" in found.doubts[0]


def test_says_that_the_best_is_at_the_end_of_the_range():
    found, asked = search(lambda t: 1 - 0.001 * t)
    assert max(asked) == 900 and found.t_prime == 900
    assert "the best T' is the largest that was measured, 900" in found.doubts[0]


def test_keeps_to_what_the_network_was_trained_for():
    found, asked = search(lambda t: 1 - 0.001 * t, highest=300, lowest=80)
    assert min(asked[1:]) >= 80 and max(asked) <= 300
    assert 80 <= found.t_prime <= 300
