"""The loop of one process: find what is missing, sample it, store it, until nothing is missing.

No process asks another what to do. Each samples its own block from the start, then what is missing
of the others' blocks, from different ends, looking before each chunk what is there. In the end
several may be at the same chunk: then the first to store it wins, and the rest drop theirs. So
nobody waits for a process that is slow, stopped or gone.
"""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from esddpm_io.files import exists
from esddpm_io.parts import Range
from esddpm_io.processes import PARENT_VARIABLE
from esddpm_io.progress import Progress
from guided_diffusion.sampling import outputs
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Heartbeat
from guided_diffusion.sampling.job import Job
from guided_diffusion.settings.record import Run

if TYPE_CHECKING:
    from guided_diffusion.sampling.sampler import LoadedNetworks

_LOOK_S = 1.0  # between two looks, in the middle of a chunk, whether another process stored it


class _Superseded(Exception):
    """Another process has stored the chunk that this one is at."""


@contextlib.contextmanager
def telling_how_to_continue(job: Job, command: str) -> Iterator[None]:
    """Print the command that goes on when Ctrl-C or SIGTERM ends the block.

    Once for all processes that one launcher has started; ours tells its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        is_first = job.rank == 0 or not job.any_chunk
        if is_first and PARENT_VARIABLE not in os.environ:
            print(f"what is finished stays; continue with\n  {command}", file=sys.stderr)
        raise


def run(
    job: Job,
    log: Callable[[str], None] = print,
    networks: "LoadedNetworks | None" = None,
) -> None:
    """Sample what is missing of the job's folder (or of this rank's block of it).

    networks: what this process has loaded for the jobs before. Returns when all of it is finished,
    by this process or another; then writes the files that the job asks for. Raises UserError for a
    folder of other settings, a checkpoint that does not fit, and samples that are not finite.
    """
    folder = ChunkFolder.open(job.save_dir, job.run)
    if job.save_png_files:
        outputs.claim_png_folder(folder)
    log(f"rank {job.rank} of {job.world_size}: {folder.num_samples} samples in {job.save_dir}")
    for remark in job.remarks:
        log(remark)
    log(describe_chain(job.run))
    with Heartbeat(folder.folder, rank=job.rank, device=job.device or "auto") as heartbeat:
        folder.remove_damaged(log, job.block)
        Worker(job, folder, heartbeat, log, networks).run()
        if job.save_numpy_array or job.save_png_files:
            heartbeat.tell(state="exporting")
            export(job, folder, log)


def check_source_again(job: Job) -> None:
    """UserError if start images in files have changed while samples were made of them."""
    start = job.run.start
    if start.path is not None and start.kind != "generator":
        from guided_diffusion.sampling.sources import check_source, open_source

        check_source(open_source(start, job.run.num_samples, job.run.seed), start, job.save_dir)


def next_chunk(job: Job, missing: Sequence[Range]) -> Range | None:
    """Which of the missing chunks a process does next: of its own block the first.

    Then of the block of the next rank that has any, each helper from another place near its end.
    """
    start, stop = job.block
    own = [chunk for chunk in missing if chunk[0] < stop and chunk[1] > start]
    if own or not job.any_chunk:
        return own[0] if own else None
    for distance in range(1, job.world_size):
        start, stop = job.block_of((job.rank + distance) % job.world_size)
        theirs = [chunk for chunk in missing if start <= chunk[0] < stop]
        if theirs:
            # Its helpers are at different distances, so they do not begin with the same one.
            return theirs[-1 - (distance - 1) % len(theirs)]
    return None


class Worker:
    """One process's work on a folder of chunks."""

    def __init__(
        self,
        job: Job,
        folder: ChunkFolder,
        heartbeat: Heartbeat,
        log: Callable[[str], None],
        networks: "LoadedNetworks | None" = None,
    ):
        self._job, self._folder, self._heartbeat, self._log = job, folder, heartbeat, log
        self._networks = networks
        self._batch_size = job.batch_size
        self._images_done = 0

    def run(self) -> None:
        """Work until no wanted chunk is missing; UserError if start images have changed since."""
        wanted = self._missing()
        left = _count(wanted)
        with Progress(left, "images", "sampling") as progress:
            while (chunk := next_chunk(self._job, wanted)) is not None:
                self._load()
                self._finish(chunk)
                wanted = self._missing()
                left, before = _count(wanted), left
                progress.update(before - left)
        if self._images_done:
            check_source_again(self._job)

    def _missing(self) -> list[Range]:
        missing = self._folder.missing(self._job.chunk_size)
        if self._job.any_chunk:
            return missing
        start, stop = self._job.block
        return [chunk for chunk in missing if chunk[0] < stop and chunk[1] > start]

    def _load(self) -> None:
        if hasattr(self, "_sampler"):
            return
        self._heartbeat.tell(state="loading")
        # Only now, for a process that finds nothing to do needs no models.
        from guided_diffusion.sampling.sampler import Sampler

        self._sampler = Sampler(self._job, self._log, self._networks)
        self._log(f"sampling on {self._sampler.device}, {self._batch_size} images a step")
        self._heartbeat.set(device=str(self._sampler.device))
        self._started = time.monotonic()

    def _finish(self, chunk: Range) -> None:
        """Sample a chunk and store it, unless another process does so first."""
        began = time.monotonic()
        with contextlib.suppress(_Superseded):
            images, labels = self._sample(chunk)
            self._folder.write(
                chunk,
                images,
                labels,
                seconds=time.monotonic() - began,
                device=self._sampler.device_name,
                host=platform.node(),
                worker=self._heartbeat.worker_id,
                batch_size=self._batch_size,
            )
            self._images_done += len(images)
            self._heartbeat.set(stored=self._images_done)

    def _sample(self, chunk: Range) -> tuple[np.ndarray, np.ndarray | None]:
        """The chunk's images and labels, in batches that fit into the device's memory."""
        from guided_diffusion.sampling.sampler import is_out_of_memory

        start, stop = chunk
        self._heartbeat.tell(state="sampling", indices=list(chunk))
        batches = []
        position = start
        while position < stop:
            end = min(position + self._batch_size, stop)
            try:
                report = self._reporter(chunk, position - start, end - position)
                batches.append(self._sampler.sample(position, end, report))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or end - position == 1:
                    raise
                self._halve(end - position, error)
                continue
            position = end
        images = np.concatenate([images for images, _ in batches])
        labels = [labels for _, labels in batches if labels is not None]
        return images, np.concatenate(labels) if labels else None

    def _halve(self, size: int, error: BaseException) -> None:
        """Halve the batch for good after one of `size` images did not fit."""
        self._batch_size = size // 2
        reason = str(error).strip().split("\n")[0]
        self._log(f"out of memory with {size} images a step ({reason}): going on with {size // 2}")
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        self._sampler.shrink(self._batch_size)

    def _reporter(self, chunk: Range, before: int, size: int) -> Callable[[int], None]:
        """What the sampler calls after each step of a batch of `size`, `before` into the chunk."""
        steps = self._sampler.steps
        looked = time.monotonic()

        def report(done: int) -> None:
            nonlocal looked
            now = time.monotonic()
            images = self._images_done + before + size * done / steps
            rate = images / (now - self._started)
            self._heartbeat.set(step=done, steps=steps, images=images, rate=rate, batch_size=size)
            if now - looked >= _LOOK_S:
                looked = now
                if self._folder.is_done(chunk):
                    raise _Superseded

        return report


def export(job: Job, folder: ChunkFolder, log: Callable[[str], None]) -> None:
    """Write the files of finished samples that the job asks for: of its own block, or of all.

    A rank that does any chunk sees to the blocks of the others too, which may have ended early.
    """
    ranks = range(job.world_size)
    in_turn = [*ranks[job.rank :], *ranks[: job.rank]] if job.any_chunk else [job.rank]
    for rank in in_turn:
        block = job.block_of(rank)
        if rank != job.rank and block[0] == block[1]:
            continue
        path = outputs.rank_file(folder, *block, rank)
        # Its own even if it is there: perhaps from a run of other blocks.
        if job.save_numpy_array and (rank == job.rank or not exists(path)):
            log(f"wrote {outputs.export_npz(folder, *block, rank)}")
        if job.save_png_files:
            log(f"wrote {outputs.export_pngs(folder, *block)}")


def describe_chain(run: Run) -> str:
    """One line on the steps of a run and where it starts."""
    sampler = run.sampler
    loop, steps = sampler.name.upper(), len(sampler.timesteps)
    if sampler.respacing is None:
        start = "pure noise" if sampler.steps is None else f"T' = {sampler.timesteps[0] + 1}"
        times = ", ".join(map(str, sampler.timesteps))
        clip = "" if sampler.clip_denoised else "; predicted images are not clipped"
        said = f"{sampler.name}: {steps} evaluations from {start}, at original timesteps {times}"
        return f"{said}{clip}"
    if sampler.steps is None:
        return f"{loop}: {steps} steps from pure noise at original timestep {sampler.timesteps[0]}"
    return f"{loop}: {steps} reverse steps, starting at original timestep {sampler.timesteps[0]}"


def _count(chunks: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in chunks)
