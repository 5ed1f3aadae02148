"""One process's part in a run."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from guided_diffusion.settings.record import Run

if TYPE_CHECKING:
    from guided_diffusion.sampling.sources import Source


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's part in sampling a folder.

    rank, world_size: this process's place. With `any_chunk` it does whatever is missing, beginning
    with its own block; without it only its block. device: empty chooses by local rank.
    """

    run: Run
    source: "Source"
    save_dir: str
    device: str = ""
    rank: int = 0
    world_size: int = 1
    any_chunk: bool = False
    batch_size: int = 16
    chunk_size: int = 16
    save_numpy_array: bool = False
    save_png_files: bool = False
    print_settings: bool = False
    compile: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def block(self) -> tuple[int, int]:
        """This rank's own block of indices: ceil(N / world_size) from rank × that."""
        return self.block_of(self.rank)

    def block_of(self, rank: int) -> tuple[int, int]:
        """The block of any rank."""
        share = -(-self.run.num_samples // self.world_size)
        start = min(rank * share, self.run.num_samples)
        return start, min(start + share, self.run.num_samples)


def rank_from_environment(environ: Mapping[str, str]) -> tuple[int, int, bool]:
    """Rank and size that torchrun, mpiexec or srun gave, and whether one of them did.

    The tasks of a Slurm job array count as one world: task a of process p has rank a × size + p.
    """
    from esddpm_io.launch import find_launch

    launch = find_launch(environ)
    rank, size = launch.rank, launch.world_size
    if "SLURM_ARRAY_TASK_ID" in environ:
        tasks = int(environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        task = min(int(environ["SLURM_ARRAY_TASK_ID"]) - first, tasks - 1)
        return task * size + rank, tasks * size, True
    return rank, size, launch.launcher != "alone"


def describe(run: Run) -> str:
    """A line for each value that samples depend on, with its origin."""
    values = run.dependences()
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        origin = run.origins.get(name)
        lines.append(f"{name:<{width}}  {value}{f'  ({origin})' if origin else ''}")
    return "\n".join(lines)
