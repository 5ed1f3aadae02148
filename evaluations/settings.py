"""What decides the figures beside the images."""

from dataclasses import dataclass

from esddpm_io.errors import UserError
from evaluations.neighbours import ARITHMETICS

PUBLISHED_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")
ALL_METRICS = (*PUBLISHED_METRICS, "kid", "density", "coverage")


@dataclass(frozen=True)
class Settings:
    """Everything but the images that decides the figures.

    metrics: of `ALL_METRICS`. neighbour_arithmetic: `float16`, the published rounding of distances
    for precision and recall, or `float32`. bootstrap: repeats for 95 % confidence intervals, 0 for
    none. allow_mixed_precision: let features of another precision meet the reference's statistics.
    """

    inception_path: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "float32"
    metrics: tuple[str, ...] = PUBLISHED_METRICS
    neighbour_arithmetic: str = "float16"
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    bootstrap: int = 0
    seed: int = 0
    batch_size: int = 64
    cache_dir: str | None = None
    allow_mixed_precision: bool = False

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in ALL_METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"--metrics {', '.join(unknown) or '(none)'}: choose from {', '.join(ALL_METRICS)}"
            )
        if self.neighbour_arithmetic not in ARITHMETICS:
            raise UserError(
                f"--neighbour_arithmetic {self.neighbour_arithmetic}: choose from "
                f"{', '.join(ARITHMETICS)}"
            )
        for name, least in [("batch_size", 1), ("bootstrap", 0), ("seed", 0), ("kid_subsets", 1)]:
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}")
        if self.kid_subset_size < 2:
            raise UserError(f"--kid_subset_size {self.kid_subset_size}: it must be at least 2")
