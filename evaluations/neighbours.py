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
_BLOCK = 1024  # rows on a side of the blocks held in memory: 4 MB of distances
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


class PairwiseDistances:
    """Squared distances of the rows of `u` [n, D] and of `v` [m, D], block by block.

    Without `v`, those of `u` with itself; then only blocks on and above the diagonal appear and
    each comes with its mirror image.
    """

    def __init__(self, u: np.ndarray, v: np.ndarray | None = None, arithmetic: str = "float16"):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r}: choose from {', '.join(ARITHMETICS)}")
        self._symmetric = v is None
        self._full = [_full_rows(u)]
        self._full.append(self._full[0] if v is None else _full_rows(v))
        self._half = None
        if arithmetic == "float16":
            self._half = [_half_rows(u)]
            self._half.append(self._half[0] if v is None else _half_rows(v))

    def blocks(self) -> Iterator[tuple[slice, slice, "Block"]]:
        """Rows, columns and the block of distances between them."""
        sizes = len(self._full[0]), len(self._full[1])
        for top in range(0, sizes[0], PUBLISHED_TILE):
            for left in range(top if self._symmetric else 0, sizes[1], PUBLISHED_TILE):
                bottom = min(top + PUBLISHED_TILE, sizes[0])
                right = min(left + PUBLISHED_TILE, sizes[1])
                yield from self._tile(slice(top, bottom), slice(left, right))

    def _tile(self, rows: slice, columns: slice):
        half = self._half is not None and self._half_is_finite(rows, columns)
        for part, other in self._block_slices(rows, columns):
            yield part, other, self._block(part, other, half)

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
        first, second = self._half if half else self._full
        return Block(first[part], second[other], half)

    def _half_is_finite(self, rows: slice, columns: slice) -> bool:
        """Whether no step of a tile's distances overflows half precision."""
        u, v = self._half[0][rows], self._half[1][columns]
        largest = max(u.norms.max(), v.norms.max())
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

    def candidates(self, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices, sorted by row, of all pairs that are within `limits` (of a shape that spreads
        to [n, m]), or so close to it that only rounding can tell."""
        if self._half:
            # Three roundings, each by 2^-11 at the most of terms up to 2, 3 and 4 times the
            # largest norm, or by 2^-25 of the tiniest numbers (twice that after doubling).
            largest = max(self._u.norms.max(), self._v.norms.max())
            limits = limits + (largest * np.float32(2.0**-7) + np.float32(2.0**-22))
        return np.nonzero(self._unrounded <= limits)

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
        _round_products(doubled)
        doubled *= 2.0
        distances = np.subtract(first, doubled, order="C")
        _round_half(distances)
        distances += second
        _round_half(distances)
        return distances


def _round_products(products: np.ndarray) -> None:
    """Round uv to half precision in place; of all terms only these can be tiny."""
    if products.size and np.abs(products).min() < _HALF_TINY:
        tiny = np.abs(products) < _HALF_TINY
        # Adding 0.75 leaves multiples of 2^-24, the spacing of half precision's tiny numbers.
        rounded = (products[tiny] + np.float32(0.75)) - np.float32(0.75)
        _round_half(products)
        products[tiny] = rounded
    else:
        _round_half(products)
    # Doubling overflows half precision where it does not overflow float32.
    if products.size and max(products.max(), -products.min()) * 2 >= _HALF_OVERFLOW:
        products[np.abs(products) * 2 >= _HALF_OVERFLOW] *= np.inf


def _round_half(values: np.ndarray) -> None:
    """Round float32 to 11 bits in place, ties to even: half precision's normal numbers."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(13)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32(0x0FFF)
    bits &= np.uint32(0xFFFFE000)


def _full_rows(features: np.ndarray) -> _Rows:
    values = np.ascontiguousarray(features, np.float32)
    return _Rows(values, np.einsum("nd,nd->n", values, values))


def _half_rows(features: np.ndarray) -> _Rows:
    values = np.empty(features.shape, np.float32)
    norms = np.empty(len(features), np.float32)
    with np.errstate(over="ignore"):  # infinities are looked for, and lead to float32
        for start in range(0, len(features), _BLOCK):
            part = slice(start, start + _BLOCK)
            values[part] = features[part].astype(np.float16)
            norms[part] = _half_sum(_to_half(values[part] ** 2))
    return _Rows(values, norms)


def _to_half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


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
        return _to_half(_half_sum(terms[:, :half]) + _half_sum(terms[:, half:]))
    packed = width // _LANES * _LANES
    packets = terms[:, :packed].reshape(len(terms), -1, _LANES)
    accumulators = _ACCUMULATORS if packets.shape[1] >= 2 * _ACCUMULATORS else 1
    whole = packets.shape[1] // accumulators * accumulators
    groups = packets[:, :whole].reshape(len(terms), -1, accumulators, _LANES)
    sums = _running_half_sum(groups)
    lanes = _running_half_sum(np.concatenate([sums, packets[:, whole:]], axis=1))
    single = _running_half_sum(terms[:, packed:])
    return _to_half(single + _to_half(lanes.sum(axis=1)))


def _running_half_sum(terms: np.ndarray) -> np.ndarray:
    """Sum over axis 1, one after the other, each sum rounded to half precision."""
    total = np.zeros((terms.shape[0], *terms.shape[2:]), np.float32)
    for index in range(terms.shape[1]):
        total = _to_half(total + terms[:, index])
    return total


def neighbour_radii(features: np.ndarray, k: int, arithmetic: str = "float16") -> np.ndarray:
    """Squared distance of each row of `features` [N, D] to its k-th neighbour, float32 [N].

    That is element k of the sorted distances, the row itself at 0. `ValueError` if N <= k.
    """
    count = len(features)
    if count <= k:
        raise ValueError(f"{count} points: at least {k + 1} are needed for {k} neighbours")
    nearest = np.full((count, k + 1), np.inf, np.float32)
    bound = np.full(count, np.inf, np.float32)  # what the next candidate has to beat

    def keep(rows: slice, distances: np.ndarray) -> None:
        both = np.concatenate([nearest[rows], distances], axis=1)
        nearest[rows] = np.partition(both, k, axis=1)[:, : k + 1]
        bound[rows] = nearest[rows].max(axis=1)

    for rows, columns, block in PairwiseDistances(features, None, arithmetic).blocks():
        if np.isinf(bound[rows]).any():
            keep(rows, block.distances())
        else:
            near = block.candidates(bound[rows, None])
            keep(rows, _table(near[0], block.at(*near), rows.stop - rows.start))
        if rows == columns:
            continue
        if np.isinf(bound[columns]).any():
            keep(columns, block.mirror())
        else:
            near = block.candidates(bound[columns])
            keep(columns, _table(near[1], block.mirror_at(*near), columns.stop - columns.start))
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
    reference_radii = neighbour_radii(reference, k, arithmetic)
    sample_radii = neighbour_radii(samples, k, arithmetic)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, columns, block in PairwiseDistances(reference, samples, arithmetic).blocks():
        outer, inner = reference_radii[rows], sample_radii[columns]
        near = block.candidates(np.maximum(outer[:, None], inner))
        distances = block.at(*near)
        precise[columns][near[1][distances <= outer[near[0]]]] = True
        recalled[rows][near[0][distances <= inner[near[1]]]] = True
    return precise, recalled


def density_coverage(
    reference: np.ndarray, samples: np.ndarray, k: int = 5, arithmetic: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """Density and coverage (Naeem et al. 2020), point by point.

    Returns float64 [N] for `samples` [N, D], the number of reference balls a sample is in over k,
    and bool [M] for `reference` [M, D], whether its nearest sample is in its own ball: their means
    are the density and the coverage.
    """
    radii = neighbour_radii(reference, k, arithmetic)
    balls, covered = np.zeros(len(samples), np.int64), np.zeros(len(reference), bool)
    for rows, columns, block in PairwiseDistances(reference, samples, arithmetic).blocks():
        inside = block.distances() < radii[rows, None]
        balls[columns] += inside.sum(axis=0)
        covered[rows] |= inside.any(axis=1)
    return balls / k, covered
