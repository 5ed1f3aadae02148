"""Nearest neighbours in feature space.

Squared Euclidean distances are |u|^2 - 2uv + |v|^2, in one of two arithmetics:

* `float16`, the rule of the published evaluator: every step rounded to half precision wherever all
  distances come out finite, float32 otherwise. The rounding moves precision and recall by up to
  0.01, so published figures can only be met with it. Numbers stay in float32 arrays here, rounded
  to the 11 bits of half precision, because NumPy's own half arithmetic is slow.
* `float32` throughout.

Few pairs matter: those that may be within a limit. They are found from coarse distances, of centred
features that are rounded to bfloat16, which processors of today multiply several times as fast. How
far off a coarse distance can be is known, so none is overlooked, and the distances of the pairs
that are found are then computed in their arithmetic.
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esddpm_io.processes import cpu_has_bfloat16

ARITHMETICS = ("float16", "float32")
PUBLISHED_TILE = 10_000  # rows on a side of the tiles in which one infinity turns all to float32
_BLOCK = 1024  # rows on a side of the blocks held in memory: 8 MB of coarse distances
_ROWS = 256  # rows that are worked on at a time: 2 MB of features stay in the cache
_NATIVE = 256  # rows and terms of a product from which bfloat16 is worth it
_MANY = 1 / 32  # share of a block's pairs for which a product of all is the quicker one
_PENDING = 64  # pairs a point that may wait for their distances
_LANES, _ACCUMULATORS, _LEAF = 8, 4, 1024  # of Eigen's half-precision sums
_HALF_TINY = 2.0**-14  # below it, half precision has fewer than 11 bits
_EXPONENT = np.uint32(0x7F800000)  # its bits in float32
_HALF_OVERFLOW = 65520.0  # from here on, rounding to half precision gives infinity
_WIDENED = np.float32(1 + 1.01 * 2.0**-8)  # for what rounding to bfloat16 takes off or adds
_NORM_PARTS = 3  # bfloat16 numbers that add up to one of float32


class Points:
    """Rows of `features` [N, D] in an arithmetic, ready for any number of distances.

    `half_norms` are the squared norms that float16 needs, float32 [N], and None with float32.
    Points that are compared with others have the same `origin` [D], the better the nearer to all.
    """

    def __init__(
        self, features: np.ndarray, arithmetic: str = "float16", origin: np.ndarray | None = None
    ):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r}: choose from {', '.join(ARITHMETICS)}")
        self.values = np.ascontiguousarray(features, np.float32)
        self.full_norms = np.einsum("nd,nd->n", self.values, self.values)
        self.half_norms = _half_norms(self.values) if arithmetic == "float16" else None
        self.origin = self.values.mean(axis=0) if origin is None else origin
        self._coarse: dict[bool, _Coarse] = {}

    def __len__(self) -> int:
        return len(self.values)

    def norms(self, half: bool) -> np.ndarray:
        """Squared norms float32 [N]."""
        return self.half_norms if half else self.full_norms

    def rows(self, which: slice | np.ndarray, half: bool) -> np.ndarray:
        """The rows as they enter an exact product, float32."""
        return _half(self.values[which]) if half else self.values[which]

    def coarse(self, half: bool) -> "_Coarse":
        """All rows as they enter coarse products."""
        if half not in self._coarse:
            self._coarse[half] = _Coarse.of(self, half)
        return self._coarse[half]


@dataclass(frozen=True)
class _Coarse:
    """Points for coarse distances: rows less an origin, rounded to bfloat16.

    codes: int16 [N, D + 6], the bits of the rounded rows; then half of a squared norm, in three
        parts that add up to it, and three ones: with another sign of the rows and these threes
        swapped on one side, a product of two is half their distance
    lengths, errors: float32 [N], of the rounded rows, and of what rounding took off them
    sizes: float32 [N], the largest of the squared norms of each
    """

    codes: np.ndarray
    lengths: np.ndarray
    errors: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, points: Points, half: bool) -> "_Coarse":
        count, width = points.values.shape
        codes = np.empty((count, width + 2 * _NORM_PARTS), np.int16)
        codes[:, -_NORM_PARTS:] = _bfloat16_codes(np.ones(1, np.float32))
        lengths, errors = np.empty(count, np.float32), np.empty(count, np.float32)
        norms = points.norms(half)
        # Infinite rows, of tiles that half precision does not hold, give NaN that nobody asks for.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, count, _ROWS):
                part = slice(start, start + _ROWS)
                rows = points.rows(part, half)
                centred = rows - points.origin
                codes[part, :width] = _bfloat16_codes(centred)
                # 2uv = 2u'v' + |u|^2 - |u'|^2 + |v|^2 - |v'|^2 for u' = u - origin: all but the
                # first goes to the norms. In half precision these are not just |u|^2.
                rest = norms[part] - _squares(rows) + _squares(centred)
                for column in range(width, width + _NORM_PARTS):
                    codes[part, column] = _bfloat16_codes(rest / 2)
                    rest = rest - 2 * _of_bfloat16(codes[part, column])
                rounded = _of_bfloat16(codes[part, :width])
                lengths[part] = np.sqrt(_squares(rounded))
                errors[part] = np.sqrt(_squares(centred - rounded))
        # What float32 takes off while centring
        errors += np.float32(2.0**-23) * lengths
        sizes = np.maximum(np.maximum(norms, points.full_norms), lengths**2)
        return cls(codes, lengths, errors, sizes)

    def margins(self, other: "_Coarse", rows: slice, columns: slice) -> np.ndarray:
        """How far a coarse distance of `rows` from the other's `columns` can be off, float32 [n].

        By the rounding of rows, |uv - (u+e)(v+f)| <= |e||v| + |f||u| + |e||f|, and by sums of
        float32 numbers; that of the result itself comes on top.
        """
        furthest, worst = other.lengths[columns].max(), other.errors[columns].max()
        rounding = 2 * (self.errors[rows] * (furthest + worst) + worst * self.lengths[rows])
        terms = 8 * self.codes.shape[1]  # of the coarse sum and of the exact one
        sums = np.float32(terms * 2.0**-24) * self.largest(other, rows, columns)
        return rounding + sums + np.float32(2.0**-100)  # and of numbers too small for float32

    def largest(self, other: "_Coarse", rows: slice, columns: slice) -> float:
        """The largest squared norm of `rows` and of the other's `columns`."""
        return max(self.sizes[rows].max(), other.sizes[columns].max())


class Pairs:
    """The pairs of the points `u` [n, D] and `v` [m, D] of one arithmetic, by blocks.

    Without `v`, those of `u` with itself; then only blocks on and above the diagonal appear, and
    each stands for its mirror image too.
    """

    def __init__(self, u: Points, v: Points | None = None):
        self._symmetric = v is None
        self.u, self.v = u, u if v is None else v

    def blocks(self) -> Iterator["_Block"]:
        """All of them, those on the diagonal first."""
        parts = []
        for top in range(0, len(self.u), PUBLISHED_TILE):
            for left in range(top if self._symmetric else 0, len(self.v), PUBLISHED_TILE):
                rows = slice(top, min(top + PUBLISHED_TILE, len(self.u)))
                columns = slice(left, min(left + PUBLISHED_TILE, len(self.v)))
                half = self.u.half_norms is not None and self._half_is_finite(rows, columns)
                parts += [(*part, half) for part in self._block_slices(rows, columns)]
        parts.sort(key=lambda part: part[0] != part[1])
        for part in parts:
            yield _Block(self.u, self.v, *part)

    def _block_slices(self, rows: slice, columns: slice) -> Iterator[tuple[slice, slice]]:
        for top in range(rows.start, rows.stop, _BLOCK):
            for left in range(columns.start, columns.stop, _BLOCK):
                if self._symmetric and left < top:
                    continue
                yield (
                    slice(top, min(top + _BLOCK, rows.stop)),
                    slice(left, min(left + _BLOCK, columns.stop)),
                )

    def _half_is_finite(self, rows: slice, columns: slice) -> bool:
        """Whether no step of a tile's distances overflows half precision."""
        largest = max(self.u.half_norms[rows].max(), self.v.half_norms[columns].max())
        if 4.2 * largest < _HALF_OVERFLOW:  # |u|^2 + 2|uv| + |v|^2 <= 4 max, and some rounding
            return True
        if not np.isfinite(largest):
            return False
        parts = self._block_slices(rows, columns)
        blocks = (_Block(self.u, self.v, *part, half=True) for part in parts)
        return all(
            np.abs(distances).max() < _HALF_OVERFLOW
            for block in blocks
            for distances in (block.distances(), block.mirror().distances())
        )


class _Block:
    """Squared distances of the points `rows` of `u` from the points `columns` of `v`, float32.

    Indices of its methods count from the first of these rows and columns.
    """

    def __init__(self, u: Points, v: Points, rows: slice, columns: slice, half: bool):
        self.rows, self.columns, self.half = rows, columns, half
        self._u, self._v = u, v

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def mirror(self) -> "_Block":
        """The distances of v from u. In half precision they are not just the transpose."""
        mirrored = _Block(self._v, self._u, self.columns, self.rows, self.half)
        mirrored.codes = self.codes.T  # no need to compute these
        return mirrored

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """int16, the bits of bfloat16: half the coarse distances. They are in the numbers' order,
        but for negative ones, which are next to zero."""
        u, v = self._u.coarse(self.half), self._v.coarse(self.half)
        return _coarse_product(u.codes[self.rows], v.codes[self.columns])

    def near(
        self, limits: np.ndarray, column_limits: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of all pairs whose distance may be within the limit of their row, or
        of their column, and of few others."""
        mask = self.codes <= self._limit_codes(limits)[:, None]
        if column_limits is not None:
            mask |= self.codes <= self.mirror()._limit_codes(column_limits)
        if mask.flags.c_contiguous:  # several times as fast as `nonzero` of two dimensions
            return np.divmod(np.flatnonzero(mask), mask.shape[1])
        return np.divmod(np.flatnonzero(mask.T), mask.shape[0])[::-1]

    def _limit_codes(self, limits: np.ndarray) -> np.ndarray:
        """int16 [n]: distances within `limits` of their rows have no larger codes."""
        coarse = np.maximum(limits, 0) + self._margins  # sums in half precision may be below zero
        if self.half:
            coarse += _half_slack(limits, self._largest)
        coarse *= np.float32(0.5) * _WIDENED
        return (coarse.view(np.uint32) >> np.uint32(16)).astype(np.int16)

    @functools.cached_property
    def _margins(self) -> np.ndarray:
        u, v = self._u.coarse(self.half), self._v.coarse(self.half)
        return u.margins(v, self.rows, self.columns)

    @functools.cached_property
    def _largest(self) -> float:
        u, v = self._u.coarse(self.half), self._v.coarse(self.half)
        return u.largest(v, self.rows, self.columns)

    def bounds(self, rows: np.ndarray | slice, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What distances with these `codes`, one of each of `rows`, are at least and at most."""
        coarse, margins = 2 * _of_bfloat16(codes), self._margins[rows]
        low = np.minimum(coarse / _WIDENED, coarse * _WIDENED) - margins
        high = np.maximum(coarse, 0) * _WIDENED + margins
        if self.half:
            slack = _half_slack(high, self._largest)
            low, high = low - slack, high + slack
        return low, high

    def smallest(self, k: int) -> np.ndarray:
        """What the k-th smallest distance of each row is at the most, [n]."""
        if self.shape[1] < k:
            return np.full(self.shape[0], np.inf, np.float32)
        codes = np.partition(self.codes, k - 1, axis=1)[:, k - 1]
        return self.bounds(slice(None), codes)[1]

    def distances(self) -> np.ndarray:
        """All of them, [n, m]."""
        u, v = self._u.rows(self.rows, self.half), self._v.rows(self.columns, self.half)
        norms = self._u.norms(self.half)[self.rows], self._v.norms(self.half)[self.columns]
        return _combine(norms[0][:, None], u @ v.T, norms[1], self.half)

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Those of some pairs, [number of pairs]; fastest where `rows` are in order."""
        if len(rows) > _MANY * self.shape[0] * self.shape[1]:
            return self.distances()[rows, columns]
        rows, columns = rows + self.rows.start, columns + self.columns.start
        return _distances_of_pairs(self._u, self._v, rows, columns, self.half)


def _distances_of_pairs(
    u: Points, v: Points, rows: np.ndarray, columns: np.ndarray, half: bool
) -> np.ndarray:
    """Squared distances of pairs, float32 [number of pairs]; fastest where `rows` are in order."""
    products = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        own, which = np.unique(rows[part], return_inverse=True)
        first, second = u.rows(own, half)[which], v.rows(columns[part], half)
        products[part] = np.einsum("nd,nd->n", first, second)
    return _combine(u.norms(half)[rows], products, v.norms(half)[columns], half)


def _combine(first: np.ndarray, products: np.ndarray, second: np.ndarray, half: bool) -> np.ndarray:
    """(first norm - 2uv) + second norm, each step rounded in half precision."""
    if not half:
        return np.maximum((first - 2.0 * products) + second, 0.0)
    _round_half(products, _HALF_OVERFLOW / 2)
    products *= 2.0
    distances = np.subtract(first, products, order="C")
    _round_bits(distances)
    distances += second
    _round_bits(distances)
    return distances


# --- coarse distances ---


def _half_slack(distances: np.ndarray, largest: float) -> np.ndarray:
    """How much half precision may take off or add, as it rounds three times, with norms up to
    `largest`.

    By 2^-11 each, of 2uv, of the difference, and of the distance itself, or by 2^-25 of the tiniest
    numbers (twice that after doubling).
    """
    terms = 3 * np.maximum(distances, largest) + distances
    return np.float32(1.01 * 2.0**-11) * terms + np.float32(2.0**-22)


def _coarse_product(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Codes [n, m] of half the coarse distances of rows with the codes `u` and `v`."""
    left = u.copy()
    left[:, : -2 * _NORM_PARTS] ^= np.int16(-(2**15))  # the sign
    left[:, -2 * _NORM_PARTS :] = np.roll(u[:, -2 * _NORM_PARTS :], _NORM_PARTS, axis=1)
    torch = _torch() if cpu_has_bfloat16() else None
    if torch is None or min(*u.shape, len(v)) < _NATIVE:
        return _bfloat16_codes(_of_bfloat16(left) @ _of_bfloat16(v).T)
    product = [torch.from_numpy(x).view(torch.bfloat16) for x in (left, v)]
    return (product[0] @ product[1].T).view(torch.int16).numpy()


def _torch():
    """PyTorch, where it is there: TensorFlow's engine does without unless it is worth loading."""
    if not (cpu_has_bfloat16() or "torch" in sys.modules):
        return None
    try:
        import torch
    except (ImportError, OSError):  # none, or one whose libraries are missing
        return None
    return torch


def _bfloat16_codes(values: np.ndarray) -> np.ndarray:
    """The bits int16 of float32 `values` rounded to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    return odd.astype(np.uint16).view(np.int16)


def _of_bfloat16(codes: np.ndarray) -> np.ndarray:
    """The numbers float32 that have these bits."""
    bits = codes.view(np.uint16).astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", rows, rows)


# --- half precision ---


def _round_half(values: np.ndarray, overflow: float = _HALF_OVERFLOW) -> None:
    """Round float32 to half precision in place, ties to even; infinite from `overflow` on.

    A sum with 1.5 * 2^(e+13) is a multiple of 2^(e-10), the spacing of half precision's numbers
    from 2^e to 2^(e+1); below 2^-14 it has that of 2^-14.
    """
    spacers = values.view(np.uint32) & _EXPONENT
    np.clip(spacers, *np.array([_HALF_TINY, 2.0**16], np.float32).view(np.uint32), out=spacers)
    spacers += np.float32(1.5 * 2.0**13).view(np.uint32) - np.float32(1).view(np.uint32)
    values += spacers.view(np.float32)
    values -= spacers.view(np.float32)
    if values.max(initial=0) >= overflow or values.min(initial=0) <= -overflow:
        values[np.abs(values) >= overflow] *= np.inf


def _round_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to 11 bits in place, ties to even: half precision's normal numbers.

    Sums of half-precision numbers need no more: the tiny ones among them are exact.
    """
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(13)
    odd &= np.uint32(1)
    odd += np.uint32(0x0FFF)
    bits += odd
    bits &= np.uint32(0xFFFFE000)
    return values


def _half(values: np.ndarray) -> np.ndarray:
    """float32 `values` rounded to half precision, as float32; infinite from 65520 on."""
    if (torch := _torch()) is not None:  # several times as fast
        values = np.require(values, requirements="W")  # it warns of others
        return torch.from_numpy(values).half().float().numpy()
    rounded = values.copy()
    _round_half(rounded)
    return rounded


def _half_norms(values: np.ndarray) -> np.ndarray:
    norms = np.empty(len(values), np.float32)
    # An infinite value may give NaN on its way.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(values), _ROWS):
            squares = _half(_half(values[start : start + _ROWS]) ** 2)
            norms[start : start + _ROWS] = _half_sum(squares)
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
        return _round_bits(_half_sum(terms[:, :half]) + _half_sum(terms[:, half:]))
    packed = width // _LANES * _LANES
    packets = terms[:, :packed].reshape(len(terms), -1, _LANES)
    accumulators = _ACCUMULATORS if packets.shape[1] >= 2 * _ACCUMULATORS else 1
    whole = packets.shape[1] // accumulators * accumulators
    groups = packets[:, :whole].reshape(len(terms), -1, accumulators, _LANES)
    sums = _running_half_sum(groups)
    lanes = _running_half_sum(np.concatenate([sums, packets[:, whole:]], axis=1))
    single = _running_half_sum(terms[:, packed:])
    return _round_bits(single + _round_bits(lanes.sum(axis=1)))


def _running_half_sum(terms: np.ndarray) -> np.ndarray:
    """Sum over axis 1, one after the other, each sum rounded to half precision."""
    total = np.zeros((terms.shape[0], *terms.shape[2:]), np.float32)
    for index in range(terms.shape[1]):
        total += terms[:, index]
        _round_bits(total)
    return total


# --- neighbours ---


class _Nearest:
    """The k nearest of the points `v` to each of the points `u`, from blocks in any order.

    `columns` int64 [N, k] are their indices and `squared` float32 [N, k] their squared distances,
    from near to far.
    """

    def __init__(self, u: Points, v: Points, k: int):
        self._u, self._v, self._k = u, v, k
        self.columns = np.zeros((len(u), k), np.int64)
        self.squared = np.full((len(u), k), np.inf, np.float32)
        # Of all pairs seen, what the k smallest distances are at the most.
        self._at_most = self.squared.copy()
        self._pending: dict[bool, list[tuple[np.ndarray, ...]]] = {True: [], False: []}
        self._num_pending = 0

    def look(self, block: _Block) -> None:
        """Take in the distances of a block."""
        limits = self._limits(block.rows)
        if np.isinf(limits).any():
            limits = np.minimum(limits, block.smallest(self._k))
        rows, columns = block.near(limits)
        if len(rows) > _MANY * block.shape[0] * block.shape[1]:
            self._look_at_all(block)
            return
        at_least, at_most = block.bounds(rows, block.codes[rows, columns])
        at_most = _table(rows, at_most, block.shape[0])
        at_most = np.concatenate([self._at_most[block.rows], at_most], axis=1)
        self._at_most[block.rows] = np.partition(at_most, self._k - 1, axis=1)[:, : self._k]
        found = rows + block.rows.start, columns + block.columns.start, at_least
        self._pending[block.half].append(found)
        self._num_pending += len(rows)
        if self._num_pending > _PENDING * len(self._u):
            self.finish()

    def finish(self) -> None:
        """Bring `columns` and `squared` up to what has been looked at."""
        for half, pending in self._pending.items():
            if not pending:
                continue
            rows, columns, at_least = (np.concatenate(part) for part in zip(*pending, strict=True))
            pending.clear()
            order = np.lexsort((at_least, rows))
            rows, columns, at_least = rows[order], columns[order], at_least[order]
            first = _places(rows) < self._k  # with them the limits get narrower for the others
            for part in (first, ~first):
                kept = part & (at_least <= self._limits(slice(None))[rows])
                pairs = rows[kept], columns[kept]
                squared = _distances_of_pairs(self._u, self._v, *pairs, half)
                self._keep(slice(0, len(self._u)), *pairs, squared)
        self._num_pending = 0

    def _limits(self, rows: slice) -> np.ndarray:
        """What the k-th smallest distance is at the most, [n]."""
        return np.minimum(self._at_most[rows].max(axis=1), self.squared[rows].max(axis=1))

    def _look_at_all(self, block: _Block) -> None:
        distances = block.distances()
        columns = _columns_of_smallest(distances, self._k)
        rows = np.repeat(np.arange(len(distances)), columns.shape[1])
        values = distances[rows, columns.ravel()]
        self._keep(block.rows, rows, columns.ravel() + block.columns.start, values)

    def _keep(
        self, part: slice, rows: np.ndarray, columns: np.ndarray, squared: np.ndarray
    ) -> None:
        """Merge pairs of the points `part`, from which `rows` count, with the nearest so far."""
        own = np.repeat(np.arange(part.stop - part.start), self._k)
        rows = np.concatenate([own, rows])
        columns = np.concatenate([self.columns[part].ravel(), columns])
        squared = np.concatenate([self.squared[part].ravel(), squared])
        order = np.lexsort((columns, squared, rows))
        order = order[_places(rows[order]) < self._k]
        self.columns[part] = columns[order].reshape(-1, self._k)
        self.squared[part] = squared[order].reshape(-1, self._k)


def _places(rows: np.ndarray) -> np.ndarray:
    """0, 1, 2, … within each row, of sorted row numbers."""
    lengths = np.bincount(rows)
    return np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _table(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Values by the row that they belong to, float32 [count, most of one row], filled with inf."""
    order = np.argsort(rows, kind="stable")
    rows, values = rows[order], values[order]
    places = _places(rows)
    table = np.full((count, places.max(initial=-1) + 1), np.inf, np.float32)
    table[rows, places] = values
    return table


def neighbour_radii(features: np.ndarray, k: int, arithmetic: str = "float16") -> np.ndarray:
    """Squared distance of each row of `features` [N, D] to its k-th neighbour, float32 [N].

    That is element k of the sorted distances, the row itself at 0. `ValueError` if N <= k.
    """
    return _radii(Points(features, arithmetic), k)


def _radii(points: Points, k: int) -> np.ndarray:
    if len(points) <= k:
        raise ValueError(f"{len(points)} points: at least {k + 1} are needed for {k} neighbours")
    search = _Nearest(points, points, k + 1)
    for block in Pairs(points).blocks():
        search.look(block)
        if block.rows != block.columns:
            search.look(block.mirror())
    search.finish()
    return search.squared[:, k]


def _both(reference: np.ndarray, samples: np.ndarray, arithmetic: str) -> tuple[Points, Points]:
    points = Points(reference, arithmetic)
    return points, Points(samples, arithmetic, points.origin)


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, arithmetic: str = "float16"
) -> tuple[np.ndarray, np.ndarray]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), point by point.

    Returns bool [N] for `samples` [N, D], true inside the k-neighbour ball of any reference
    point, and bool [M] for `reference` [M, D] the other way round: their means are the precision
    and the recall.
    """
    points = _both(reference, samples, arithmetic)
    reference_radii, sample_radii = (_radii(own, k) for own in points)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)

    def note(block: _Block, rows: np.ndarray, columns: np.ndarray, distances: np.ndarray) -> None:
        inside = distances <= reference_radii[block.rows][rows]
        precise[block.columns][columns[inside]] = True
        inside = distances <= sample_radii[block.columns][columns]
        recalled[block.rows][rows[inside]] = True

    for block in Pairs(*points).blocks():
        rows, columns = block.near(reference_radii[block.rows], sample_radii[block.columns])
        note(block, rows, columns, block.bounds(rows, block.codes[rows, columns])[1])
        is_open = ~(recalled[block.rows][rows] & precise[block.columns][columns])
        rows, columns = rows[is_open], columns[is_open]
        note(block, rows, columns, block.at(rows, columns))
    return precise, recalled


def density_coverage(
    reference: np.ndarray, samples: np.ndarray, k: int = 5, arithmetic: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """Density and coverage (Naeem et al. 2020), point by point.

    Returns float64 [N] for `samples` [N, D], the number of reference balls a sample is in over k,
    and bool [M] for `reference` [M, D], whether its nearest sample is in its own ball: their means
    are the density and the coverage.
    """
    points = _both(reference, samples, arithmetic)
    radii = _radii(points[0], k)
    balls, covered = np.zeros(len(samples), np.int64), np.zeros(len(reference), bool)
    for block in Pairs(*points).blocks():
        limits = radii[block.rows]
        rows, columns = block.near(limits)
        inside = block.at(rows, columns) < limits[rows]
        balls[block.columns] += np.bincount(columns[inside], minlength=block.shape[1])
        covered[block.rows][rows[inside]] = True
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
    points = _both(reference, samples, arithmetic)[::-1]
    search = _Nearest(*points, k)
    for block in Pairs(*points).blocks():
        search.look(block)
    search.finish()
    return search.columns, np.sqrt(np.maximum(search.squared, 0))


def _columns_of_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Where the k smallest numbers of each row are (all, if there are no more), int64 [n, <= k]."""
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, k - 1, axis=1)[:, :k]
