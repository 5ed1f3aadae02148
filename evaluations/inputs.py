"""What is evaluated: images from a file, a folder or memory, and statistics given with them."""

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError
from esddpm_io.images import ImageSource, check_image_array, open_images
from esddpm_io.npz import NpzReader
from esddpm_io.parts import GrowingImages
from esddpm_io.progress import Progress
from evaluations.features import Features
from evaluations.moments import Gaussian
from evaluations.resizing import PUBLISHED_RESIZE

_HASH_ROWS = 256  # images read at a time to hash them


class ArrayImages(ImageSource):
    """Images that are in memory, uint8 [N, H, W, 3]."""

    has_labels = False

    def __init__(self, images: np.ndarray, *, flag: str):
        self.shape = check_image_array(images.shape, images.dtype, f"{flag}: the array")
        self._images = images

    def read(self, start: int, stop: int) -> np.ndarray:
        # PyTorch takes no negative strides, and warns of what cannot be written.
        return np.require(self._images[start:stop], requirements="CW")


Images = str | os.PathLike | np.ndarray


@dataclass(frozen=True)
class ImageSet:
    """Images, and the Gaussians of features that came with them (reference batches have them).

    `precision` is the arithmetic that those were computed in, `resize` how images were resized
    before; files that do not say are float32 and published. `network`: the digest of the network
    that they are of, None for files that do not say. `notes`: what a reader of figures must know.
    """

    name: str
    source: ImageSource
    pool_gaussian: Gaussian | None = None
    spatial_gaussian: Gaussian | None = None
    precision: str = "float32"
    resize: str = PUBLISHED_RESIZE
    network: str | None = None
    notes: tuple[str, ...] = ()
    images: Images | None = None  # what it was opened from, for another process to open
    flag: str = "SAMPLE"  # what errors call it

    @property
    def has_statistics(self) -> bool:
        return self.pool_gaussian is not None or self.spatial_gaussian is not None

    @property
    def has_both_gaussians(self) -> bool:
        return self.pool_gaussian is not None and self.spatial_gaussian is not None


def open_set(images: Images, *, flag: str, expect: int | None = None) -> ImageSet:
    """Open an .npz, an .npy, a folder, or an array in memory; `UserError` naming `flag` if bad.

    An .npz may hold `mu`, `sigma` (pool) and `mu_s`, `sigma_s` (spatial): they are used as they
    stand. expect: it is a folder of parts instead, which will hold so many images.
    """
    if expect is not None:
        if not isinstance(images, str | os.PathLike):
            raise UserError(f"{flag}: with --expect it is a folder, not an array")
        growing = GrowingImages(str(images), expect, flag=flag)
        return ImageSet(str(images), growing, images=images, flag=flag)
    if not isinstance(images, str | os.PathLike):
        images = _array(images, flag)
        source = ArrayImages(images, flag=flag)
        return ImageSet(f"array {list(images.shape)}", source, images=images, flag=flag)
    name = images = os.fspath(images)
    if "\0" in name:
        raise UserError(f"{flag}: {name!r} is no path")
    source = open_images(images, flag=flag)
    if not name.endswith(".npz"):
        return ImageSet(name, source, images=images, flag=flag)
    with NpzReader(images, flag=flag) as reader:
        pool = _given_gaussian(reader, "mu", "sigma", flag)
        spatial = _given_gaussian(reader, "mu_s", "sigma_s", flag)
        making = {
            field: str(reader.array(f"feature_{field}").reshape(-1)[0])
            for field in ("precision", "resize", "network")
            if f"feature_{field}" in reader.names
        }
    return ImageSet(name, source, pool, spatial, images=images, flag=flag, **making)


def _array(images: object, flag: str) -> np.ndarray:
    """A NumPy array, or what can be seen as one, such as a tensor on the CPU."""
    if not hasattr(images, "__array__"):
        raise UserError(
            f"{flag} is a {type(images).__name__}: give a path or a uint8 array [N, H, W, 3]"
        )
    try:
        return np.asarray(images)
    except (TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{flag} cannot be seen as a NumPy array: {error}") from error


def _given_gaussian(reader: NpzReader, mean: str, covariance: str, flag: str) -> Gaussian | None:
    present = [name for name in (mean, covariance) if name in reader.names]
    if not present:
        return None
    mu, sigma = reader.array(mean), reader.array(covariance)
    where = f"{flag}: {mean} and {covariance} of {reader.path}"
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(f"{where} are {mu.dtype} and {sigma.dtype}, they must be floats")
    if mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape):
        raise UserError(
            f"{where} have shapes {list(mu.shape)} and {list(sigma.shape)}, [D] and [D, D] expected"
        )
    gaussian = Gaussian(mu.astype(np.float64), sigma.astype(np.float64))
    if not gaussian.is_finite():
        raise UserError(f"{where} hold NaN or infinite values")
    if not gaussian.has_covariance():
        raise UserError(f"{where}: {covariance} is no covariance (symmetric, nowhere negative)")
    return gaussian


class FeatureCache:
    """Features on disk by the content of the images, the graph and the way it was run.

    One .npz a set of images. A file that cannot be read is warned of and made anew.
    """

    def __init__(self, folder: str | os.PathLike, settings: str):
        self._folder = Path(folder)
        self._settings = settings

    def path(self, source: ImageSource, keep_spatial: bool, name: str) -> Path:
        """Where the features of `source`, called `name`, are or will be; reads every pixel."""
        digest = hashlib.sha256(f"{self._settings} {source.shape}".encode())
        with Progress(len(source), "images", f"looking for {name} in the cache") as progress:
            for start in range(0, len(source), _HASH_ROWS):
                images = source.read(start, min(start + _HASH_ROWS, len(source)))
                digest.update(np.ascontiguousarray(images))
                progress.update(len(images))
        kind = "features-spatial" if keep_spatial else "features"
        return self._folder / f"{kind}-{digest.hexdigest()[:32]}.npz"

    @staticmethod
    def load(path: Path, count: int, dimensions: int) -> Features | None:
        """The features of `count` images, `dimensions` of the pool, or None if they are not there.

        What does not fit these numbers, or itself, is as if it were not there.
        """
        if not path.exists():
            return None
        problem: object = f"--cache_dir: {path} holds other numbers than it should"
        try:
            with NpzReader(path, flag="--cache_dir") as reader:
                features = Features(
                    reader.array("pool"),
                    _read_gaussian(reader, "pool"),
                    _read_gaussian(reader, "spatial"),
                    reader.array("spatial") if "spatial" in reader.names else None,
                )
                if _is_sound(features, count, dimensions):
                    return features
        except UserError as error:
            problem = error
        except (TypeError, ValueError, OverflowError):
            pass  # what arrays of odd shapes or types run into
        warnings.warn(f"cached features are made anew: {problem}", stacklevel=2)
        return None

    @staticmethod
    def save(path: Path, features: Features) -> None:
        arrays = {"pool": features.pool}
        if features.spatial is not None:
            arrays["spatial"] = features.spatial
        for name in ("pool", "spatial"):
            gaussian = getattr(features, f"{name}_gaussian")
            for field in ("mean", "covariance", "rows", "count"):
                value = getattr(gaussian, field)
                if value is not None:
                    arrays[f"{name}_{field}"] = np.asarray(value)
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)


def _read_gaussian(reader: NpzReader, name: str) -> Gaussian:
    fields = {
        field: reader.array(f"{name}_{field}")
        for field in ("covariance", "rows")
        if f"{name}_{field}" in reader.names
    }
    count = int(reader.array(f"{name}_count"))
    return Gaussian(reader.array(f"{name}_mean"), count=count, **fields)


def _is_sound(features: Features, count: int, dimensions: int) -> bool:
    """Whether features read from a file are of so many images, finite, and fit their moments."""
    pool, spatial = features.pool, features.spatial
    gaussians = features.pool_gaussian, features.spatial_gaussian
    sound = pool.shape == (count, dimensions) == (len(pool), features.pool_gaussian.dimensions)
    if spatial is not None:
        sound = sound and spatial.shape == (count, features.spatial_gaussian.dimensions)
        sound = sound and bool(np.isfinite(spatial).all())
    return (
        sound
        and all(one.count == count and _has_shape(one) and one.is_finite() for one in gaussians)
        and np.allclose(pool.mean(axis=0, dtype=np.float64), gaussians[0].mean, rtol=1e-6)
    )


def _has_shape(gaussian: Gaussian) -> bool:
    width = gaussian.dimensions
    if gaussian.rows is None:
        covariance = gaussian.covariance
        return covariance is not None and covariance.shape == (width, width)
    # Those of sets that were merged have a row more for each.
    return gaussian.rows.shape[1:] == (width,) and len(gaussian.rows) >= gaussian.count
