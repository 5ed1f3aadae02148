"""Features by several processes, from shares of the images that are merged.

Either we start one on each device (`--devices`), or torchrun, mpiexec or srun has started several.
"""

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.images import ImageSource, open_images
from esddpm_io.launch import Launch
from esddpm_io.processes import watch_parent
from esddpm_io.progress import Progress
from evaluations.features import (
    Engine,
    Features,
    choose_engine,
    cuda_devices,
    extract,
    load_graph,
)
from evaluations.inputs import FeatureCache, Images, open_set
from evaluations.moments import merged

_READ_ROWS = 256
_MOST_IMAGES = 8192  # of a share: what a process that is killed loses
Share = tuple[int, int]  # first image and the one after the last


def shares_of(count: int, devices: int, batch_size: int) -> list[Share]:
    """The images 0 … count-1 in shares of whole batches, the same for the same arguments.

    Batches are those of one process, so that the network sees the same arrays.
    """
    images = min(math.ceil(count / devices), _MOST_IMAGES)
    step = math.ceil(images / batch_size) * batch_size
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def extract_on_devices(
    images: Images,
    devices: list[str],
    engine: dict[str, str],
    *,
    count: int,
    dimensions: int,
    name: str,
    batch_size: int,
    keep_spatial: bool,
    store: Path | None,
) -> Features:
    """Features of `count` images as `extract` gives them, by one process a device.

    `engine` has the `path` of the graph, `backend`, `precision` and `resize`. With `store`, the
    name of a file of the feature cache, every share is kept beside it when it is done, and taken
    from there by a run that starts again. `UserError` as `extract`, or if a process dies.
    """
    shares = shares_of(count, len(devices), batch_size)
    paths = {} if store is None else _paths(store, shares)
    done = {
        share: features
        for share, path in paths.items()
        if (features := FeatureCache.load(path, share[1] - share[0], dimensions)) is not None
    }
    waiting: queue.SimpleQueue[Share] = queue.SimpleQueue()
    for share in shares:
        if share not in done:
            waiting.put(share)
    lock = threading.Lock()
    kept = sum(stop - start for start, stop in done)
    note = f", {kept} of them stored by an earlier run" if kept else ""
    with Progress(count, "images", f"features of {name}{note}") as progress:
        progress.update(kept)

        def keep(share: Share, features: Features) -> None:
            if store is not None:
                FeatureCache.save(paths[share], features)
            with lock:
                done[share] = features
                progress.update(share[1] - share[0])

        arguments = images, engine, name, batch_size, keep_spatial
        # Whoever has named the file of the cache has read all of the set.
        unread = images if store is None else None
        _work_through(waiting, devices[: waiting.qsize()], arguments, keep, unread)
    return merge([done[share] for share in shares])


def extract_among_ranks(
    engine: Engine,
    source: ImageSource,
    launch: Launch,
    *,
    store: Path,
    dimensions: int,
    **options,
) -> Features | None:
    """One process's part in the features of `source`; the first process gets all of them.

    Every process that a launcher started calls this with the same arguments, `options` those of
    `extract`. They meet in `store`, the name of a file of the feature cache beside which each puts
    the shares that it has done. Nobody waits: after its own shares a process does whatever is
    missing of others', and lets go of one as soon as another has stored it. So the end of a process
    costs time only, and a run that starts again goes on from the shares there are.
    """
    shares = shares_of(len(source), launch.world_size, options["batch_size"])
    paths = _paths(store, shares)
    own = shares[launch.rank :: launch.world_size]
    for share in own + [share for share in reversed(shares) if share not in own]:
        if not (paths[share].exists() or store.exists()):
            with contextlib.suppress(_DoneElsewhere):
                _extract_share(engine, source, share, paths[share], store, options)
    if launch.rank > 0:
        return None
    parts = []
    for share in shares:
        size = share[1] - share[0]
        stored = FeatureCache.load(paths[share], size, dimensions)
        parts.append(stored or extract(engine, source, share=share, **options))
    return merge(parts)


def device_of_rank(device: str, backend: str, launch: Launch) -> str:
    """What `device` is to one process of several: `auto` shares out the GPUs that PyTorch can use.

    So the backend `auto` becomes PyTorch where there are such: TensorFlow's processes would all
    take the first one. Without any, or without PyTorch, `auto` is left to whoever runs the network.
    """
    if device != "auto" or backend == "tensorflow" or launch.world_size == 1:
        return device
    count = cuda_devices()
    return f"cuda:{launch.local_rank % count}" if count else device


class _DoneElsewhere(Exception):
    """Another process has stored the share that this one is at."""


def _extract_share(
    engine: Engine, source: ImageSource, share: Share, path: Path, store: Path, options: dict
) -> None:
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # In this order: shares are removed when the whole has been stored.
        if path.exists() or store.exists():
            raise _DoneElsewhere
        return engine(images)

    options = {**options, "name": f"{options['name']}, from {share[0]} on"}
    FeatureCache.save(path, extract(run, source, share=share, **options))
    if store.exists():
        path.unlink(missing_ok=True)


def _paths(store: Path, shares: list[Share]) -> dict[Share, Path]:
    """Where the shares of the set of `store` are kept."""
    return {share: store.with_stem(f"{store.stem}-{share[0]}-{share[1]}") for share in shares}


def merge(parts: list[Features]) -> Features:
    """The features of sets that follow one another, as those of one set."""
    spatial = None if parts[0].spatial is None else np.concatenate([p.spatial for p in parts])
    return Features(
        np.concatenate([part.pool for part in parts]),
        merged([part.pool_gaussian for part in parts]),
        merged([part.spatial_gaussian for part in parts]),
        spatial,
    )


def _work_through(
    waiting: queue.SimpleQueue,
    devices: list[str],
    arguments: tuple,
    keep: Callable[[Share, Features], None],
    unread: Images | None,
) -> None:
    """One process a device and one thread that hands shares to it; the first error is raised.

    Beside them the set `unread` is read by one thread from its first byte to its last.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(len(devices) + 1))
        futures = [threads.submit(_check_sum, unread)]
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, device, *arguments), daemon=True)
            process.start()
            # Ended before the threads are waited for, which an ended process lets go.
            stack.callback(process.terminate)
            theirs.close()
            futures.append(threads.submit(_hand_out, waiting, ours, device, keep))
        for future in futures:
            future.result()


def _check_sum(images: Images | None) -> None:
    """Have the CRC-32 of an .npz checked, of which each process sees a part only."""
    if isinstance(images, str | os.PathLike) and str(images).endswith(".npz"):
        source = open_images(images, flag="SAMPLE")
        for start in range(0, len(source), _READ_ROWS):
            source.read(start, min(start + _READ_ROWS, len(source)))


def _hand_out(
    waiting: queue.SimpleQueue, connection: Connection, device: str, keep: Callable
) -> None:
    with connection:
        while True:
            try:
                share = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                connection.send(share)
                answer = connection.recv()
            except (EOFError, OSError) as error:
                raise UserError(f"--devices: the process on {device} has died") from error
            if isinstance(answer, Exception):
                raise answer
            keep(share, answer)


def _serve(
    connection: Connection,
    device: str,
    images: Images,
    engine: dict[str, str],
    name: str,
    batch_size: int,
    keep_spatial: bool,
) -> None:
    """The process of one device: shares in, features out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends us
    watch_parent(multiprocessing.parent_process().pid, lambda: os._exit(1))
    with contextlib.suppress(EOFError, OSError):
        share = connection.recv()
        try:
            graph = load_graph(engine["path"])
            run = choose_engine(
                graph, engine["backend"], engine["precision"], device, engine["resize"]
            )
            source = open_set(images, flag="SAMPLE").source
            while True:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                    features = extract(
                        run,
                        source,
                        name=name,
                        batch_size=batch_size,
                        keep_spatial=keep_spatial,
                        share=share,
                    )
                connection.send(features)
                share = connection.recv()
        except UserError as error:
            connection.send(error)
