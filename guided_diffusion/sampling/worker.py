"""The loop of one process: claim a chunk, sample it, store it, until none is missing."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from esddpm_io.errors import terminate_cleanly
from esddpm_io.files import exists
from esddpm_io.progress import Progress
from guided_diffusion.sampling import outputs
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import LAUNCHER_VARIABLE, Claims, Heart
from guided_diffusion.sampling.settings import Job, read_job

_POLL_S = 0.5  # between two looks at chunks that other processes are at


def main(argv: list[str] | None = None, *, guided: bool) -> None:
    """The command line of a sampling script: parse, sample, export."""
    terminate_cleanly()
    _stop_with_launcher()
    job = read_job(argv, guided=guided)
    with telling_how_to_continue(job, shlex.join([sys.executable, *sys.argv])):
        run(job)


@contextlib.contextmanager
def telling_how_to_continue(job: Job, command: str) -> Iterator[None]:
    """Print the command that goes on when Ctrl-C or SIGTERM ends the block.

    Once for all processes that one launcher has started; ours tells its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        is_first = job.rank == 0 or not job.any_chunk
        if is_first and LAUNCHER_VARIABLE not in os.environ:
            print(f"what is finished stays; continue with\n  {command}", file=sys.stderr)
        raise


def run(job: Job, log: Callable[[str], None] = print) -> None:
    """Sample what is missing of the job's folder (or of this rank's block of it).

    Returns when all of it is finished, by this process or another; then writes the files that
    the job asks for. Raises UserError for a folder of other settings, a checkpoint that does not
    fit, and samples that are not finite.
    """
    folder = ChunkFolder.open(job.save_dir, job.settings, job.info, job.chunk_size)
    log(f"rank {job.rank} of {job.world_size}: {folder.num_samples} samples in {job.save_dir}")
    for remark in job.info["flags"]:
        log(remark)
    log(_describe_chain(job))
    with Heart(folder.folder, rank=job.rank, device=job.device or "auto") as heart:
        Worker(job, folder, heart, log).run()
        if job.save_numpy_array or job.save_png_files:
            Exporter(job, folder, heart, log).run()


class Worker:
    """One process's work on a folder of chunks."""

    def __init__(self, job: Job, folder: ChunkFolder, heart: Heart, log: Callable[[str], None]):
        self._job, self._folder, self._heart, self._log = job, folder, heart, log
        self._claims = Claims(folder.folder, heart.worker_id)
        self._batch_size = job.batch_size
        self._images_done = 0
        self._sampler = None
        own = folder.chunks_of(*job.block)
        wanted = range(len(folder)) if job.any_chunk else own
        # Own chunks first, then on through the others' from there.
        self._order = [*wanted[own.start - wanted.start :], *wanted[: own.start - wanted.start]]

    def run(self) -> None:
        """Work until no wanted chunk is missing."""
        missing = self._missing()
        total = left = self._count(missing)
        with Progress(total, "images", "sampling") as self._progress:
            while missing:
                chunk = next((c for c in missing if self._claims.take(c)), None)
                if chunk is None:
                    self._heart.tell(state="waiting", chunk=None)
                    time.sleep(_POLL_S)
                else:
                    self._finish(chunk)
                missing = self._missing()
                left, before = self._count(missing), left
                self._progress.update(before - left)

    def _missing(self) -> list[int]:
        missing = set(self._folder.missing())
        return [chunk for chunk in self._order if chunk in missing]

    def _count(self, chunks: list[int]) -> int:
        return sum(stop - start for start, stop in map(self._folder.bounds, chunks))

    def _finish(self, chunk: int) -> None:
        """Sample a claimed chunk and store it, unless its last owner got that far."""
        try:
            if self._folder.is_done(chunk):
                return
            if self._sampler is None:
                self._load()
            images, labels = self._sample(chunk)
            self._folder.write(chunk, images, labels)
            self._images_done += len(images)
        finally:
            self._claims.release(chunk)

    def _load(self) -> None:
        self._heart.tell(state="loading")
        # Only now, for a process that finds nothing to do needs no models.
        from guided_diffusion.sampling.sampler import Sampler

        self._sampler = Sampler(self._job, self._log)
        self._log(f"sampling on {self._sampler.device}, {self._batch_size} images a step")
        self._heart.set(device=str(self._sampler.device))
        self._started = time.monotonic()

    def _sample(self, chunk: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The chunk's images and labels, in batches that fit into the device's memory."""
        from guided_diffusion.sampling.sampler import is_out_of_memory

        start, stop = self._folder.bounds(chunk)
        self._heart.tell(state="sampling", chunk=chunk, indices=[start, stop])
        batches = []
        position = start
        while position < stop:
            end = min(position + self._batch_size, stop)
            try:
                report = self._reporter(position - start, end - position)
                batches.append(self._sampler.sample(position, end, report))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or end - position == 1:
                    raise
                self._halve(end - position, error)
                continue
            position = end
        images = np.concatenate([images for images, _ in batches])
        labels = [labels for _, labels in batches]
        return images, None if labels[0] is None else np.concatenate(labels)

    def _halve(self, size: int, error: BaseException) -> None:
        """Halve the batch for good after one of `size` images did not fit."""
        self._batch_size = size // 2
        reason = str(error).strip().split("\n")[0]
        self._log(f"out of memory with {size} images a step ({reason}): going on with {size // 2}")
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        self._sampler.free_memory()

    def _reporter(self, before: int, size: int) -> Callable[[int], None]:
        """What the sampler calls after each step of a batch of `size`, `before` into the chunk."""
        steps = self._sampler.steps

        def report(done: int) -> None:
            images = self._images_done + before + size * done / steps
            rate = images / (time.monotonic() - self._started)
            self._heart.set(step=done, steps=steps, images=images, rate=rate, batch_size=size)

        return report


class Exporter:
    """The files of finished samples that the job asks for: of its own block, or of all blocks.

    A rank that does any chunk sees to the blocks of the others too, which may have ended early.
    """

    def __init__(self, job: Job, folder: ChunkFolder, heart: Heart, log: Callable[[str], None]):
        self._job, self._folder, self._heart, self._log = job, folder, heart, log
        self._claims = Claims(folder.folder, heart.worker_id)
        ranks = range(job.world_size)
        self._ranks = [job.rank]
        if job.any_chunk:
            in_turn = [*ranks[job.rank :], *ranks[: job.rank]]
            self._ranks = [rank for rank in in_turn if job.block_of(rank)[0] < len(job.source)]

    def run(self) -> None:
        """Work until the files of no wanted block are missing."""
        missing = self._ranks
        first = missing[0]
        if self._claims.take(self._claim_of(first)):
            self._finish(first)  # even if it is there: perhaps from a run of other blocks
        while missing := self._missing(missing):
            rank = next((r for r in missing if self._claims.take(self._claim_of(r))), None)
            if rank is None:
                self._heart.tell(state="waiting", chunk=None)
                time.sleep(_POLL_S)
            else:
                self._finish(rank)

    def _claim_of(self, rank: int) -> int:
        return len(self._folder) + rank  # the numbers after those of the chunks

    def _missing(self, ranks: list[int]) -> list[int]:
        pngs = outputs.exported_pngs(self._folder) if self._job.save_png_files else None
        return [rank for rank in ranks if not self._is_done(rank, pngs)]

    def _is_done(self, rank: int, pngs: set[int] | None) -> bool:
        block = self._job.block_of(rank)
        if pngs is not None and not pngs.issuperset(range(*block)):
            return False
        if not self._job.save_numpy_array:
            return True
        return exists(outputs.rank_file(self._folder, *block, rank))

    def _finish(self, rank: int) -> None:
        """Write what is missing of a claimed block."""
        self._heart.tell(state="exporting", chunk=None)
        block = self._job.block_of(rank)
        try:
            if self._job.save_numpy_array:
                self._log(f"wrote {outputs.export_npz(self._folder, *block, rank)}")
            if self._job.save_png_files:
                self._log(f"wrote {outputs.export_pngs(self._folder, *block)}")
        finally:
            self._claims.release(self._claim_of(rank))


def _describe_chain(job: Job) -> str:
    settings, start = job.settings, job.info["start_timestep"]
    loop = "DDIM" if settings["use_ddim"] else "DDPM"
    if settings["start_from_scratch"]:
        return f"{loop} from pure noise at original timestep {start}"
    steps = settings["denoise_steps"]
    return f"{loop}: {steps} reverse steps, starting at original timestep {start}"


def _stop_with_launcher() -> None:
    """End this process when the launcher that started it is gone without having ended it."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1.0)
        print("the launcher is gone: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
