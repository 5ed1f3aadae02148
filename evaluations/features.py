"""From images to features: finding the graph, choosing an engine, streaming the images through."""

import contextlib
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from esddpm_io.atomic import write_json
from esddpm_io.download import download
from esddpm_io.errors import UserError, check_choice
from esddpm_io.files import open_binary, read_json, sha256
from esddpm_io.images import ImageSource
from esddpm_io.progress import Progress
from evaluations.graph_file import (
    IMAGES_NODE,
    LOGITS_NODE,
    POOL_NODE,
    SPATIAL_NODE,
    Graph,
    read_graph,
)
from evaluations.moments import Gaussian, RunningMoments
from evaluations.network_file import NetworkFile, is_network_file, read_network
from evaluations.resizing import CLEAN, PUBLISHED_RESIZE, RESIZES, ResizedEngine

GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = (
    f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
)
# Of the published file, as others have noted them; a download of our own is remembered besides
GRAPH_BYTES, GRAPH_MD5 = 95_673_916, "e6bb154e85f5d4331c22abcddb5dcf31"
PUBLISHED, UNVERIFIED, OTHER = "published", "unverified", "other"
SPATIAL_CHANNELS = 7  # of mixed_6/conv: 17 x 17 x 7 = 2023 numbers, about as many as the pool's
BACKENDS = ("auto", "tensorflow", "torch")
PRECISIONS = ("float32", "bfloat16", "float16")
Network = Graph | NetworkFile


class Engine(Protocol):
    """Runs the graph: uint8 [N, H, W, 3] -> pool and spatial outputs, float32 NHWC.

    Images that were resized before come as float32. A network without spatial features gives
    [N, 0] for these.
    """

    name: str

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Features:
    """What the metrics need of one set of N images.

    `pool` float32 [N, P] (kept, for neighbours), the Gaussians of pool and spatial features, and
    `spatial` float32 [N, S] only where it was asked for.
    """

    pool: np.ndarray
    pool_gaussian: Gaussian
    spatial_gaussian: Gaussian
    spatial: np.ndarray | None = None


def cached_graph_path() -> Path:
    """Where a downloaded graph is kept: in `ES_DDPM_CACHE`, else in `~/.cache/es-ddpm`."""
    cache = Path(os.environ.get("ES_DDPM_CACHE") or Path.home() / ".cache" / "es-ddpm")
    return cache / GRAPH_NAME


def find_graph(path: str | None = None) -> str:
    """The graph to use: `path`, else the published one from the working directory or the cache.

    The graph is downloaded into the cache (96 MB) if it is in neither place. `UserError` says
    where to put the file if that fails.
    """
    if found := path or published_graph():
        return found
    cached = cached_graph_path()
    try:
        download(GRAPH_URL, cached)
        remember_graph(cached)
    except UserError as error:
        raise UserError(
            f"{error}; the working directory or --inception_path will do as well"
        ) from error
    return str(cached)


def published_graph() -> str | None:
    """The published graph in the working directory or the cache; None if it is in neither."""
    places = GRAPH_NAME, str(cached_graph_path())
    return next((place for place in places if os.path.exists(place)), None)


def remember_graph(path: str | os.PathLike) -> None:
    """Note the SHA-256 of a graph that has just come from `GRAPH_URL`: it is the published one."""
    write_json(_known_graphs_path(), {GRAPH_NAME: sha256(path)})


def _known_graphs_path() -> Path:
    return cached_graph_path().with_name("known_graphs.json")


def graph_identity(graph: Network) -> str:
    """`PUBLISHED`, `UNVERIFIED` (its nodes, of other or unknown weights) or `OTHER`.

    The published graph is known by size and MD5, or by the SHA-256 of a download that
    `remember_graph` has noted.
    """
    if isinstance(graph, NetworkFile) or not graph.has_inception_nodes:
        return OTHER
    try:
        known = read_json(_known_graphs_path())
    except UserError as error:
        warnings.warn(f"{error}: it is left aside", stacklevel=1)  # of one place: told once
        known = None
    if isinstance(known, dict) and known.get(GRAPH_NAME) == graph.digest:
        return PUBLISHED
    with open_binary(graph.path, flag="--inception_path") as stream:
        if stream.seek(0, os.SEEK_END) != GRAPH_BYTES:
            return UNVERIFIED
        stream.seek(0)
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    return PUBLISHED if digest.hexdigest() == GRAPH_MD5 else UNVERIFIED


def load_graph(path: str | None = None) -> Network:
    """Read the graph and check that it has the nodes that the metrics are defined on.

    A .pt or .pt2 is described by its TOML, which is read in place of it.
    """
    path = find_graph(path)
    if is_network_file(path):
        return read_network(path)
    graph = read_graph(path)
    missing = [
        n for n in (IMAGES_NODE, POOL_NODE, SPATIAL_NODE, LOGITS_NODE) if n not in graph.nodes
    ]
    if missing:
        raise UserError(
            f"--inception_path: {path} has no node {', '.join(missing)}: it is not a feature graph "
            "that this evaluator can use"
        )
    try:
        has_weights = np.ndim(graph.softmax_weights) == 2
    except (IndexError, UserError):
        has_weights = False
    if not has_weights:
        raise UserError(f"--inception_path: {LOGITS_NODE} of {path} has no weights")
    return graph


def choose_engine(
    graph: Network,
    backend: str = "auto",
    precision: str = "float32",
    device: str = "auto",
    resize: str = PUBLISHED_RESIZE,
) -> Engine:
    """The engine for `backend`: `auto` is the one that can use a GPU, TensorFlow if both can.

    Where there is no GPU it is TensorFlow if that is installed, else torch. Lower precisions and
    the choice of a device are the torch engine's, so they choose it under `auto`. Its own `auto`
    device is CUDA where there is one. resize: one of `RESIZES`.
    """
    check_engine(backend, precision, device)
    check_choice("--resize", resize, RESIZES)
    graph.check(backend, precision, resize)
    if isinstance(graph, NetworkFile):
        _torch_backend()
        from evaluations.backend_network import NetworkEngine

        return NetworkEngine(graph, device)
    engine = _graph_engine(graph, backend, precision, device)
    return ResizedEngine(engine, graph.input_size) if resize == CLEAN else engine


def _graph_engine(graph: Graph, backend: str, precision: str, device: str) -> Engine:
    if backend == "auto":
        backend = _best_backend(precision, device)
    if backend == "torch":
        return _torch_backend().TorchEngine(graph, precision, device)
    from evaluations.backend_tensorflow import TensorFlowEngine

    return TensorFlowEngine(graph)


def check_engine(backend: str, precision: str, device: str) -> None:
    """`UserError` for choices that no engine can meet here; loads torch if a device is named."""
    check_choice("--backend", backend, BACKENDS)
    check_choice("--precision", precision, PRECISIONS)
    if backend == "tensorflow":
        if precision != "float32":
            raise UserError(
                f"--precision {precision} needs --backend torch: TensorFlow runs float32"
            )
        if device != "auto":
            raise UserError(f"--device {device} needs --backend torch: TensorFlow chooses its own")
    elif device != "auto":
        _torch_backend().check_device(device)


def _torch_backend():
    try:
        from evaluations import backend_torch
    except ImportError as error:
        raise UserError(
            f"--backend torch: PyTorch cannot be loaded ({error}); install it (pip install "
            "torch) or use --backend tensorflow"
        ) from error
    return backend_torch


def _best_backend(precision: str, device: str) -> str:
    plain = precision == "float32" and device == "auto"
    if not plain or importlib.util.find_spec("tensorflow") is None:
        return "torch"
    # TensorFlow is asked last: to load it takes seconds, and mostly it is the one without a GPU.
    return "torch" if cuda_devices() and not _tensorflow_has_gpu() else "tensorflow"


def cuda_devices() -> int:
    """How many GPUs PyTorch can use: 0 where it is not installed."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _tensorflow_has_gpu() -> bool:
    from evaluations.backend_tensorflow import has_gpu

    return has_gpu()


def extract(
    engine: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    source: ImageSource,
    *,
    name: str,
    batch_size: int = 64,
    keep_pool: bool = True,
    keep_spatial: bool = False,
    share: tuple[int, int] | None = None,
    tell: Callable[[int], object] | None = None,
) -> Features:
    """Features of the images of `source`, all or those from `share[0]` to `share[1]` - 1.

    engine: an `Engine`, or a function that calls one. `batch_size` images at a time are read, in
    the background while the network is busy. tell: is called with the number of images that are
    done more; without it their progress is shown.

    Memory: the pool features (and spatial ones) that are kept, and two covariances. `UserError`
    naming the image if a feature is NaN or infinite.
    """
    pool_moments, spatial_moments = RunningMoments(), RunningMoments()
    pools, spatials = [], []
    first, end = share or (0, len(source))
    with contextlib.ExitStack() as stack:
        if tell is None:
            progress = Progress(end - first, "images", f"features of {name}")
            tell = stack.enter_context(progress).update
        for start, images in read_ahead(source, first, end, batch_size):
            pool, spatial = features_of_batch(engine, images)
            check_finite(pool, spatial, start, name)
            pool_moments.add(pool)
            spatial_moments.add(spatial)
            if keep_pool:
                pools.append(pool)
            if keep_spatial:
                spatials.append(spatial)
            tell(len(images))
    return Features(
        pool=np.concatenate(pools) if keep_pool else np.empty((0, pool.shape[1]), np.float32),
        pool_gaussian=pool_moments.gaussian(),
        spatial_gaussian=spatial_moments.gaussian(),
        spatial=np.concatenate(spatials) if keep_spatial else None,
    )


def read_ahead(
    source: ImageSource, start: int, stop: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Batches uint8 [n, H, W, 3] and the index of their first image, read one ahead."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for first in range(start, stop, batch_size):
            batch = first, reader.submit(source.read, first, min(first + batch_size, stop))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = batch
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def features_of_batch(
    engine: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pool features [N, P] and spatial features [N, h * w * 7], float32, of uint8 [N, H, W, 3].

    `UserError` for a network whose outputs are not those of one image each.
    """
    pool, spatial = engine(images)
    for output in (pool, spatial):
        if output.ndim < 2 or len(output) != len(images):
            raise UserError(
                f"--inception_path: the network gives {list(output.shape)} for {len(images)} "
                "images, which are not features of each"
            )
    spatial = spatial[..., :SPATIAL_CHANNELS]
    return (
        np.ascontiguousarray(pool.reshape(len(pool), -1), np.float32),
        np.ascontiguousarray(spatial.reshape(len(spatial), -1), np.float32),
    )


def pool_features(engine: Engine, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Pool features float32 [N, P] of images in memory, uint8 [N, H, W, 3]; no progress is told."""
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([features_of_batch(engine, part)[0] for part in parts])


def check_finite(pool: np.ndarray, spatial: np.ndarray, start: int, name: str) -> None:
    """`UserError` for features [n, …] that are not finite; `start` is the first one's index."""
    finite = np.isfinite(pool).all(axis=1) & np.isfinite(spatial).all(axis=1)
    if not finite.all():
        index = start + int(np.argmin(finite))
        raise UserError(f"the features of image {index} of {name} are not finite (NaN or infinite)")
