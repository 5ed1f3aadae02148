"""Folders of samples until nothing is missing in them, and joined."""

from collections.abc import Callable, Sequence

from esddpm_io.errors import EXIT_DISK_FULL
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.gathering import gather
from guided_diffusion.sampling.launcher import Launcher, WorkerCommand, WorkersFailed


def complete(
    folders: Sequence[ChunkFolder],
    commands: Callable[[Sequence[ChunkFolder]], list[WorkerCommand]],
    *,
    gathers: bool,
    on_failure: Callable[[WorkersFailed], None] | None = None,
) -> None:
    """Sample what is missing of the folders, in their order; with `gathers` join the samples.

    commands: the processes that sample the folders given to it. on_failure: is told of a folder
    that cannot be completed, and the others go on. WorkersFailed without it, and where the fault is
    of no folder, or the disk is full.
    """
    left = list(folders)
    while left:
        for folder in left:
            folder.remove_damaged(print)
        missing = [folder for folder in left if not folder.is_complete()]
        for folder in left:
            if folder not in missing:
                print(f"all {folder.num_samples} samples are there already: {folder.folder}")
        try:
            if missing:
                Launcher(commands(missing), *missing).run()
        except WorkersFailed as error:
            if on_failure is None or error.folder is None or error.exit_code == EXIT_DISK_FULL:
                raise
            on_failure(error)
            left.remove(error.folder)
            continue
        # What is found damaged is sampled again.
        left = [folder for folder in left if gathers and not gather(folder)]
