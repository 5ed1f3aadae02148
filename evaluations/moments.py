"""Mean and covariance of features that stream by, and the Fréchet distance of two such Gaussians.

Everything is float64: in float32 the distance loses its first digits (4e-2 at 2048 dimensions).
"""

import functools
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are loaded when they are used

_ROUNDING = 1e-5  # of a covariance that was kept as float32
_TOLERANCE = 1e-9  # relative error of a distance that is good enough


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of D-dimensional features.

    The covariance (ddof 1) is held either as `covariance` [D, D] or, for fewer samples than
    dimensions, as `rows` [n, D] with covariance = rows^T rows: smaller, and exactly of its rank.
    `count` is the number of samples, or None where statistics were given as they stand.
    """

    mean: np.ndarray
    covariance: np.ndarray | None = None
    rows: np.ndarray | None = None
    count: int | None = None

    @property
    def dimensions(self) -> int:
        return len(self.mean)

    def is_finite(self) -> bool:
        spread = self.covariance if self.rows is None else self.rows
        return bool(np.isfinite(self.mean).all() and np.isfinite(spread).all())

    def has_covariance(self) -> bool:
        """Whether `covariance` is symmetric and positive semidefinite, up to rounding."""
        largest = np.abs(self.covariance).max(initial=0.0)
        if np.abs(self.covariance - self.covariance.T).max(initial=0.0) > _ROUNDING * largest:
            return False
        widened = self.covariance + _ROUNDING * largest * np.eye(self.dimensions)
        return not scipy.linalg.lapack.dpotrf(widened, lower=1, overwrite_a=1)[1] or not largest

    def too_few(self) -> str | None:
        """`N images for D-dimensional features` where these leave the covariance singular."""
        if self.count is None or self.count > self.dimensions:
            return None
        return f"{self.count} images for {self.dimensions}-dimensional features"

    def full_covariance(self) -> np.ndarray:
        """The covariance as a float64 [D, D] matrix."""
        return self.rows.T @ self.rows if self.covariance is None else self.covariance

    @property
    def trace(self) -> float:
        """The sum of the variances."""
        return np.trace(self.covariance) if self.rows is None else np.sum(self.rows**2)

    @functools.cached_property
    def cholesky(self) -> np.ndarray | None:
        """L float64 [D, D], lower triangle, with covariance = L L^T; None without such."""
        if self.covariance is None:
            return None
        lower, status = scipy.linalg.lapack.dpotrf(self.covariance, lower=1)
        return None if status else lower

    @functools.cached_property
    def root(self) -> np.ndarray:
        """R float64 [rank, D] with covariance = R^T R.

        From a matrix: Cholesky's decomposition with pivots, which ends at the matrix's rank.
        """
        if self.rows is not None:
            return self.rows
        upper, pivots, rank, status = scipy.linalg.lapack.dpstrf(self.covariance)
        if status < 0:
            raise ValueError(f"dpstrf refused its argument {-status}")
        return np.triu(upper[:rank])[:, np.argsort(pivots)]


class RunningMoments:
    """Mean and covariance of rows that arrive in batches, without keeping them.

    Until there are more rows than dimensions they are kept, since they are then the smaller and
    exact form. Their mean is the origin about which sums and products are taken from then on: it
    lies so near to that of all rows that little cancels in the end.
    """

    def __init__(self):
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._count = 0
        self._origin: np.ndarray | None = None
        self._sums: np.ndarray | None = None
        self._products: np.ndarray | None = None
        self._taken = False

    def add(self, rows: np.ndarray) -> None:
        """Take in rows [n, D] of any float type; they must be finite."""
        if self._taken:
            raise ValueError("no rows can follow the Gaussian of all")
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows > rows.shape[1]:
            self._fold()

    def gaussian(self) -> Gaussian:
        """The Gaussian of all rows; no more can follow. One row's covariance is zero."""
        if self._count == 0:
            mean = self._mean_of_pending()
            rows = self._pending_about(mean) / np.sqrt(max(self._pending_rows - 1, 1))
            return Gaussian(mean, rows=rows, count=len(rows))
        if self._pending:
            self._fold()
        # It takes the place of the products.
        covariance, self._products, self._taken = self._products, None, True
        if covariance.size:
            covariance = scipy.linalg.blas.dsyr(
                -1.0 / self._count, self._sums, lower=1, a=covariance, overwrite_a=True
            )
        covariance = covariance.T  # rows as NumPy has them
        covariance /= self._count - 1
        _mirror_upper(covariance)
        return Gaussian(self._origin + self._sums / self._count, covariance, count=self._count)

    def _mean_of_pending(self) -> np.ndarray:
        sums = [rows.sum(axis=0, dtype=np.float64) for rows in self._pending]
        return np.sum(sums, axis=0) / self._pending_rows

    def _pending_about(self, origin: np.ndarray) -> np.ndarray:
        """float64 [pending rows, D]."""
        centred = np.empty((self._pending_rows, len(origin)))
        start = 0
        for rows in self._pending:
            np.subtract(rows, origin, out=centred[start : start + len(rows)])
            start += len(rows)
        return centred

    def _fold(self) -> None:
        if self._origin is None:
            self._origin = self._mean_of_pending()
            dimensions = len(self._origin)
            self._sums = np.zeros(dimensions)
            self._products = np.zeros((dimensions, dimensions), order="F")
        rows = self._pending_about(self._origin)
        self._count += len(rows)
        self._pending, self._pending_rows = [], 0
        if rows.shape[1] == 0:  # no spatial features, which BLAS does not take
            return
        self._sums += rows.sum(axis=0)
        # The lower triangle only, added in place: half the work of a product.
        self._products = scipy.linalg.blas.dsyrk(
            1.0, rows.T, beta=1.0, c=self._products, lower=1, overwrite_c=True
        )


def _mirror_upper(matrix: np.ndarray, side: int = 512) -> None:
    """Make a matrix symmetric in place, by its upper triangle."""
    for start in range(0, len(matrix), side):
        stop = start + side
        square = matrix[start:stop, start:stop]
        square[...] = np.triu(square) + np.triu(square, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def merged(gaussians: list[Gaussian]) -> Gaussian:
    """The Gaussian of several sets of samples together; each has a `count`."""
    if len(gaussians) == 1:
        return gaussians[0]
    total = sum(one.count for one in gaussians)
    mean = sum(one.mean * (one.count / total) for one in gaussians)
    parts = []
    for one in gaussians:
        # Rows of one set's spread about its own mean, and what that mean lies off the common one
        shift = (one.mean - mean) * np.sqrt(one.count / (total - 1))
        parts += [(one, (max(one.count - 1, 1)) / (total - 1)), (shift, 1.0)]
    if total <= gaussians[0].dimensions:
        rows = [np.sqrt(w) * p.rows if isinstance(p, Gaussian) else p[None] for p, w in parts]
        return Gaussian(mean, rows=np.concatenate(rows), count=total)
    covariance = np.zeros((len(mean), len(mean)))
    for part, weight in parts:
        own = part.full_covariance() if isinstance(part, Gaussian) else np.outer(part, part)
        covariance += weight * own
    return Gaussian(mean, covariance, count=total)


def gaussian_of(features: np.ndarray) -> Gaussian:
    """The Gaussian of the rows of `features` [N, D]."""
    moments = RunningMoments()
    block = max(1024, features.shape[1] + 1)
    for start in range(0, len(features), block):
        moments.add(features[start : start + block])
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) for covariances A and B.

    With A = R^T R and B = S^T S that last trace is the sum of the singular values of R S^T: it
    cannot come out complex, and singular covariances are no special case. `ValueError` if the
    dimensions differ or a value is not finite.
    """
    if a.dimensions != b.dimensions:
        raise ValueError(
            f"the two sets have features of {a.dimensions} and {b.dimensions} dimensions: they "
            "come from different graphs or image sizes"
        )
    if not (a.is_finite() and b.is_finite()):
        raise ValueError("a mean or covariance holds NaN or infinite values")
    shift = a.mean - b.mean
    total = shift @ shift + a.trace + b.trace
    distance = total - 2.0 * _trace_of_root(a, b, total)
    return max(float(distance), 0.0)  # rounding can leave -1e-14 of equal sets


def _trace_of_root(a: Gaussian, b: Gaussian, total: float) -> float:
    """tr((A B)^(1/2)), such that `total` minus twice that is right to 1e-9.

    For A = L L^T it is that of (L^T B L)^(1/2), the least work; where A is singular, or this not
    exact enough, the sum of the singular values of R S^T.
    """
    if b.covariance is not None and (lower := a.cholesky) is not None:
        product, status = scipy.linalg.lapack.dsygst(b.covariance, lower, itype=2, lower=1)
        if status:
            raise ValueError(f"dsygst refused its argument {-status}")
        squares = scipy.linalg.eigvalsh(
            product, lower=True, driver="ev", overwrite_a=True, check_finite=False
        )
        if (trace := _sum_of_roots(squares, total)) is not None:
            return trace
    return _sum_of_singular_values(a.root @ b.root.T, total)


def _sum_of_roots(squares: np.ndarray, total: float) -> float | None:
    """Sum of the roots of eigenvalues in rising order, None if it may not be right to 1e-9.

    An eigenvalue carries an error of some 1e-16 of the largest, its root s that over 2 s. A
    singular matrix has eigenvalues near zero, of which the roots would be roots of rounding
    errors, 1e-8.
    """
    roots = np.sqrt(np.maximum(squares, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.finfo(float).eps * squares[-1] * np.sum(0.5 / roots)
    return roots.sum() if error <= _TOLERANCE * (total - 2.0 * roots.sum()) else None


def _sum_of_singular_values(matrix: np.ndarray, total: float) -> float:
    """Sum of the singular values, such that `total` minus twice the sum is right to 1e-9.

    As roots of the eigenvalues of the smaller Gram matrix, which takes a quarter of the time,
    where these are exact enough; else as such.
    """
    if matrix.size == 0:  # a set without any spread
        return 0.0
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    total_of_roots = _sum_of_roots(np.linalg.eigvalsh(matrix @ matrix.T), total)
    if total_of_roots is not None:
        return total_of_roots
    return np.linalg.svd(matrix, compute_uv=False).sum()
