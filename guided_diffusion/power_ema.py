"""Averages of weights whose width is chosen after training.

Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3: an average over all steps so far with
weights in proportion to step^gamma keeps a width of the same share of the run, `sigma_rel`, however
long the run is. Two of them, saved now and then, span the averages of other widths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# gamma = 0, all steps alike; wider profiles would fall with the step.
WIDEST = 12**-0.5


class Profile(NamedTuple):
    """The average with weights in proportion to step^gamma up to `step`."""

    step: int
    gamma: float


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has this standard deviation, in units of the run (eq. 3).

    ValueError outside 0 < sigma_rel <= 0.288.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"power_ema must be widths above 0 and up to 0.288, not {sigma_rel}")
    # sigma_rel² (gamma + 2)² (gamma + 3) = gamma + 1 has one root that is not negative.
    square = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-6].max()))


def kept_share(step: int, gamma: float) -> float:
    """How much of the average stays when the weights of `step` (1, 2 …) come in (eq. 2)."""
    return (1 - 1 / step) ** (gamma + 1)


def widths(text: str) -> list[float]:
    """The widths of a comma list; ValueError, naming power_ema, for others than `gamma_of` has."""
    try:
        found = [float(width) for width in text.split(",") if width]
    except ValueError:
        raise ValueError(f'power_ema must be a comma list of widths, not "{text}"') from None
    for width in found:
        gamma_of(width)
    return found


def mixture(saved: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Factors [len(saved)], 1 in all, with which saved averages add up to the wanted one.

    The least squares of the profiles as functions of the step (section 3.2 and appendix C).
    """
    n = len(saved)
    products = np.ones((n + 1, n + 1))
    products[:n, :n] = [[_product(a, b) for b in saved] for a in saved]
    products[:n, :n] *= wanted.step  # near 1, as the last row is, which holds the sum
    products[n, n] = 0
    aims = np.array([*(_product(a, wanted) * wanted.step for a in saved), 1.0])
    return np.linalg.lstsq(products, aims, rcond=None)[0][:n]


def _product(a: Profile, b: Profile) -> float:
    """Integral over the steps of the product of two profiles, each of which adds up to 1."""
    short, long = sorted((a, b))
    shrink = (short.step / long.step) ** long.gamma
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * shrink / long.step
