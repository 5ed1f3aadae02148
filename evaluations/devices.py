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
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.images import ImageSource, open_images
from esddpm_io.launch import Launch
from esddpm_io.processes import watch_parent
from esddpm_io.progress import Progress, quiet
from evaluations.features import Engine, Features, choose_engine, cuda_devices, extract, load_graph
from evaluations.inputs import ArrayImages, FeatureCache, ImageSet, open_set
from evaluations.moments import merged

_READ_ROWS = 256
_MOST_IMAGES = 8192  # of a share: what a process that is killed loses
Share = tuple[int, int]  # first image and the one after the last


def shares_of(count: int, devices: int, batch_size: int) -> list[Share]:
    """The images 0 … count-1 in shares of whole batches, the same for the same arguments.

    Batches are those of one process, so that the network sees the same arrays.
    """
    images = min(math.ceil(count / devices), _MOST_IMAGES)
    step = -(-images // batch_size) * batch_size
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def extract_on_devices(
    image_set: ImageSet,
    devices: list[str],
    engine: dict[str, str],
    *,
    dimensions: int,
    name: str,
    batch_size: int,
    keep_spatial: bool,
    store: Path | None,
    stamp: str | None,
) -> Features:
    """Features of a set as `extract` gives them, by one process a device.

    stamp: what `stamp_of` gave for the set as it has been checked. Every process opens it anew.
    `engine` has the `path` of the graph, `backend`, `precision` and `resize`. With `store`, the
    name of a file of the feature cache, every share is kept beside it when it is done, and taken
    from there by a run that starts again. `UserError` as `extract`, or if a process dies or finds
    other files.
    """
    count = len(image_set.source)
    shares = shares_of(count, len(devices), batch_size)
    paths = {} if store is None else _paths(store, shares)
    done = {
        share: features
        for share, path in paths.items()
        if (features := FeatureCache.load(path, _size(share), dimensions)) is not None
    }
    waiting: queue.SimpleQueue[Share] = queue.SimpleQueue()
    for share in shares:
        if share not in done:
            waiting.put(share)
    lock = threading.Lock()
    kept, note = _stored_before(done)
    with Progress(count, "images", f"features of {name}{note}", done=kept) as progress:

        def keep(share: Share, features: Features) -> None:
            if store is not None:
                FeatureCache.save(paths[share], features)
            with lock:
                done[share] = features
                progress.update(_size(share))

        arguments = image_set.images, image_set.flag, stamp, engine, name, batch_size, keep_spatial
        # Whoever has named the file of the cache has read all of the set.
        unread = image_set if store is None else None
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
    `extract`; a process alone is the first of one. They meet in `store`, the name of a file of the
    feature cache beside which each puts the shares that it has done. Nobody waits: after its own
    shares a process does whatever is missing of others', and lets go of one as soon as another has
    stored it. So the end of a process costs time only, and a run that starts again goes on from
    the shares there are.
    """
    shares = shares_of(len(source), launch.world_size, options["batch_size"])
    if len(shares) == launch.world_size == 1:
        return extract(engine, source, **options)
    paths = _paths(store, shares)
    own = shares[launch.rank :: launch.world_size]
    stored = {share for share in shares if paths[share].exists()}
    kept, note = _stored_before(stored)
    what = f"features of {options['name']}{note}"
    with Progress(len(source), "images", what, done=kept) as progress:
        for share in own + [share for share in reversed(shares) if share not in own]:
            if share not in stored:
                _extract_share(engine, source, share, paths[share], store, options, progress)
    if launch.rank > 0:
        return None
    # Another run has stored the whole in the meantime, and removed the shares.
    if (whole := FeatureCache.load(store, len(source), dimensions)) is not None:
        return whole
    return merge(
        FeatureCache.load(paths[share], _size(share), dimensions)
        or extract(engine, source, share=share, **options)
        for share in shares
    )


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
    engine: Engine,
    source: ImageSource,
    share: Share,
    path: Path,
    store: Path,
    options: dict,
    progress: Progress,
) -> None:
    """Store the features of a share, unless they are there before we are through."""
    left = _size(share)

    def tell(images: int) -> None:
        nonlocal left
        left -= images
        progress.update(images)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # In this order: shares are removed when the whole has been stored.
        if path.exists() or store.exists():
            raise _DoneElsewhere
        return engine(images)

    if not (path.exists() or store.exists()):
        with contextlib.suppress(_DoneElsewhere):
            FeatureCache.save(path, extract(run, source, share=share, tell=tell, **options))
            if store.exists():
                path.unlink(missing_ok=True)
    if left:  # another process has done these
        progress.update(left)


def _paths(store: Path, shares: list[Share]) -> dict[Share, Path]:
    """Where the shares of the set of `store` are kept."""
    return {share: store.with_stem(f"{store.stem}-{share[0]}-{share[1]}") for share in shares}


def _size(share: Share) -> int:
    return share[1] - share[0]


def _stored_before(shares: Iterable[Share]) -> tuple[int, str]:
    """How many images those are, and what the progress says of them."""
    count = sum(map(_size, shares))
    return count, f", {count} of them stored already" if count else ""


def merge(parts: Iterable[Features]) -> Features:
    """The features of sets that follow one another, as those of one set.

    Of the parts' covariances two are in memory at a time, where they are read one by one.
    """
    pools, spatials, gaussians = [], [], None
    for part in parts:
        pools.append(part.pool)
        spatials.append(part.spatial)
        own = [part.pool_gaussian, part.spatial_gaussian]
        gaussians = (
            own
            if gaussians is None
            else [merged(pair) for pair in zip(gaussians, own, strict=True)]
        )
    return Features(
        np.concatenate(pools),
        *gaussians,
        None if spatials[0] is None else np.concatenate(spatials),
    )


def stamp_of(source: ImageSource) -> str | None:
    """What changes whenever the files of a set do; None for one in memory."""
    return None if isinstance(source, ArrayImages) else source.stamp() or source.fingerprint()


def _work_through(
    waiting: queue.SimpleQueue,
    devices: list[str],
    arguments: tuple,
    keep: Callable[[Share, Features], None],
    unread: ImageSet | None,
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
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            # Ended before the threads are waited for, which an ended process lets go.
            stack.callback(process.terminate)
            theirs.close()
            futures.append(threads.submit(_hand_out, waiting, ours, (device, *arguments), keep))
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()


def _check_sum(image_set: ImageSet | None) -> None:
    """Have the CRC-32 of an .npz checked, of which each process sees a part only."""
    if image_set is not None and image_set.name.endswith(".npz"):
        source = open_images(image_set.images, flag=image_set.flag)
        for start in range(0, len(source), _READ_ROWS):
            source.read(start, min(start + _READ_ROWS, len(source)))


def _hand_out(
    waiting: queue.SimpleQueue, connection: Connection, arguments: tuple, keep: Callable
) -> None:
    """`arguments` to the process, and shares until there are no more, or an error is its answer."""
    try:
        with connection:
            # Not with its start, which waits for ever for one that dies before it has read all.
            connection.send(arguments)
            while True:
                try:
                    share = waiting.get_nowait()
                except queue.Empty:
                    return
                connection.send(share)
                answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                keep(share, answer)
    except (EOFError, ConnectionError) as error:
        raise UserError(
            f"--devices: the process on {arguments[0]} has died: for want of memory, or of a guard "
            "by `__name__` in the script that calls this"
        ) from error


def _serve(connection: Connection) -> None:
    """The process of one device: shares in, features out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends us
    watch_parent(multiprocessing.parent_process().pid, lambda: os._exit(1))
    # The first process shows the progress, and has warned of what this one would warn of again.
    with (
        contextlib.suppress(EOFError, OSError),
        quiet(),
        warnings.catch_warnings(action="ignore"),
    ):
        device, images, flag, stamp, engine, name, batch_size, keep_spatial = connection.recv()
        share = connection.recv()
        try:
            graph = load_graph(engine["path"])
            run = choose_engine(
                graph, engine["backend"], engine["precision"], device, engine["resize"]
            )
            source = open_set(images, flag=flag).source
            if stamp_of(source) != stamp:
                raise UserError(f"{flag}: {images} has changed since it was checked")
            options = {"name": name, "batch_size": batch_size, "keep_spatial": keep_spatial}
            while True:
                connection.send(extract(run, source, share=share, **options))
                share = connection.recv()
        except UserError as error:
            connection.send(error)
        except OSError as error:
            connection.send(UserError(f"{flag}: {name}: {error}"))
