"""Nearest neighbours in feature space, a block of distances at a time.

Squared Euclidean distances are |u|^2 - 2uv + |v|^2, in one of two arithmetics:

* `float16`, the rule of the published evaluator: every step rounded to half precision wherever all
  distances come out finite, float32 otherwise. The rounding moves precision and recall by up to
  0.01, so published figures can only be met with it. Numbers stay in float32 arrays here, rounded
  to the 11 bits of half precision, because NumPy's own half arithmetic is slow.
* `float32` throughout.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ARITHMETICS = ("float16", "float32")
PUBLISHED_TILE = 10_000  # rows on a side of the tiles in which one infinity turns all to float32
_BLOCK = 2048  # rows on a side of the blocks held in memory: 16 MB of distances
_BLOCKS_KEPT = 6  # rounded, of a row and the columns of a tile: 100 MB of Inception features
_NORM_ROWS = 256  # rows whose norms are summed at a time: 2 MB of features stay in the cache
_LANES, _ACCUMULATORS, _LEAF = 8, 4, 1024  # of Eigen's half-precision sums
_HALF_TINY = 2.0**-14  # below it, half precision has fewer than 11 bits
_HALF_OVERFLOW = 65520.0  # from here on, rounding to half precision gives infinity


@dataclass(frozen=True)
class _Rows:
    """Rows float32 [n, D] as they enter the product, and their squared norms float32 [n]."""

    values: np.ndarray
    norms: np.ndarray

    def __getitem__(self, part: slice) -> "_Rows":
        return _Rows(self.values[part], self.norms[part])

    def __len__(self) -> int:
        return len(self.values)


class Points:
    """Rows of `features` [N, D] in an arithmetic, ready for any number of distances.

    `full` is what float32 needs. `half_norms` are the squared norms that float16 needs, float32
    [N], and None with float32; its rows are rounded when they are used, a copy of all of them
    would be as large as the features.
    """

    def __init__(self, features: np.ndarray, arithmetic: str = "float16"):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r}: choose from {', '.join(ARITHMETICS)}")
        self.full = _full_rows(features)
        self.half_norms = _half_norms(self.full.values) if arithmetic == "float16" else None

    def __len__(self) -> int:
        return len(self.full)

    def half(self, start: int, stop: int) -> _Rows:
        """Rows start … stop-1 rounded to half precision."""
        return _Rows(_half(self.full.values[start:stop]), self.half_norms[start:stop])


class PairwiseDistances:
    """Squared distances of the points `u` [n, D] and `v` [m, D] of one arithmetic, by blocks.

    Without `v`, those of `u` with itself; then only blocks on and above the diagonal appear and
    each comes with its mirror image.
    """

    def __init__(self, u: Points, v: Points | None = None):
        self._symmetric = v is None
        self._points = u, u if v is None else v
        # Blocks come tile by tile, so each is rounded twice a tile at the most.
        self._half = functools.lru_cache(_BLOCKS_KEPT)(lambda points, *part: points.half(*part))

    def blocks(self) -> Iterator[tuple[slice, slice, "Block"]]:
        """Rows, columns and the block of distances between them, those on the diagonal first."""
        sizes = [len(points) for points in self._points]
        parts = []
        for top in range(0, sizes[0], PUBLISHED_TILE):
            for left in range(top if self._symmetric else 0, sizes[1], PUBLISHED_TILE):
                rows = slice(top, min(top + PUBLISHED_TILE, sizes[0]))
                columns = slice(left, min(left + PUBLISHED_TILE, sizes[1]))
                half = self._points[0].half_norms is not None and self._half_is_finite(
                    rows, columns
                )
                parts += [(*part, half) for part in self._block_slices(rows, columns)]
        parts.sort(key=lambda part: part[0] != part[1])
        for rows, columns, half in parts:
            yield rows, columns, self._block(rows, columns, half)

    def _block_slices(self, rows: slice, columns: slice) -> Iterator[tuple[slice, slice]]:
        for top in range(rows.start, rows.stop, _BLOCK):
            for left in range(columns.start, columns.stop, _BLOCK):
                if self._symmetric and left < top:
                    continue
                yield (
                    slice(top, min(top + _BLOCK, rows.stop)),
                    slice(left, min(left + _BLOCK, columns.stop)),
                )

    def _block(self, part: slice, other: slice, half: bool) -> "Block":
        sides = zip(self._points, (part, other), strict=True)
        if half:
            return Block(*(self._half(points, own.start, own.stop) for points, own in sides), half)
        return Block(*(points.full[own] for points, own in sides), half)

    def _half_is_finite(self, rows: slice, columns: slice) -> bool:
        """Whether no step of a tile's distances overflows half precision."""
        u, v = self._points
        largest = max(u.half_norms[rows].max(), v.half_norms[columns].max())
        if 4.2 * largest < _HALF_OVERFLOW:  # |u|^2 + 2|uv| + |v|^2 <= 4 max, and some rounding
            return True
        if not np.isfinite(largest):
            return False
        blocks = (self._block(*part, half=True) for part in self._block_slices(rows, columns))
        return all(
            np.abs(distances).max() < _HALF_OVERFLOW
            for block in blocks
            for distances in (block.distances(), block.mirror())
        )


class Block:
    """Squared distances of a few rows `u` [n, D] from a few rows `v` [m, D], float32.

    Rounding costs more than the product itself, so it is done for all pairs only where all are
    wanted, and else for those that may be near enough.
    """

    def __init__(self, u: _Rows, v: _Rows, half: bool):
        self._u, self._v, self._half = u, v, half
        self._products = u.values @ v.values.T

    def distances(self) -> np.ndarray:
        """All of them, [n, m]."""
        return self._combine(self._u.norms[:, None], self._products, self._v.norms)

    def mirror(self) -> np.ndarray:
        """Those of v from u, [m, n]. In half precision they are not just the transpose."""
        return self._combine(self._v.norms[:, None], self._products.T, self._u.norms)

    def candidates(self, *limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices, sorted by row, of all pairs that are within any of `limits` (of shapes that
        spread to [n, m]), or so close to it that only rounding can tell."""
        slack = np.float32(0)
        if self._half:
            # Three roundings, each by 2^-11 at the most of terms up to 2, 3 and 4 times the
            # largest norm, or by 2^-25 of the tiniest numbers (twice that after doubling).
            largest = max(self._u.norms.max(), self._v.norms.max())
            slack = largest * np.float32(2.0**-7) + np.float32(2.0**-22)
        near = functools.reduce(np.logical_or, (self._unrounded <= x + slack for x in limits))
        # Several times as fast as `nonzero` of two dimensions.
        return np.divmod(np.flatnonzero(near), len(self._v))

    @functools.cached_property
    def _unrounded(self) -> np.ndarray:
        distances = self._products * np.float32(-2.0)
        distances += self._u.norms[:, None]
        distances += self._v.norms
        return distances

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Elements of `distances()`, [number of indices]."""
        products = self._products[rows, columns]
        return self._combine(self._u.norms[rows], products, self._v.norms[columns])

    def mirror_at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Elements [column, row] of `mirror()`, [number of indices]."""
        products = self._products[rows, columns]
        return self._combine(self._v.norms[columns], products, self._u.norms[rows])

    def _combine(self, first: np.ndarray, products: np.ndarray, second: np.ndarray) -> np.ndarray:
        """(first norm - 2uv) + second norm, each step rounded in half precision."""
        if not self._half:
            return np.maximum((first - 2.0 * products) + second, 0.0)
        doubled = products.copy()
        _round_half(doubled, _HALF_OVERFLOW / 2)
        doubled *= 2.0
        distances = np.subtract(first, doubled, order="C")
        _round_bits(distances)
        distances += second
        _round_bits(distances)
        return distances


def _round_half(values: np.ndarray, overflow: float = _HALF_OVERFLOW) -> None:
    """Round float32 to half precision in place, ties to even; infinite from `overflow` on."""
    magnitudes = np.abs(values)
    tiny = magnitudes < _HALF_TINY
    if tiny.any():
        # Adding 0.75 leaves multiples of 2^-24, the spacing of half precision's tiny numbers.
        spaced = values + np.float32(0.75)
        spaced -= np.float32(0.75)
        _round_bits(values)
        np.copyto(values, spaced, where=tiny)
    else:
        _round_bits(values)
    if values.size and magnitudes.max() >= overflow:
        values[magnitudes >= overflow] *= np.inf


def _round_bits(values: np.ndarray) -> None:
    """Round float32 to 11 bits in place, ties to even: half precision's normal numbers.

    Sums of half-precision numbers need no more: the tiny ones among them are exact.
    """
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(13)
    odd &= np.uint32(1)
    odd += np.uint32(0x0FFF)
    bits += odd
    bits &= np.uint32(0xFFFFE000)


def _full_rows(features: np.ndarray) -> _Rows:
    values = np.ascontiguousarray(features, np.float32)
    return _Rows(values, np.einsum("nd,nd->n", values, values))


def _half(values: np.ndarray) -> np.ndarray:
    """float32 `values` rounded to half precision, as float32; infinite from 65520 on."""
    # Infinities are looked for, and lead to float32.
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _half_norms(values: np.ndarray) -> np.ndarray:
    norms = np.empty(len(values), np.float32)
    # An infinite value may give NaN on its way.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(values), _NORM_ROWS):
            squares = _half(_half(values[start : start + _NORM_ROWS]) ** 2)
            norms[start : start + _NORM_ROWS] = _half_sum(squares)
    norms[norms >= _HALF_OVERFLOW] = np.inf
    return norms


def _half_sum(terms: np.ndarray) -> np.ndarray:
    """Sums over axis 1 of half-precision terms in the order of Eigen's CPU reduction.

    Longer rows than 1024 are halved. Packets of 8 are added by four accumulators in turn (by one
    if there are fewer than 8 packets), the accumulators and then the packets left over one after
    the other; the 8 lanes are added in float32, single terms at the end apart. Exact for widths
    up to 1024 and for 2048, which is what the published figures were made with.
    """
    width = terms.shape[1]
    if width > _LEAF:
        half = -(-(width // 2) // _LANES) * _LANES
        return _rounded(_half_sum(terms[:, :half]) + _half_sum(terms[:, half:]))
    packed = width // _LANES * _LANES
    packets = terms[:, :packed].reshape(len(terms), -1, _LANES)
    accumulators = _ACCUMULATORS if packets.shape[1] >= 2 * _ACCUMULATORS else 1
    whole = packets.shape[1] // accumulators * accumulators
    groups = packets[:, :whole].reshape(len(terms), -1, accumulators, _LANES)
    sums = _running_half_sum(groups)
    lanes = _running_half_sum(np.concatenate([sums, packets[:, whole:]], axis=1))
    single = _running_half_sum(terms[:, packed:])
    return _rounded(single + _rounded(lanes.sum(axis=1)))


def _running_half_sum(terms: np.ndarray) -> np.ndarray:
    """Sum over axis 1, one after the other, each sum rounded to half precision."""
    total = np.zeros((terms.shape[0], *terms.shape[2:]), np.float32)
    for index in range(terms.shape[1]):
        total += terms[:, index]
        _round_bits(total)
    return total


def _rounded(sums: np.ndarray) -> np.ndarray:
    _round_bits(sums)
    return sums


def neighbour_radii(features: np.ndarray, k: int, arithmetic: str = "float16") -> np.ndarray:
    """Squared distance of each row of `features` [N, D] to its k-th neighbour, float32 [N].

    That is element k of the sorted distances, the row itself at 0. `ValueError` if N <= k.
    """
    return _radii(Points(features, arithmetic), k)


def _radii(points: Points, k: int) -> np.ndarray:
    count = len(points)
    if count <= k:
        raise ValueError(f"{count} points: at least {k + 1} are needed for {k} neighbours")
    nearest = np.full((count, k + 1), np.inf, np.float32)
    bound = np.full(count, np.inf, np.float32)  # what the next candidate has to beat

    def keep(rows: slice, distances: np.ndarray) -> None:
        both = np.concatenate([nearest[rows], distances], axis=1)
        nearest[rows] = np.partition(both, k, axis=1)[:, : k + 1]
        bound[rows] = nearest[rows].max(axis=1)

    for rows, columns, block in PairwiseDistances(points).blocks():
        if np.isinf(bound[rows]).any():
            keep(rows, block.distances())
        else:
            near = block.candidates(bound[rows, None])
            keep(rows, _table(near[0], block.at(*near), rows.stop - rows.start))
        if rows != columns and np.isinf(bound[columns]).any():
            keep(columns, block.mirror())
        elif rows != columns:
            near = block.candidates(bound[columns])
            keep(columns, _table(near[1], block.mirror_at(*near), columns.stop - columns.start))
        del block  # before there is the next one
    return bound


def _table(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Values by the row that they belong to, float32 [count, most of one row], filled with inf."""
    order = np.argsort(rows, kind="stable")
    rows, values = rows[order], values[order]
    lengths = np.bincount(rows, minlength=count)
    slots = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    table = np.full((count, lengths.max()), np.inf, np.float32)
    table[rows, slots] = values
    return table


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, arithmetic: str = "float16"
) -> tuple[np.ndarray, np.ndarray]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), point by point.

    Returns bool [N] for `samples` [N, D], true inside the k-neighbour ball of any reference
    point, and bool [M] for `reference` [M, D] the other way round: their means are the precision
    and the recall.
    """
    points = [Points(features, arithmetic) for features in (reference, samples)]
    reference_radii, sample_radii = (_radii(own, k) for own in points)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, columns, block in PairwiseDistances(*points).blocks():
        outer, inner = reference_radii[rows], sample_radii[columns]
        near = block.candidates(outer[:, None], inner)
        distances = block.at(*near)
        precise[columns][near[1][distances <= outer[near[0]]]] = True
        recalled[rows][near[0][distances <= inner[near[1]]]] = True
        del block  # before there is the next one
    return precise, recalled


def density_coverage(
    reference: np.ndarray, samples: np.ndarray, k: int = 5, arithmetic: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """Density and coverage (Naeem et al. 2020), point by point.

    Returns float64 [N] for `samples` [N, D], the number of reference balls a sample is in over k,
    and bool [M] for `reference` [M, D], whether its nearest sample is in its own ball: their means
    are the density and the coverage.
    """
    points = [Points(features, arithmetic) for features in (reference, samples)]
    radii = _radii(points[0], k)
    balls, covered = np.zeros(len(samples), np.int64), np.zeros(len(reference), bool)
    for rows, columns, block in PairwiseDistances(*points).blocks():
        inside = block.distances() < radii[rows, None]
        balls[columns] += inside.sum(axis=0)
        covered[rows] |= inside.any(axis=1)
    return balls / k, covered


def nearest(
    reference: np.ndarray, samples: np.ndarray, k: int, arithmetic: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The k points of `reference` [M, D] next to each of `samples` [N, D], from near to far.

    Returns their rows int64 [N, k] and their distances (not squared) float32 [N, k].
    `ValueError` if M < k.
    """
    if len(reference) < k:
        raise ValueError(f"{len(reference)} points: at least {k} are needed")
    points = [Points(features, arithmetic) for features in (samples, reference)]
    rows = np.zeros((len(samples), k), np.int64)
    squared = np.full((len(samples), k), np.inf, np.float32)
    for part, columns, block in PairwiseDistances(*points).blocks():
        distances = block.distances()
        found = _columns_of_smallest(distances, k)
        both = np.concatenate([squared[part], np.take_along_axis(distances, found, axis=1)], axis=1)
        order = np.argsort(both, axis=1, kind="stable")[:, :k]
        squared[part] = np.take_along_axis(both, order, axis=1)
        candidates = np.concatenate([rows[part], found + columns.start], axis=1)
        rows[part] = np.take_along_axis(candidates, order, axis=1)
    return rows, np.sqrt(squared)


def _columns_of_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Where the k smallest numbers of each row are (all, if there are no more), in rising order."""
    if k == 1:
        return values.argmin(axis=1)[:, None]
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.sort(np.argpartition(values, k - 1, axis=1)[:, :k], axis=1)
