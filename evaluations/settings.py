"""Everything but the images that decides the figures."""

import contextlib
import dataclasses
from dataclasses import dataclass

from esddpm_io.errors import UserError, check_choice, check_known, of_type
from esddpm_io.files import is_blob
from evaluations.neighbours import ARITHMETICS
from evaluations.network_file import is_network_file
from evaluations.resizing import PUBLISHED_RESIZE, RESIZES
from evaluations.scoring import METRICS


@dataclass(frozen=True)
class Settings:
    """The keywords of `evaluate`.

    metrics: names of `METRICS`, or `published` or `all` for those of these that network and files
    allow. resize: `published`, by the graph itself, or `clean`, antialiased. neighbour_arithmetic:
    `float16`, the published rounding of distances for precision and recall, or `float32`; None is
    the first for a frozen graph, and the second for other networks, whose features may be small.
    bootstrap: groups of samples that are left out in turn for 95 % confidence intervals, 0 for
    none. allow_mixed_precision: let features of another precision meet the reference's statistics.
    devices: a process on each of several, as in `cpu,cpu` or `0,1`, in place of `device`.
    expect: samples are folders of parts that are still being written, of so many images in all.
    """

    inception_path: str | None = None
    backend: str = "auto"
    device: str = "auto"
    devices: str | None = None
    precision: str = "float32"
    resize: str = PUBLISHED_RESIZE
    metrics: tuple[str, ...] = ("published",)
    neighbour_arithmetic: str | None = None
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    bootstrap: int = 0
    seed: int = 0
    batch_size: int = 64
    cache_dir: str | None = None
    allow_mixed_precision: bool = False
    expect: int | None = None

    @classmethod
    def of(cls, keywords: dict[str, object]) -> "Settings":
        """The settings of a call; `UserError` for a keyword that there is not."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_known("unknown setting", keywords, known)
        return cls(**keywords)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, self._of_its_type(field))  # frozen, but not yet
        metrics = self.metrics
        choices = (*METRICS, "published", "all")
        unknown = [
            str(name) for name in metrics if not isinstance(name, str) or name not in choices
        ]
        if unknown or not metrics:
            raise UserError(
                f"--metrics {', '.join(unknown) or '(none)'}: choose from {', '.join(choices)}",
                got=unknown,
                valid=choices,
            )
        check_choice("--resize", self.resize, RESIZES)
        if self.neighbour_arithmetic is None:
            other = is_network_file(self.inception_path or "")
            object.__setattr__(self, "neighbour_arithmetic", "float32" if other else "float16")
        check_choice("--neighbour_arithmetic", self.neighbour_arithmetic, ARITHMETICS)
        for name in ("inception_path", "cache_dir"):
            if getattr(self, name) == "":
                raise UserError(f"--{name} is empty: name a path, or leave it out")
        if self.cache_dir is not None and is_blob(self.cache_dir):
            raise UserError(f"--cache_dir {self.cache_dir}: name a folder, not a blob store")
        for name, least in [
            ("batch_size", 1),
            ("bootstrap", 0),
            ("seed", 0),
            ("kid_subsets", 1),
            ("kid_subset_size", 2),
        ]:
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}")
        if self.devices is not None and (self.device != "auto" or self.backend == "tensorflow"):
            raise UserError("--devices goes with neither --device nor --backend tensorflow")
        if self.devices is not None and not self.device_list:
            raise UserError("--devices: name one or more, as in 0,1 or cpu,cpu")
        if self.expect is not None and (self.expect < 1 or self.devices is not None):
            raise UserError("--expect: a number of images, without --devices")
        if self.bootstrap == 1:
            raise UserError("--bootstrap 1: an interval takes 2 groups or more, or 0 for none")

    def _of_its_type(self, field: dataclasses.Field) -> object:
        """What a field was given, as its type has it; `UserError` for what is of another."""
        value = getattr(self, field.name)
        if field.name == "metrics":  # one name, or several of whatever gives them in turn
            if isinstance(value, str):
                return (value,)
            with contextlib.suppress(TypeError):
                return tuple(value)
            raise UserError(f"--metrics {value!r}: it must be a name, or several")
        return of_type(f"--{field.name}", value, field.type)

    @property
    def device_list(self) -> list[str]:
        """`devices` one by one, where a number is a CUDA device's; empty without."""
        names = [name.strip() for name in (self.devices or "").split(",")]
        return [f"cuda:{name}" if name.isdigit() else name for name in names if name]
