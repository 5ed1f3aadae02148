"""T' from data: a search for the noise level from which the samples come out best.

Pure functions of features; who samples and extracts them is `sampling.trial`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# Features float32 [n, D] of the samples from a T', of the same images with the same noise each
# time; of T' = 0 those of the start images.
FeaturesAt = Callable[[int], np.ndarray]
Distance = Callable[[np.ndarray], float]

_STRIDES = (5, 10)  # of the range: coarse points, then the neighbours of the best
_GROUPS = 50  # of the jackknife
_ROUND = 10  # proposals are multiples of it: finer differences cannot be seen


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured T'.

    distance: Fréchet distance to the reference. difference: how far above the best point's it is,
    with its 95 % interval low … high from leaving out images of both (0 for the best itself).
    """

    t_prime: int
    distance: float
    difference: float
    low: float
    high: float

    @property
    def as_good(self) -> bool:
        """Whether it cannot be told from the best."""
        return self.low <= 0


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The proposed T' and the measured T' about it that cannot be told from the best.

    highest: the largest T' that was allowed. points: all that was measured, by T'.
    """

    t_prime: int
    low: int
    high: int
    highest: int
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The measured point with the smallest distance."""
        return min(self.points, key=lambda point: point.distance)

    @property
    def doubts(self) -> list[str]:
        """What the user must know before believing it."""
        found = []
        start = next(point for point in self.points if point.t_prime == 0)
        largest = self.points[-1].t_prime
        if start.as_good:
            found.append(
                "no T' is measurably better than the start images themselves (T' = 0): sampling "
                "does not improve them by this distance"
            )
        if self.best.t_prime == largest:
            found.append(
                f"the best T' is the largest that was measured, {largest}: the start images may "
                "be of no help; compare with --start_from_scratch"
            )
        return found


def propose(
    features_at: FeaturesAt, distance: Distance, highest: int = 1000, lowest: int = 1
) -> Proposal:
    """Search T' in lowest … highest for the smallest distance.

    Measures T' = 0 (the start images), coarse points at every fifth of the range, and the points
    halfway to the neighbours of the best. Differences of paired points are far more exact than
    the distances, so a parabola through the best points gives the proposal. The last tenth of the
    range is left out: it is sampling from noise.
    """
    measured: dict[int, np.ndarray] = {0: features_at(0)}

    def measure(t_prime: int) -> None:
        if lowest <= t_prime <= highest and t_prime not in measured:
            measured[t_prime] = features_at(t_prime)

    for step in range(1, _STRIDES[0]):
        measure(max(lowest, round(step * highest / _STRIDES[0])))
    stride = highest / _STRIDES[1]
    best = _best(measured, distance)
    for neighbour in (best - stride, best + stride):
        measure(round(neighbour))
    return _proposal(measured, distance, highest, lowest, 2 * stride)


def _best(measured: dict[int, np.ndarray], distance: Distance) -> int:
    return min(measured, key=lambda t_prime: distance(measured[t_prime]))


def _proposal(
    measured: dict[int, np.ndarray], distance: Distance, highest: int, lowest: int, reach: float
) -> Proposal:
    best = _best(measured, distance)
    points = tuple(_compare(measured, distance, t_prime, best) for t_prime in sorted(measured))
    near = [point for point in points if point.as_good and point.t_prime]
    if best == 0:
        best = min(points[1:], key=lambda point: point.distance).t_prime
    t_prime = _lowest_of_parabola(points, best, reach)
    return Proposal(
        t_prime=min(max(t_prime, lowest), highest),
        low=min((point.t_prime for point in near), default=0),
        high=max((point.t_prime for point in near), default=0),
        highest=highest,
        points=points,
    )


def _compare(measured: dict[int, np.ndarray], distance: Distance, t_prime: int, best: int) -> Point:
    from evaluations.metrics import jackknife_interval

    ours, theirs = measured[t_prime], measured[best]
    found = distance(ours)
    if t_prime == best:
        return Point(t_prime, found, 0.0, 0.0, 0.0)

    def difference(rows: np.ndarray) -> float:
        return distance(ours[rows]) - distance(theirs[rows])

    low, high = jackknife_interval(difference, len(ours), groups=_GROUPS)
    return Point(t_prime, found, found - distance(theirs), low, high)


def _lowest_of_parabola(points: tuple[Point, ...], best: int, reach: float) -> int:
    """Where the parabola through the points within `reach` of the best is lowest.

    Between the best point's neighbours; the best itself where the parabola has no lowest point.
    """
    near = [point for point in points if abs(point.t_prime - best) <= reach and point.t_prime]
    if len(near) < 3:
        return best
    at = np.array([point.t_prime for point in near], float)
    curvature, slope, _ = np.polyfit(at - best, [point.distance for point in near], 2)
    if curvature <= 0:
        return best
    below = max((t for t in at if t < best), default=best)
    above = min((t for t in at if t > best), default=best)
    lowest = np.clip(best - slope / (2 * curvature), below, above)
    return round(lowest / _ROUND) * _ROUND
